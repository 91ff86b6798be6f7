"""Resident memory is this process's own, and what is given back comes back when it is needed."""

import json
import subprocess
import sys

import numpy as np

from fedeq_edge.hardware.memory import give_back, rss_bytes


def test_memory_that_is_held_shows() -> None:
    code = (  # in a process of its own: ours may have a heap that was freed and kept
        "import numpy; from fedeq_edge.hardware.memory import peak_rss_bytes, rss_bytes;"
        "before = rss_bytes(); held = numpy.ones(4_000_000); now = rss_bytes();"
        "print(now - before, held.nbytes, peak_rss_bytes() - now)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, held, above = map(int, done.stdout.split())
    assert grown > 0.9 * held
    assert above >= 0


def test_the_peak_of_a_large_parent_is_not_that_of_its_child() -> None:
    held = np.ones(30_000_000)
    code = "from fedeq_edge.hardware.memory import peak_rss_bytes; print(peak_rss_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < held.nbytes


def test_a_process_goes_on_with_less_after_giving_back() -> None:
    code = (
        "import json, numpy, paho.mqtt.client; from fedeq_edge.hardware.memory import give_back, rss_bytes;"
        "before = rss_bytes(); give_back(); after = rss_bytes();"
        "total = float(numpy.arange(1000.0) @ numpy.ones(1000)); print(json.dumps([before, after, total]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after, total = json.loads(done.stdout)
    assert after < before - 3_000_000
    assert total == 499_500.0


def test_giving_back_twice_is_harmless() -> None:
    give_back()
    give_back()
    assert rss_bytes() > 0


def test_a_large_block_is_reused_once_the_heap_is_kept() -> None:
    code = (
        "import resource, numpy; from fedeq_edge.hardware.memory import keep_heap; keep_heap()\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(3): numpy.ones(1_000_000)\n"
        "before = faults()\n"
        "for _ in range(20): numpy.ones(1_000_000)\n"
        "print(faults() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2000, "8 MB mapped anew twenty times would be 40,000 page faults"

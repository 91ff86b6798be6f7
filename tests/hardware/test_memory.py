"""Resident memory is this process's own, and what is given back comes back when it is needed."""

import json
import subprocess
import sys

import numpy as np

from fedeq_edge.hardware.memory import give_back, peak_rss_bytes, rss_bytes


def test_memory_that_is_held_shows() -> None:
    before = rss_bytes()
    held = np.ones(4_000_000)
    assert rss_bytes() - before > 0.9 * held.nbytes
    assert peak_rss_bytes() >= rss_bytes()


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

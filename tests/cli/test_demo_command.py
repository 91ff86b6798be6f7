"""`fedeq demo` as a user runs it: what it leaves behind, and that it leaves nothing running."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

PATIENCE_S = 120.0
Process = subprocess.Popen[str]


def _start(folder: Path, *arguments: str) -> Process:
    return subprocess.Popen(
        [sys.executable, "-m", "fedeq_edge", "demo", "--out", str(folder / "out"), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@dataclass(frozen=True, slots=True)
class Past:
    """A demo that has ended. told: its stdout, read as JSON; out: its folder."""

    told: dict[str, Any]
    err: str
    out: Path


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Past:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'fedeq-edge[demo]'")
    folder = tmp_path_factory.mktemp("demo")
    process = _start(folder, "--devices", "3", "--rounds", "2", "--json")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    return Past(json.loads(out), err, folder / "out")


def test_the_summary_has_what_was_promised_and_is_the_same_on_stdout(past: Past) -> None:
    summary = json.loads((past.out / "summary.json").read_text())
    assert summary == past.told
    assert summary["rounds"] == 2
    assert summary["wall_s"] > 0
    assert summary["broker"]["kind"] in ("mosquitto", "amqtt")
    assert set(summary["accuracy"]) >= {"personal", "consensus", "local_only"}
    assert all(0.0 < summary["accuracy"][name] <= 1.0 for name in ("personal", "consensus", "local_only"))
    assert summary["bytes_per_client_round"]["up"] > 1000
    assert summary["bytes_per_client_round"]["down"] > 1000
    assert summary["aggregator"]["rss_peak_bytes"] <= 90_000_000
    assert summary["aggregator"]["cpu_s"] > 0


def test_every_device_is_in_the_summary_and_labelled_as_emulated(past: Past) -> None:
    devices = past.told["devices"]
    assert [device["id"] for device in devices] == ["device-0", "device-1", "device-2"]
    assert len({device["profile"] for device in devices}) == 3
    for device in devices:
        assert device["emulated"] is True
        assert device["budget"]["forward"] >= 1
        assert device["budget"]["adjoint"] >= 0
        assert 0.0 < device["residual_mean"] < 10.0
        assert device["seconds_per_round"] > 0
        assert 0 < device["rss_idle_bytes"] <= 45_000_000
        assert device["rss_peak_bytes"] > device["rss_idle_bytes"]
        assert set(device["accuracy"]) == {"personal", "consensus", "local_only"}


def test_every_personal_model_is_onnx_that_agrees_with_torch(past: Past) -> None:
    for device in past.told["devices"]:
        onnx = device["onnx"]
        assert (past.out / onnx["path"]).stat().st_size > 1000
        assert onnx["max_abs_diff"] <= 1e-4
        assert onnx["iterations"] >= 1
        assert onnx["latency_ms"] > 0
        assert onnx["accuracy"] == pytest.approx(device["accuracy"]["personal"], abs=0.01)


def test_a_fleet_without_torch_in_any_trainer_learns_as_well(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'fedeq-edge[demo]'")
    process = _start(tmp_path, "--devices", "2", "--rounds", "2", "--backend", "onnx", "--json")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    told = json.loads(out)
    assert told["backend"] == "onnx"
    assert told["accuracy"]["personal"] > 0.8
    for device in told["devices"]:
        state = tmp_path / "out" / "devices" / device["id"] / "state"
        assert (state / "training.onnx").exists()
        assert device["rss_peak_bytes"] <= 200_000_000  # link and trainer; with torch the trainer alone has more


def test_the_report_is_one_file_that_needs_no_network(past: Past) -> None:
    report = (past.out / "report.html").read_text()
    assert "emulated" in report
    assert all(device["id"] in report for device in past.told["devices"])
    loaded = re.findall(r"""<(?:script|img|link|iframe)[^>]*?(?:src|href)=["']?([^"'\s>]+)""", report)
    assert [source for source in loaded if not source.startswith(("data:", "#"))] == []


def test_people_read_a_line_for_each_round_on_stderr(past: Past) -> None:
    assert re.findall(r"^round +(\d+)  3/3 devices", past.err, re.MULTILINE) == ["1", "2"]
    assert "report.html" in past.err.splitlines()[-1]


@pytest.fixture
def begun(tmp_path: Path) -> Iterator[tuple[Process, list[psutil.Process]]]:
    """A demo whose agents, aggregator and broker run, and all processes below it."""
    process = _start(tmp_path, "--devices", "2", "--rounds", "50")
    demo, deadline = psutil.Process(process.pid), time.monotonic() + PATIENCE_S
    while sum("fedeq_edge.trainer" in child.cmdline() for child in demo.children(recursive=True)) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = demo.children(recursive=True)
    yield process, children
    for each in (*children, demo):
        if each.is_running():
            each.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "terminated"]
)
def test_an_interrupted_demo_leaves_nothing_running(
    begun: tuple[Process, list[psutil.Process]], number: signal.Signals, status: int
) -> None:
    process, children = begun
    assert len(children) >= 6  # a broker, an aggregator, two agents with a trainer each
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == status
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []

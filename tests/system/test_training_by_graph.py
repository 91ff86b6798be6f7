"""Agents that train without torch, over a real broker: how they come by their graph, and what they need."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedeq_edge import modelfile
from fedeq_edge.backends import build_graph
from fedeq_edge.deq.spec import ModelSpec

if TYPE_CHECKING:
    from tests.conftest import RealMosquitto
    from tests.system.conftest import Fleet, MakeFleet

# A trainer with torch has at least three times as much (`make bench-onnx BENCH_SECTIONS=memory` measures both).
TRAINER_BYTES = 120_000_000


@dataclass(slots=True)
class Past:
    """A finished federation of two devices by graph and one by torch, and what was seen while it ran."""

    fleet: "Fleet"
    mapped: dict[str, str] = field(default_factory=dict)
    trainer_bytes: int = 0


def graph_of(fleet: "Fleet", device: str) -> Path:
    return fleet.folder / device / "state" / "training.onnx"


def stamp(path: Path) -> tuple[int, int]:
    """Which file this is, and when it was written."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


@pytest.fixture(scope="module")
def past(make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto") -> Past:
    """Device a is killed once its graph is there, and comes back."""
    fleet = make_fleet(shared_mosquitto.url, by_graph=("a", "b"))
    seen = Past(fleet)
    fleet.start_aggregator()
    fleet.start_agents()
    fleet.hold("c")
    trainer = fleet.trainer("b")
    seen.mapped = {
        "trainer": Path(f"/proc/{trainer.pid}/maps").read_text(),
        "link": Path(f"/proc/{fleet.agents['b'].pid}/maps").read_text(),
    }
    seen.trainer_bytes = trainer.memory_info().rss
    before = stamp(graph_of(fleet, "a"))
    fleet.restart_agent("a")
    fleet.release("c")
    fleet.finish()
    fleet.dismiss()
    assert stamp(graph_of(fleet, "a")) == before, "the graph was fetched twice"
    return seen


@pytest.mark.broker
def test_devices_by_graph_and_by_torch_make_one_federation(past: Past) -> None:
    assert [line["contributed"] for line in past.fleet.rounds()] == [["a", "b", "c"]] * 3
    reports = past.fleet.reports()
    assert set(reports) == {"a", "b", "c"}
    assert min(report["accuracy_personal"] for report in reports.values()) > 0.8  # easy data; a third is guessing
    for device in ("a", "b"):
        assert modelfile.read(past.fleet.folder / device / "state" / "personal.fedeq").device == device


@pytest.mark.broker
def test_the_graph_on_the_device_is_the_one_that_the_gateway_makes_for_the_model(past: Past) -> None:
    made = build_graph(ModelSpec(input_shape=(16,), classes=3, channels=8))
    for device in ("a", "b"):
        assert graph_of(past.fleet, device).read_bytes() == made
    assert not graph_of(past.fleet, "c").exists()


@pytest.mark.broker
def test_onnxruntime_lives_in_the_trainer_alone_and_torch_nowhere(past: Past) -> None:
    assert "onnxruntime" in past.mapped["trainer"]
    assert "libtorch" not in past.mapped["trainer"]
    assert "onnxruntime" not in past.mapped["link"]
    assert past.trainer_bytes <= TRAINER_BYTES


@pytest.mark.broker
def test_an_agent_that_is_told_to_train_by_graph_takes_one_that_came_with_a_bundle(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "har.onnx").write_bytes(build_graph(ModelSpec(input_shape=(16,), classes=3, channels=8)))
    monkeypatch.setitem(os.environ, "FEDEQ_GRAPHS", f'["{tmp_path}/absent", "{tmp_path}"]')
    fleet = make_fleet(shared_mosquitto.url, devices=("a",), rounds=1)
    fleet.start_aggregator()
    fleet.start_agent("a", "--backend", "onnx")
    maps = Path(f"/proc/{fleet.trainer('a').pid}/maps")
    fleet.until(lambda: "onnxruntime" in maps.read_text(), "the trainer loads onnxruntime, which the file does not say")
    fleet.finish()
    assert set(fleet.reports()) == {"a"}
    assert not graph_of(fleet, "a").exists()
    assert fleet.dismiss() == {"a": 0}

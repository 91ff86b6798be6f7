"""A federation of real processes over a real broker, from the first birth to the last farewell."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import psutil
import pytest

from fedeq_edge import modelfile
from fedeq_edge.transport import broker as ladder
from fedeq_edge.wire import messages

if TYPE_CHECKING:
    from tests.conftest import RealMosquitto
    from tests.system.conftest import Fleet, MakeFleet

AGENT_BYTES, AGGREGATOR_BYTES = 45_000_000, 90_000_000  # promised in the README


@dataclass(slots=True)
class Past:
    """A finished federation and what was seen of its processes while it ran."""

    fleet: "Fleet"
    idle_bytes: dict[str, int] = field(default_factory=dict)
    aggregator_bytes: int = 0
    mapped: dict[str, str] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    last_words: dict[str, messages.Message] = field(default_factory=dict)


def _maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


@pytest.fixture(scope="module")
def past(make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto") -> Past:
    """Agents first, then the aggregator, whom the last device lets wait while we look."""
    fleet = make_fleet(shared_mosquitto.url)
    seen = Past(fleet)
    fleet.start_agents()
    with fleet.states() as state_of:
        for device in fleet.devices:
            assert isinstance(state_of(device), messages.Birth)
    for device, agent in fleet.agents.items():
        seen.idle_bytes[device] = psutil.Process(agent.pid).memory_info().rss
    fleet.start_aggregator()
    fleet.hold("c")
    assert fleet.aggregator is not None
    seen.aggregator_bytes = psutil.Process(fleet.aggregator.pid).memory_info().rss
    seen.mapped["aggregator"] = _maps(fleet.aggregator.pid)
    seen.mapped["link"] = _maps(fleet.agents["a"].pid)
    seen.mapped["trainer"] = _maps(fleet.trainer("a").pid)
    fleet.release("c")
    fleet.finish()
    seen.statuses = fleet.dismiss()
    with fleet.states() as state_of:
        seen.last_words = {device: state_of(device) for device in fleet.devices}
    return seen


@pytest.mark.broker
def test_every_round_has_every_device_and_every_report_is_in(past: Past) -> None:
    rounds = past.fleet.rounds()
    assert [line["round"] for line in rounds] == [1, 2, 3]
    assert all(line["contributed"] == ["a", "b", "c"] for line in rounds)
    reports = past.fleet.reports()
    assert set(reports) == {"a", "b", "c"}
    assert min(report["accuracy_personal"] for report in reports.values()) > 0.8  # easy data; a third is guessing
    assert past.fleet.status()["status"] == "finished"
    assert past.fleet.status()["refusals"] == {}


@pytest.mark.broker
def test_every_device_has_its_personal_model_on_disk(past: Past) -> None:
    models = {
        device: modelfile.read(past.fleet.folder / device / "state" / "personal.fedeq") for device in ("a", "b", "c")
    }
    for device, model in models.items():
        assert (model.device, model.run) == (device, past.fleet.status()["run"])
        assert np.isfinite(model.theta).all()
    assert not np.array_equal(models["a"].head, models["b"].head)


@pytest.mark.broker
def test_agents_leave_at_sigterm_with_status_0_and_an_offline_state_that_the_broker_keeps(past: Past) -> None:
    assert past.statuses == {"a": 0, "b": 0, "c": 0}
    assert all(isinstance(words, messages.Offline) for words in past.last_words.values())


@pytest.mark.broker
def test_torch_lives_in_the_trainer_alone(past: Past) -> None:
    assert "libtorch" in past.mapped["trainer"]
    for name in ("aggregator", "link"):
        assert "libtorch" not in past.mapped[name]
        assert "onnxruntime" not in past.mapped[name]


@pytest.mark.broker
def test_an_idle_agent_and_the_aggregator_keep_to_the_memory_that_is_promised(past: Past) -> None:
    assert max(past.idle_bytes.values()) <= AGENT_BYTES, past.idle_bytes
    assert past.aggregator_bytes <= AGGREGATOR_BYTES
    assert past.fleet.status()["rss_peak_bytes"] <= AGGREGATOR_BYTES
    assert all(report["rss_idle_bytes"] <= AGENT_BYTES for report in past.fleet.reports().values())


@pytest.mark.broker
def test_a_finished_federation_stays_finished(past: Past) -> None:
    past.fleet.start_aggregator()
    past.fleet.finish()
    assert "has finished" in past.fleet.log("aggregator").splitlines()[-1]
    assert len(past.fleet.rounds()) == 3


@pytest.fixture(
    params=[pytest.param("mosquitto", marks=pytest.mark.broker, id="mosquitto"), pytest.param("amqtt", id="amqtt")]
)
def old_broker(request: pytest.FixtureRequest) -> Iterator[tuple[str, Literal["3.1.1"]]]:
    """An url where MQTT 3.1.1 is spoken."""
    if request.param == "mosquitto":
        yield request.getfixturevalue("shared_mosquitto").url, "3.1.1"
        return
    pytest.importorskip("amqtt", reason="amqtt is not installed: pip install 'fedeq-edge[broker]'")
    with ladder.running("embedded") as broker:
        yield broker.endpoint.url, "3.1.1"


def test_the_same_over_mqtt_3_1_1(make_fleet: "MakeFleet", old_broker: tuple[str, Literal["3.1.1"]]) -> None:
    url, version = old_broker
    fleet = make_fleet(url, version=version, devices=("a", "b"), rounds=2)
    fleet.start_aggregator()
    fleet.start_agents()
    fleet.finish()
    assert [line["contributed"] for line in fleet.rounds()] == [["a", "b"], ["a", "b"]]
    assert set(fleet.reports()) == {"a", "b"}
    assert fleet.dismiss() == {"a": 0, "b": 0}

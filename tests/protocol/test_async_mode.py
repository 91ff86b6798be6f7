"""Asynchronous mode: the consensus moves as contributions come, and nobody waits for the slowest."""

from collections import Counter
from pathlib import Path

import msgspec
import pytest

from fedeq_edge.errors import ConfigError
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.transport.memory import MemoryBroker
from tests.protocol.fleet import Fleet, Quadratics

FOUR = Quadratics.drawn(4)


def asynchronous(buffer: int = 1, late_rounds: int = 12, **changes: float) -> Schedule:
    return Schedule(mode="async", buffer=buffer, late_rounds=late_rounds, min_devices=4, deadline_s=40.0, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("buffer", [1, 3])
def test_it_reaches_the_optimum_of_the_whole_fleet(buffer: int) -> None:
    fleet = Fleet(FOUR, rounds=500 // buffer, codec="int8", schedule=asynchronous(buffer))
    fleet.run()
    assert fleet.distance() < 1e-4
    fleet.check_duals()
    fleet.check_counted_once()


def test_a_straggler_holds_nobody_up_and_its_contribution_counts_when_it_comes() -> None:
    fleet = Fleet(FOUR, rounds=300, schedule=asynchronous())
    fleet.devices["d3"].holds_back = True
    fleet.run_to_round(9)
    assert fleet.now == 0.0  # no deadline has passed
    assert {store.device for store in fleet.stored} == {"d0", "d1", "d2"}
    fleet.devices["d3"].holds_back = False
    fleet.run(lambda: "d3" in fleet.lines[-1]["late"])
    fleet.run()
    counts = Counter(store.device for store in fleet.stored)
    assert min(counts.values()) > 40  # nobody is left out
    assert {store.device for store in fleet.stored} == set(fleet.devices)
    fleet.check_duals()
    fleet.check_counted_once()


def test_work_on_a_version_that_has_left_the_window_is_refused_and_the_device_asked_anew() -> None:
    fleet = Fleet(FOUR, rounds=120, schedule=asynchronous(late_rounds=5))
    fleet.devices["d3"].holds_back = True
    fleet.run_to_round(20)
    fleet.devices["d3"].holds_back = False
    fleet.run()
    assert fleet.aggregator.refusals["round"] >= 1
    assert any(store.device == "d3" for store in fleet.stored)
    fleet.check_duals()
    fleet.check_counted_once()


def test_a_newcomer_starts_at_once() -> None:
    schedule = msgspec.structs.replace(asynchronous(), min_devices=3)
    fleet = Fleet(FOUR, rounds=60, joining=3, schedule=schedule)
    fleet.run_to_round(10)
    fleet.add(3)
    fleet.run_to_round(12)
    assert any("d3" in issued for issued in fleet.aggregator.state.issued.values())
    fleet.run()
    assert {store.device for store in fleet.stored} == {"d0", "d1", "d2", "d3"}


def test_a_device_that_lost_its_work_with_its_program_is_asked_again() -> None:
    fleet = Fleet(FOUR, rounds=80, schedule=asynchronous(late_rounds=100))
    fleet.devices["d3"].holds_back = True
    fleet.run_to_round(5)
    fleet.devices["d3"].restart()
    fleet.devices["d3"].holds_back = False
    fleet.run()
    assert any(store.device == "d3" for store in fleet.stored)
    fleet.check_duals()
    fleet.check_counted_once()


def test_it_survives_kills_and_a_bad_wire(tmp_path: Path) -> None:
    broker = MemoryBroker(loss=0.05, duplicate=0.1, reorder=True, seed=3)
    fleet = Fleet(FOUR, rounds=30, codec="int4", folder=tmp_path, broker=broker, schedule=asynchronous(buffer=2))
    for number in range(2, 30, 5):
        fleet.run_to_round(number)
        fleet.kill_after = 5 * number % 13
    fleet.run()
    broker.loss = 0.0
    for device in fleet.devices.values():
        device.restart()
    fleet.settle()
    fleet.check_duals()
    counted = [(store.device, store.round) for store in fleet.stored]
    assert len(counted) == len(set(counted))


def test_a_fraction_of_whoever_is_idle_makes_no_sense_and_is_refused() -> None:
    with pytest.raises(ConfigError, match="asks whoever is idle"):
        Schedule(mode="async", fraction=0.5)

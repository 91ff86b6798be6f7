"""Processes are killed in the middle of their work, and the federation goes on to its end."""

import shutil
import signal
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from tests.conftest import RealMosquitto
    from tests.system.conftest import Fleet, MakeFleet

pytestmark = pytest.mark.broker
ROUNDS = 80  # of a few hundredths of a second each: enough to freeze a device before the last


def _began(fleet: "Fleet") -> "Fleet":
    fleet.start_aggregator()
    fleet.start_agents()
    return fleet


def _complete(fleet: "Fleet", rounds: int) -> None:
    """The federation ends with every round once and everybody's report, and nobody had to join anew."""
    fleet.finish()
    assert [line["round"] for line in fleet.rounds()] == list(range(1, rounds + 1))
    assert set(fleet.reports()) == set(fleet.devices)
    assert "joins anew" not in fleet.log("aggregator")
    assert fleet.dismiss() == dict.fromkeys(fleet.devices, 0)


def test_an_agent_that_is_killed_takes_its_trainer_along_and_comes_back_with_its_dual(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto"
) -> None:
    fleet = _began(make_fleet(shared_mosquitto.url, rounds=ROUNDS))
    trainer = fleet.trainer("a")  # in the middle of the first round
    fleet.restart_agent("a")
    trainer.wait(30)
    fleet.hold("c")  # a has contributed to this round and holds a dual
    fleet.restart_agent("a")
    fleet.release("c")
    _complete(fleet, ROUNDS)
    assert all(line["contributed"] == ["a", "b", "c"] for line in fleet.rounds())


def test_an_aggregator_that_is_killed_in_a_round_resumes_it_with_what_it_had_stored(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto"
) -> None:
    fleet = _began(make_fleet(shared_mosquitto.url, rounds=ROUNDS))
    fleet.hold("c")
    held = fleet.status()
    fleet.kill_aggregator()
    fleet.start_aggregator()
    fleet.until(lambda: fleet.status()["pid"] != held["pid"], "the new aggregator tells its status")
    assert fleet.status()["run"] == held["run"]
    assert fleet.status()["round"] == held["round"]
    assert sorted(fleet.status()["contributed"]) == ["a", "b"]
    fleet.release("c")
    _complete(fleet, ROUNDS)
    assert all(line["contributed"] == ["a", "b", "c"] for line in fleet.rounds())


def test_a_fleet_waits_for_a_broker_that_was_killed_and_goes_on_when_it_is_back(
    make_fleet: "MakeFleet", mosquitto: "RealMosquitto"
) -> None:
    fleet = _began(make_fleet(mosquitto.url, rounds=ROUNDS))
    fleet.hold("c")
    mosquitto.kill()
    fleet.until(lambda: fleet.status()["broker"] not in ("connected", "connecting"), "the aggregator sees it")
    fleet.release("c")
    fleet.until(lambda: "disconnected" in fleet.log("c"), "the last device sees it")
    mosquitto.start()  # with an empty memory
    _complete(fleet, ROUNDS)


def test_a_trainer_that_is_killed_costs_its_device_a_round_and_nothing_more(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto"
) -> None:
    fleet = _began(make_fleet(shared_mosquitto.url))
    fleet.trainer("a").kill()
    _complete(fleet, 3)
    first, *later = fleet.rounds()
    assert first["contributed"] == ["b", "c"]
    assert "out of memory?" in first["declined"]["a"]
    assert all(line["contributed"] == ["a", "b", "c"] for line in later)


def test_devices_follow_a_new_federation_while_they_still_train_for_the_old_one(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto"
) -> None:
    fleet = _began(make_fleet(shared_mosquitto.url, devices=("a",), rounds=2))
    stuck = fleet.trainer("a")
    stuck.send_signal(signal.SIGSTOP)
    fleet.until(lambda: fleet.status()["round"] == 1, "the first round is open")
    old = fleet.status()["run"]
    fleet.kill_aggregator()
    shutil.rmtree(fleet.folder / "state")
    fleet.start_aggregator()
    _complete(fleet, 2)
    assert fleet.status()["run"] != old
    assert not psutil.pid_exists(stuck.pid)

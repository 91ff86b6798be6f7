"""Aggregators and agents are killed at the worst moments, alone and together: cases 9 and 10."""

import shutil
from typing import TYPE_CHECKING

import pytest

from fedeq_edge.wire.messages import Chunk, ChunkAck, Fetch, Task, Verdict
from tests.reliability.fleet import AGGREGATOR, Gate, carries

if TYPE_CHECKING:
    from fedeq_edge.wire.messages import Message
    from tests.conftest import RealMosquitto
    from tests.reliability.conftest import MakeFleet

pytestmark = pytest.mark.broker
LARGE = {"channels": 128, "codec": "f32"}  # a contribution of 70 kB takes several messages


@pytest.mark.parametrize("kind", [Chunk, Verdict, Task], ids=lambda kind: str(kind.__name__).lower())
def test_an_aggregator_that_is_killed_with_a_message_on_its_way_comes_back_to_where_it_was(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto", kind: "type[Message]"
) -> None:
    """A verdict that nobody has seen, a piece that only the broker has seen, a task that one device has seen."""
    fleet = make_fleet(shared_mosquitto.port, **LARGE)
    gate = Gate(fleet.links[AGGREGATOR], carries(kind))
    fleet.start()
    gate.wait()
    fleet.kill(AGGREGATOR)
    gate.open()
    fleet.start(AGGREGATOR)
    assert fleet.finish().contributions == 15


def test_an_aggregator_that_is_killed_again_and_again_counts_everybody_once(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto"
) -> None:
    fleet = make_fleet(shared_mosquitto.port, rounds=12)
    fleet.start()
    for number in range(2, 11, 2):
        fleet.until_open(number)
        fleet.kill(AGGREGATOR)
        fleet.start(AGGREGATOR)
    found = fleet.finish()
    assert found.contributions == 36
    assert found.starts == 3


def test_an_aggregator_that_is_killed_waiting_for_the_last_device_still_holds_the_others(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto"
) -> None:
    fleet = make_fleet(shared_mosquitto.port)
    fleet.hold("c")
    fleet.start()
    fleet.until_only("c")
    fleet.kill(AGGREGATOR)
    fleet.start(AGGREGATOR)
    fleet.release("c")
    assert fleet.finish().contributions == 15
    assert fleet.rounds()[0]["contributed"] == ["a", "b", "c"]


@pytest.mark.parametrize("kind", [Fetch, Chunk, ChunkAck], ids=["mid-download", "mid-upload", "between-pieces"])
def test_an_agent_that_is_killed_mid_transfer_sends_its_contribution_again(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto", kind: "type[Message]"
) -> None:
    fleet = make_fleet(shared_mosquitto.port, **LARGE)
    gate = Gate(fleet.links["a"], carries(kind))
    fleet.start()
    gate.wait()
    fleet.kill("a")
    gate.open()
    fleet.start("a")
    assert fleet.finish().contributions == 15


def test_an_agent_that_is_killed_before_it_hears_that_it_counts_moves_its_dual_once(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto"
) -> None:
    fleet = make_fleet(shared_mosquitto.port)
    gate = Gate(fleet.links["a"], carries(Verdict))
    fleet.start()
    gate.wait()
    fleet.kill("a")
    gate.open()
    fleet.start("a")
    found = fleet.finish()
    assert found.contributions == 15
    assert found.starts == 3  # nobody had to begin anew


def test_an_agent_that_is_killed_mid_training_trains_again(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto"
) -> None:
    fleet = make_fleet(shared_mosquitto.port)
    fleet.hold("a")
    fleet.start()
    fleet.until_only("a")
    fleet.kill("a")
    fleet.release("a")
    fleet.start("a")
    assert fleet.finish().contributions == 15


def test_an_agent_whose_disk_is_lost_begins_anew_and_its_old_dual_leaves_the_sums(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto"
) -> None:
    fleet = make_fleet(shared_mosquitto.port, rounds=8)
    fleet.start()
    fleet.until_round(3)
    fleet.hold("b")
    fleet.until_only("b")
    fleet.kill("a")  # it has contributed to the open round
    shutil.rmtree(fleet.folder / "a" / "state")
    fleet.start("a")
    fleet.release("b")
    assert fleet.finish().starts == 4


def test_parts_that_all_die_at_once_go_on_together(make_fleet: "MakeFleet", mosquitto: "RealMosquitto") -> None:
    fleet = make_fleet(mosquitto.port)
    fleet.hold("b")
    fleet.start()
    fleet.until_only("b")
    mosquitto.kill()
    for name in fleet.links:
        fleet.kill(name)
    mosquitto.start()
    fleet.release("b")
    fleet.start()
    assert fleet.finish().contributions == 15

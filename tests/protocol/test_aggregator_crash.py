"""An aggregator that is killed comes back to where it was: nothing acknowledged is lost, nothing counts twice."""

from pathlib import Path

import numpy as np
import pytest

from fedeq_edge.errors import StateError
from fedeq_edge.protocol.actions import Publish, Store
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.storage import AggregatorFolder
from fedeq_edge.transport.memory import MemoryBroker
from fedeq_edge.wire import messages
from fedeq_edge.wire.chunks import digest
from tests.protocol.fleet import Fleet, Quadratics, contribution, upload

THREE = Quadratics.drawn(3)


def _undisturbed_actions() -> int:
    """How many actions the aggregator carries out in the whole of the federation below."""
    fleet = Fleet(THREE, rounds=3, codec="int8")
    fleet.run()
    return fleet.carried


# Every boundary of the round in the middle, and every fourth elsewhere
ACTIONS = _undisturbed_actions()
BOUNDARIES = sorted({*range(0, ACTIONS, 4), *range(ACTIONS // 3, 2 * ACTIONS // 3)})


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_kill_between_any_two_actions_changes_nothing(boundary: int, tmp_path: Path) -> None:
    fleet = Fleet(THREE, rounds=3, codec="int8", folder=tmp_path, kill_after=boundary)
    fleet.run()
    assert fleet.kills == 1
    assert len(fleet.stored) == 9
    fleet.check_counted_once()
    fleet.check_duals()
    assert fleet.aggregator.state.round == 3


def test_a_kill_between_store_and_verdict_is_settled_by_the_contribution_sent_again(tmp_path: Path) -> None:
    fleet = Fleet(THREE, rounds=4, folder=tmp_path)
    fleet.run_to_round(2)
    fleet.devices["d2"].holds_back = True
    fleet.settle()
    device = fleet.devices["d2"]
    device.holds_back = False
    device.do_work()
    fleet.kill_after = 1  # Store: the verdict that follows is not said any more
    fleet.run(lambda: fleet.kills == 1)
    assert (fleet.stored[-1].device, fleet.stored[-1].round) == ("d2", 2)
    assert device.client.state.pending is not None
    fleet.run()
    fleet.check_counted_once()
    fleet.check_duals()


def test_many_kills_on_a_bad_wire_change_nothing(tmp_path: Path) -> None:
    broker = MemoryBroker(loss=0.05, duplicate=0.2, reorder=True, seed=4)
    fleet = Fleet(THREE, rounds=8, codec="int4", folder=tmp_path, broker=broker, schedule=Schedule(deadline_s=35.0))
    for number in range(1, 9):
        fleet.run_to_round(number)
        fleet.kill_after = 7 * number % 19
    fleet.run()
    broker.loss = 0.0
    for device in fleet.devices.values():
        device.restart()
    fleet.settle()
    fleet.check_duals()
    counted = [(store.device, store.round) for store in fleet.stored]
    assert len(counted) == len(set(counted))


def test_a_round_that_was_extended_keeps_its_contributions_over_a_kill(tmp_path: Path) -> None:
    schedule = Schedule(min_devices=3, quorum=1.0, deadline_s=30.0)
    fleet = Fleet(THREE, rounds=2, folder=tmp_path, schedule=schedule)
    fleet.devices["d2"].holds_back = True
    fleet.run(lambda: fleet.aggregator.status()["extensions"] == 1)
    fleet.kill_aggregator()
    assert fleet.aggregator.status()["contributed"] == ["d0", "d1"]
    fleet.devices["d2"].holds_back = False
    fleet.run()
    fleet.check_counted_once()
    first = fleet.lines[0]
    assert first["contributed"] == sorted(first["devices"]) == ["d0", "d1", "d2"]
    assert fleet.devices["d0"].trained == [1, 2]


def test_a_device_that_joined_anew_keeps_its_new_dual_over_a_kill(tmp_path: Path) -> None:
    fleet = Fleet(THREE, rounds=5, folder=tmp_path)
    fleet.run_to_round(3)
    fleet.devices["d1"].lose_state()
    fleet.run(lambda: any("joins anew" in note.event for note in fleet.notes) or fleet.finished)
    fleet.kill_aggregator()
    fleet.check_sums()
    fleet.run()
    fleet.check_sums()
    fleet.check_duals()
    assert sum("joins anew" in note.event for note in fleet.notes) == 1


def test_a_retirement_outlives_a_kill(tmp_path: Path) -> None:
    fleet = Fleet(THREE, rounds=5, folder=tmp_path)
    fleet.run_to_round(3)
    fleet.devices["d2"].crash()
    fleet.settle()
    fleet.retire("d2")
    del fleet.devices["d2"]
    fleet.kill_aggregator()
    assert set(fleet.aggregator.consensus.members) == {"d0", "d1"}
    fleet.run()
    fleet.check_sums()


def test_reports_that_a_crash_forgot_are_asked_for_again(tmp_path: Path) -> None:
    fleet = Fleet(THREE, rounds=2, folder=tmp_path)
    fleet.run(lambda: fleet.aggregator.state.status == "finishing")
    fleet.devices["d2"].holds_back = True
    fleet.settle()
    assert len(fleet.aggregator.reports) == 2
    fleet.devices["d2"].holds_back = False
    fleet.kill_aggregator()
    fleet.run()
    assert set(fleet.aggregator.reports) == {"d0", "d1", "d2"}


def test_a_contribution_that_is_not_of_its_snapshot_stops_the_aggregator(tmp_path: Path) -> None:
    fleet = Fleet(THREE, rounds=3, folder=tmp_path)
    fleet.run_to_round(2)
    message, body = contribution(fleet, "d0", run="another")
    AggregatorFolder(tmp_path).store("d0", 2, 1.0, messages.encode(message, body))
    with pytest.raises(StateError, match="device d0 does not fit the snapshot"):
        fleet.kill_aggregator()


def test_a_stored_contribution_that_the_disk_damaged_is_named(tmp_path: Path) -> None:
    fleet = Fleet(THREE, rounds=3, folder=tmp_path)
    fleet.run_to_round(2)
    AggregatorFolder(tmp_path).store("d0", 2, 1.0, b"FDQ1 no more")
    with pytest.raises(StateError, match="device d0 is damaged"):
        fleet.kill_aggregator()


def test_a_contribution_is_stored_before_anybody_hears_of_it() -> None:
    fleet = Fleet(THREE, rounds=3, codec="f32")
    fleet.run(lambda: fleet.aggregator.state.round == 1)
    message, body = contribution(fleet, "d0", np.full(12, 0.1, np.float32))
    blob = messages.encode(message, body)
    chunk = messages.encode(messages.Chunk(transfer=digest(blob), index=0, size=len(blob)), blob)
    actions = fleet.aggregator.arrived("fedeq/v1/t/dev/d0/up", chunk, fleet.now)
    kinds = [type(action) for action in actions]
    decoded = [messages.decode(action.payload).message for action in actions if isinstance(action, Publish)]
    assert kinds.index(Store) < len(kinds) - 1
    assert isinstance(decoded[-1], messages.Verdict)
    assert decoded[-1].accepted
    upload(fleet, "d0", blob)
    assert not fleet.aggregator.refusals

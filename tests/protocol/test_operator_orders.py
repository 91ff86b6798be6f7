"""Deny, allow and retire: what an operator says takes effect at once, and the sums are as if it had always been so."""

from pathlib import Path

import numpy as np
import pytest

from fedeq_edge import orders
from fedeq_edge.errors import ConfigError, StateError
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.wire import messages
from tests.protocol.fleet import TOPICS, Fleet, Quadratics

THREE = Quadratics.drawn(3)


def midway(folder: Path | None = None) -> Fleet:
    """In the third round everybody but d0 has contributed."""
    fleet = Fleet(THREE, rounds=6, codec="int8", folder=folder, schedule=Schedule(min_devices=2, deadline_s=40.0))
    fleet.run_to_round(3)
    fleet.devices["d0"].holds_back = True
    fleet.settle()
    assert sorted(fleet.aggregator.state.contributed) == ["d1", "d2"]
    return fleet


def deny(fleet: Fleet, device: str) -> None:
    fleet._carry_out(fleet.aggregator.deny(device, fleet.now))


def test_a_denied_device_s_contribution_to_the_open_round_leaves_no_trace() -> None:
    fleet, without = midway(), midway()
    deny(fleet, "d2")
    without.aggregator._take_back("d2")
    sums = fleet.aggregator.consensus.snapshot()
    assert "d2" not in fleet.aggregator.consensus.members
    fleet.check_sums()
    honest = Fleet(THREE, rounds=6, codec="int8", schedule=Schedule(min_devices=2, deadline_s=40.0))
    honest.run_to_round(3)
    honest.devices["d0"].holds_back = honest.devices["d2"].holds_back = True
    honest.settle()
    honest.retire("d2")
    np.testing.assert_equal(sums["arrays"], honest.aggregator.consensus.snapshot()["arrays"])


def test_nothing_is_taken_from_a_denied_device_any_more() -> None:
    fleet = midway()
    deny(fleet, "d2")
    fleet.devices["d2"].restart()
    fleet.devices["d0"].holds_back = False
    stored = len(fleet.stored)
    fleet.run()
    assert {store.device for store in fleet.stored[stored:]} == {"d0", "d1"}
    assert fleet.aggregator.refusals["denied"] >= 1
    assert "d2" not in fleet.aggregator.status()["online"]
    assert fleet.aggregator.status()["denied"] == ["d2"]
    fleet.check_sums()


def test_a_denial_outlives_a_kill(tmp_path: Path) -> None:
    fleet = midway(tmp_path)
    deny(fleet, "d2")
    fleet.kill_aggregator()
    assert fleet.aggregator.status()["denied"] == ["d2"]
    fleet.check_sums()
    fleet.devices["d0"].holds_back = False
    fleet.run()
    assert not any(store.device == "d2" and store.round > 3 for store in fleet.stored)
    fleet.check_sums()


def test_a_device_that_is_allowed_again_joins_from_the_start() -> None:
    fleet = midway()
    deny(fleet, "d2")
    fleet._carry_out(fleet.aggregator.allow("d2", fleet.now))
    fleet.devices["d2"].restart()
    fleet.devices["d0"].holds_back = False
    fleet.run()
    assert any(store.device == "d2" and store.round > 3 for store in fleet.stored)
    fleet.check_duals()


def test_a_device_that_was_never_here_may_be_denied_before_it_comes() -> None:
    fleet = Fleet(THREE, rounds=3, joining=2, schedule=Schedule(min_devices=2))
    deny(fleet, "d2")
    fleet.add(2)
    fleet.run()
    assert {store.device for store in fleet.stored} == {"d0", "d1"}


def test_orders_are_obeyed_in_the_order_in_which_they_were_given(tmp_path: Path) -> None:
    orders.give(tmp_path, "deny", "d7")
    orders.give(tmp_path, "allow", "d7")
    orders.give(tmp_path, "retire", "a-b_c")
    assert list(orders.taken(tmp_path)) == [("deny", "d7"), ("allow", "d7"), ("retire", "a-b_c")]
    assert not list(orders.taken(tmp_path))


def test_a_file_that_is_no_order_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "orders").mkdir()
    (tmp_path / "orders" / "1.shutdown.d7").touch()
    assert not list(orders.taken(tmp_path))


def test_an_order_for_no_device_or_no_aggregator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"device '\.\./x' cannot stand in a topic"):
        orders.give(tmp_path, "deny", "../x")
    with pytest.raises(StateError, match="has an aggregator run here"):
        orders.give(tmp_path / "nowhere", "deny", "d7")


@pytest.mark.parametrize(
    ("schedule", "birth", "asked"),
    [
        ({"profiles": ("raspberry-pi-4",)}, {"profile": "raspberry-pi-4"}, True),
        ({"profiles": ("raspberry-pi-4",)}, {"profile": "x86-64"}, False),
        ({"battery_percent": 30.0}, {"battery": 29.0}, False),
        ({"battery_percent": 30.0}, {"battery": 31.0}, True),
        ({"battery_percent": 30.0}, {"battery": None}, True),
        ({"data_age_s": 3600.0}, {"data_age_s": 3599.0}, True),
        ({"data_age_s": 3600.0}, {"data_age_s": 3601.0}, False),
        ({"data_age_s": 3600.0}, {"data_age_s": None}, False),
    ],
)
def test_the_schedule_asks_only_devices_that_fit_it(
    schedule: dict[str, object], birth: dict[str, object], asked: bool
) -> None:
    fleet = Fleet(THREE, rounds=2, joining=0, schedule=Schedule(min_devices=1, **schedule))  # type: ignore[arg-type]
    said = {"boot": "b", "samples": 10, "profile": "", "emulated": False, "codecs": ("f32",)} | birth
    payload = messages.encode(messages.Birth(**said))  # type: ignore[arg-type]
    fleet._carry_out(fleet.aggregator.arrived(TOPICS.state("x"), payload, 0.0))
    assert bool(fleet.messages_to("x", messages.Task)) is asked

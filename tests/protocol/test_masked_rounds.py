"""Masked rounds through the machines: the consensus of open rounds to the bit, and nothing else for the aggregator."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from fedeq_edge.consensus import METHODS, dual_step
from fedeq_edge.consensus.fixed import FixedVector
from fedeq_edge.consensus.masked import Masking
from fedeq_edge.protocol.actions import Store
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.transport.memory import MemoryBroker
from fedeq_edge.wire import coding, messages
from tests.protocol.fleet import SIZE, Fleet, Quadratics

MEAN = msgspec.structs.replace(METHODS["fedeq-published"], rho=1.0)
FIVE = Quadratics.drawn(5)


def fleet_of(problem: Quadratics = FIVE, *, masked: bool = True, rounds: int = 3, **changes: Any) -> Fleet:
    fleet = {"method": MEAN, "schedule": Schedule(min_devices=5, deadline_s=60.0, final_s=60.0), **changes}
    return Fleet(problem, rounds=rounds, masking=Masking(step_s=10.0) if masked else None, **fleet)


@pytest.mark.parametrize("codec", ["f32", "int8", "int4", "top4:int8+z"])
def test_the_consensus_of_every_round_has_the_bits_of_open_rounds(codec: str) -> None:
    masked, opened = (fleet_of(masked=masked, codec=codec) for masked in (True, False))
    masked.run()
    opened.run()
    assert [line["z"] for line in masked.lines if line["kind"] == "round"] == [
        line["z"] for line in opened.lines if line["kind"] == "round"
    ]
    for name, device in masked.devices.items():
        np.testing.assert_array_equal(device.client.state.nu, opened.devices[name].client.state.nu)


def check(fleet: Fleet) -> None:
    """The consensus is what the counted contributions make in the open, and no dual has moved by another one."""
    fleet.check_counted_once()
    for number in {line["round"] for line in fleet.lines if line["kind"] == "round"}:
        sums = [line["contributed"] for line in fleet.lines if line.get("round") == number and line["kind"] == "round"]
        assert all(names == sums[0] for names in sums), "two sums of one round"
    for name, device in fleet.devices.items():
        steps = [step_of(store) for store in fleet.stored if store.device == name]
        moved = np.sum(steps, axis=0) if steps else np.zeros(SIZE, np.int64)
        held = device.client.state.nu
        np.testing.assert_array_equal(held if held.size else np.zeros(SIZE, np.int64), moved, err_msg=name)


def step_of(store: Store) -> FixedVector:
    """What a contribution moves the dual of its device by."""
    received = messages.decode(store.blob)
    message = messages.contribution(received)
    return dual_step(coding.decode(message.codec, received.body, message.length), store.kappa, 32)


def at(stage: str) -> Callable[[Fleet], bool]:
    """Whether the open round has come to a step of its masked sum."""
    return lambda fleet: bool(fleet.finished or (fleet.aggregator.status()["masking"] or {}).get("step") == stage)


@pytest.mark.parametrize("stage", ["keys", "shares", "masked", "reveal"])
@pytest.mark.parametrize("comes_back", [False, True])
def test_a_device_that_drops_out_at_any_stage_costs_the_others_nothing(stage: str, comes_back: bool) -> None:
    fleet = fleet_of()
    fleet.run(lambda: at(stage)(fleet))
    lost = fleet.devices["d1"]
    lost.crash()
    if comes_back:
        lost.start()
    fleet.run()
    if comes_back:
        check(fleet)
    else:
        fleet.check_counted_once()
    first = next(line for line in fleet.lines if line["round"] == 1)
    assert set(first["contributed"]) >= {"d0", "d2", "d3", "d4"}
    assert ("d1" in first["contributed"]) == (stage == "reveal" or (stage == "keys" and comes_back))


def _undisturbed() -> Fleet:
    fleet = fleet_of(rounds=2)
    fleet.run()
    return fleet


@pytest.mark.parametrize("boundary", range(_undisturbed().carried))
def test_a_kill_of_the_aggregator_between_any_two_actions_makes_no_second_sum(boundary: int, tmp_path: Path) -> None:
    fleet = fleet_of(rounds=2, folder=tmp_path, kill_after=boundary)
    fleet.devices["d4"].holds_back = True
    fleet.run(lambda: fleet.kills == 1 or fleet.finished)
    fleet.devices["d4"].holds_back = False
    fleet.run()
    check(fleet)
    assert len(fleet.stored) >= 8


@pytest.mark.parametrize("step", range(24))
def test_a_device_may_restart_at_any_moment(step: int, tmp_path: Path) -> None:
    fleet = fleet_of(rounds=2, device_folders=tmp_path)
    for _ in range(step):
        fleet.step()
    fleet.devices["d1"].restart()
    fleet.run()
    check(fleet)
    assert len(fleet.stored) >= 9


@pytest.mark.parametrize("seed", range(12))
def test_a_bad_network_and_random_restarts_leave_the_sums_right(seed: int, tmp_path: Path) -> None:
    broker = MemoryBroker(loss=0.03, duplicate=0.1, reorder=True, seed=seed)
    chance = random.Random(seed)
    fleet = fleet_of(rounds=3, broker=broker, folder=tmp_path / "a", device_folders=tmp_path / "d")
    while not fleet.finished and fleet.now < 5000.0:
        fleet.step()
        if chance.random() < 0.01:
            chance.choice(list(fleet.devices.values())).restart()
        if chance.random() < 0.005:
            fleet.kill_aggregator()
    broker.loss = broker.duplicate = 0.0
    fleet.run()
    check(fleet)

"""Masked rounds through the machines: the consensus of open rounds to the bit, and nothing else for the aggregator."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from fedeq_edge.consensus import METHODS, dual_step
from fedeq_edge.consensus.fixed import FixedVector
from fedeq_edge.consensus.masked import Masking
from fedeq_edge.consensus.privacy import Privacy
from fedeq_edge.errors import ConfigError
from fedeq_edge.masking import Keys, MaskingDevice, Roster, Shares, encode
from fedeq_edge.protocol.actions import Store
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.transport.memory import MemoryBroker
from fedeq_edge.wire import coding, messages
from tests.protocol.fleet import ADMM, SIZE, Fleet, Quadratics, contribution, upload

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


@dataclass(slots=True)
class Overheard(MemoryBroker):
    """A broker that keeps what it is told."""

    payloads: list[bytes] = field(default_factory=list)

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        self.payloads.append(payload)
        MemoryBroker.publish(self, topic, payload, retain=retain)


@pytest.mark.parametrize("masked", [True, False])
def test_nothing_that_is_sent_tells_of_a_contribution_alone(masked: bool) -> None:
    broker = Overheard()
    fleet = fleet_of(Quadratics.drawn(5, size=3000), masked=masked, broker=broker)
    fleet.run()
    assert len(fleet.stored) == 15
    said = b"".join(broker.payloads)
    values = b"".join(bytes(messages.decode(store.blob).body) for store in fleet.stored)
    found = sum(values[start : start + 16] in said for start in range(0, len(values), 1600))
    assert (found == 0) == masked  # in the open they are found, so that the search is one


def test_a_masked_vector_of_many_blocks_goes_on_where_its_connection_broke() -> None:
    fleet = fleet_of(Quadratics.drawn(5, size=30_000), rounds=1)
    fleet.run(lambda: len(fleet.aggregator._uploads) > 0)
    fleet.devices["d2"].transport.cut()
    fleet.devices["d2"].transport.restore()
    fleet.run()
    fleet.check_counted_once()
    assert len(fleet.stored) == 5


def test_too_few_who_stay_to_the_end_fail_the_round_and_move_nothing() -> None:
    fleet = fleet_of(rounds=2)
    fleet.run(lambda: at("reveal")(fleet))
    for name in ("d0", "d1"):
        fleet.devices[name].crash()
    before = fleet.aggregator.consensus.z_hat
    fleet.run_to_round(2)
    failed = fleet.lines[0]
    assert failed["contributed"] == []
    assert "too few" in failed["failed"]
    np.testing.assert_array_equal(fleet.aggregator.consensus.z_hat, before)
    fleet.run(lambda: fleet.devices["d2"].client.state.accepted_round == 2)
    assert fleet.devices["d2"].client.refusals == {"unmasked": 1}
    assert fleet.aggregator.refusals["unmasked"] == 5
    assert {store.round for store in fleet.stored} == {2}
    fleet.check_counted_once()


@pytest.mark.parametrize("stage", ["keys", "shares", "masked"])
def test_who_is_denied_is_in_no_sum(stage: str) -> None:
    fleet = fleet_of()
    fleet.devices["d4"].holds_back = stage == "masked"
    fleet.run(lambda: at(stage)(fleet))
    if stage == "masked":
        fleet.settle()
    fleet._carry_out(fleet.aggregator.deny("d0", fleet.now))
    fleet.devices["d4"].holds_back = False
    fleet.run()
    assert {name for line in fleet.lines if line["kind"] == "round" for name in line["contributed"]} == {
        "d1",
        "d2",
        "d3",
        "d4",
    }


@pytest.mark.parametrize("order", ["deny", "retire"])
def test_a_sum_whose_survivors_are_told_stands_and_the_next_is_without_who_left(order: str) -> None:
    """Another sum of the same vectors without the device would tell its contribution."""
    fleet = fleet_of(rounds=2)
    fleet.run(lambda: at("reveal")(fleet))
    fleet.devices["d0"].crash()
    fleet._carry_out(getattr(fleet.aggregator, order)("d0", fleet.now))
    fleet.run()
    assert [line["contributed"] for line in fleet.lines if line["kind"] == "round"] == [
        ["d0", "d1", "d2", "d3", "d4"],
        ["d1", "d2", "d3", "d4"],
    ]
    assert "d0" not in fleet.aggregator.consensus.members
    fleet.check_counted_once()


def test_who_retires_without_being_in_the_sum_leaves_it_alone() -> None:
    fleet = fleet_of(rounds=1)
    fleet.run(lambda: at("masked")(fleet))
    fleet.devices["d4"].crash()
    fleet.run(lambda: at("reveal")(fleet))
    fleet.retire("d4")
    fleet.run()
    assert fleet.lines[0]["contributed"] == ["d0", "d1", "d2", "d3"]


def test_who_deals_nonsense_is_named_costs_one_round_and_is_in_no_other_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = MaskingDevice.share

    def nonsense(device: MaskingDevice, roster: Roster) -> Shares:
        shares = honest(device, roster)
        if device._device != "d4":
            return shares
        return Shares(boxes=bytes(len(shares.boxes)), commitments=bytes(len(shares.commitments)))

    monkeypatch.setattr(MaskingDevice, "share", nonsense)
    fleet = fleet_of(rounds=3)
    fleet.run()
    rounds = [line for line in fleet.lines if line["kind"] == "round"]
    assert "the shares of d4 do not fit" in rounds[0]["failed"]
    assert [line["contributed"] for line in rounds] == [[], *2 * [["d0", "d1", "d2", "d3"]]]
    assert fleet.aggregator.refusals["spoiled"] == 1
    assert fleet.now < 60.0  # nobody waited for a deadline


def test_a_few_who_come_back_early_are_not_the_round() -> None:
    """Two thirds of the asked must have sent keys, or the deadline asks everybody again."""
    fleet = fleet_of(Quadratics.drawn(9), rounds=1, schedule=Schedule(min_devices=9, deadline_s=60.0, final_s=60.0))
    fleet.run(lambda: at("keys")(fleet))
    for device in fleet.devices.values():
        device.crash()
    fleet.now += 11.0  # beyond step_s
    for name in ("d0", "d1", "d2"):
        fleet.devices[name].start()
    fleet.settle()
    assert at("keys")(fleet)
    for name in ("d3", "d4", "d5", "d6", "d7", "d8"):
        fleet.devices[name].start()
    fleet.run()
    assert len(fleet.lines[0]["contributed"]) >= 6


def test_a_claim_of_many_samples_costs_who_makes_it_and_not_the_fleet() -> None:
    heavy = Quadratics(FIVE.curvature, FIVE.centre, (*FIVE.samples[:4], 10**6))
    method = msgspec.structs.replace(METHODS["quality-average"], rho=100.0)
    fleet = fleet_of(heavy, rounds=1, method=method)
    fleet.run()
    assert fleet.lines[0]["contributed"] == ["d0", "d1", "d2", "d3"]
    assert "samples_limit" in fleet.lines[0]["declined"]["d4"]


def test_the_limit_is_that_of_each_device_and_not_of_the_heaviest() -> None:
    centre = FIVE.centre.copy()
    centre[0, 0] = 20.0  # of the lightest device
    fleet = fleet_of(Quadratics(FIVE.curvature, centre, FIVE.samples), rounds=1)
    fleet.run()
    assert fleet.lines[0]["contributed"] == ["d1", "d2", "d3", "d4"]
    assert "masking.limit" in fleet.lines[0]["declined"]["d0"]


def test_a_small_fraction_still_asks_as_many_as_a_sum_needs() -> None:
    schedule = Schedule(min_devices=5, fraction=0.2, deadline_s=60.0, final_s=60.0)
    fleet = fleet_of(rounds=3, schedule=schedule)
    fleet.run()
    assert [(line["cohort"], line["extensions"]) for line in fleet.lines if line["kind"] == "round"] == [(3, 0)] * 3


def test_a_contribution_in_the_open_is_refused() -> None:
    fleet = fleet_of()
    fleet.devices["d0"].holds_back = True
    fleet.settle()
    message, body = contribution(fleet, "d0")
    upload(fleet, "d0", messages.encode(message, body))
    verdict = fleet.messages_to("d0", messages.Verdict)[-1]
    assert (verdict.accepted, verdict.code) == (False, "masking")
    assert "not masked" in verdict.reason


def test_a_masked_contribution_to_open_rounds_is_refused() -> None:
    fleet = fleet_of(masked=False)
    fleet.devices["d0"].holds_back = True
    fleet.settle()
    message, body = contribution(fleet, "d0", session=bytes(32))
    upload(fleet, "d0", messages.encode(message, body))
    assert fleet.messages_to("d0", messages.Verdict)[-1].code == "masking"


def test_a_straggler_is_told_that_its_sum_is_closed_and_is_in_the_next() -> None:
    fleet = fleet_of(rounds=3)
    late = fleet.devices["d3"]
    late.holds_back = True
    fleet.run_to_round(2)
    late.holds_back = False
    fleet.run()
    assert [sorted(line["contributed"]) for line in fleet.lines[:2]] == [
        ["d0", "d1", "d2", "d4"],
        ["d0", "d1", "d2", "d3", "d4"],
    ]
    check(fleet)


def test_a_parameter_beyond_the_limit_declines_the_round_and_says_what_to_change() -> None:
    fleet = fleet_of(Quadratics(FIVE.curvature, FIVE.centre * 100.0, FIVE.samples), rounds=1)
    fleet.run(lambda: len(fleet.aggregator.status()["declined"]) == 5)
    declined = fleet.aggregator.status()["declined"]
    assert all("raise masking.limit" in reason for reason in declined.values())


@pytest.mark.parametrize("step", ["keys", "shares", "reveal", "roster", "delivery", "survivors"])
def test_a_step_that_nobody_asked_for_changes_nothing(step: str) -> None:
    fleet = fleet_of()
    fleet.devices["d0"].holds_back = True
    fleet.settle()
    session = fleet.messages_to("d0", messages.Task)[-1].masking.session
    for body in (b"", b"\x93\xc4\x00", encode(Keys(mask=bytes(32), seal=bytes(range(32)))), bytes(1000)):
        for name in ("d0", "stranger"):
            named = messages.MaskingStep(session=session, step=cast("Any", step))
            fleet.feed(name, messages.encode(named, body))
    fleet.devices["d0"].holds_back = False
    fleet.run()
    check(fleet)


def test_a_device_that_cannot_mask_stays_out_and_learns_why() -> None:
    fleet = fleet_of(Quadratics.drawn(6))
    fleet.devices["d5"].codecs = coding.CODECS
    fleet.devices["d5"].restart()
    fleet.run()
    assert "d5" not in fleet.aggregator.consensus.members
    assert fleet.aggregator.refusals["codec"] >= 1
    assert any("fedeq-edge[masking]" in str(note.facts.get("reason")) for note in fleet.notes)


def test_what_masked_rounds_cannot_keep_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="server = 'fresh'"):
        fleet_of(method=ADMM)
    with pytest.raises(ConfigError, match="every single difference"):
        fleet_of(method=msgspec.structs.replace(MEAN, robust="clip"))
    with pytest.raises(ConfigError, match=r"schedule\.mode"):
        fleet_of(schedule=Schedule(mode="async", min_devices=3))
    with pytest.raises(ConfigError, match="min_devices is 2"):
        fleet_of(schedule=Schedule(min_devices=2))
    with pytest.raises(ConfigError, match="choose"):
        fleet_of(privacy=Privacy(clip=0.5, noise_multiplier=0.1))
    with pytest.raises(ConfigError, match=r"masking\.limit"):
        Masking(limit=0.0)
    with pytest.raises(ConfigError, match=r"masking\.threshold"):
        Masking(threshold=0.5)

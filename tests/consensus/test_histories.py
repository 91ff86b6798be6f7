"""H and R are the sums over all members, to the last bit, after any history.

Joins, retirements, late arrivals, lost state, contributions taken back, new weights, restarts in between.
"""

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.consensus.duals import MemoryDuals
from fedeq_edge.consensus.fixed import FixedVector, FloatVector, dual_step
from fedeq_edge.consensus.methods import Method, method
from fedeq_edge.errors import ContributionError

DEVICES = tuple(f"pi-{i}" for i in range(5))
SIZE = 4
Contribution = tuple[str, FloatVector, float]

devices = st.sampled_from(DEVICES)
seeds = st.integers(0, 2**32 - 1)
counts = st.integers(1, 500)


def weighted(weighting: str) -> Method:
    return msgspec.structs.replace(method("admm"), weighting=weighting, blend=0.3)


def through_json(snapshot: dict[str, Any]) -> dict[str, Any]:
    return {"arrays": snapshot["arrays"], "scalars": json.loads(json.dumps(snapshot["scalars"]))}


class Histories(RuleBasedStateMachine):
    """A float32 fleet that keeps its own duals, and contributions that wait with the penalty they were made with."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, FixedVector] = {}
        self.waiting: list[Contribution] = []
        self.arrived: list[Contribution] = []  # in the open round, from members that have not left since

    @initialize(weighting=st.sampled_from(["metric", "objective", "blend"]))
    def start(self, weighting: str) -> None:
        self.duals = MemoryDuals()
        self.consensus = Consensus(np.ones(SIZE, np.float32), method=weighted(weighting), duals=self.duals)

    @rule(device=devices, samples=counts)
    def join_or_come_back_without_state(self, device: str, samples: int) -> None:
        self.consensus.join(device, samples)
        self.held[device] = np.zeros(SIZE, np.int64)
        self._forget_contributions(device)

    @rule(device=devices, samples=counts, seed=seeds)
    def join_with_a_dual(self, device: str, samples: int, seed: int) -> None:
        nu = np.random.default_rng(seed).integers(-(2**40), 2**40, SIZE)
        self.consensus.join(device, samples, nu=nu)
        self.held[device] = nu.copy()
        self._forget_contributions(device)
        nu[:] = 1  # the caller's array is not the server's

    @rule(device=devices)
    def retire(self, device: str) -> None:
        if device in self.held:
            self.consensus.retire(device)
            del self.held[device]
            self._forget_contributions(device)

    @rule(device=devices, samples=counts)
    def count_again(self, device: str, samples: int) -> None:
        if device in self.held:
            self.consensus.set_samples(device, samples)

    @rule(scores=st.dictionaries(devices, st.floats(0.0, 10.0), min_size=1))
    def report_quality(self, scores: dict[str, float]) -> None:
        self.consensus.set_quality({name: value for name, value in scores.items() if name in self.held})

    @rule(device=devices, seed=seeds)
    def train(self, device: str, seed: int) -> None:
        if device in self.held:
            kappa = self.consensus.penalty(device)
            difference = np.random.default_rng(seed).normal(size=SIZE).astype(np.float32)
            self.held[device] = self.held[device] + dual_step(difference, kappa, 32)
            self.waiting.append((device, difference, kappa))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        entry = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
        self.consensus.accept(*entry)
        self.arrived.append(entry)

    @precondition(lambda self: self.arrived)
    @rule(data=st.data())
    def take_back(self, data: st.DataObject) -> None:
        device, difference, kappa = self.arrived.pop(data.draw(st.integers(0, len(self.arrived) - 1)))
        self.consensus.retract(device, difference, kappa)
        self.held[device] = self.held[device] - dual_step(difference, kappa, 32)

    @rule()
    def close(self) -> None:
        self.consensus.close_round()
        self.arrived.clear()

    @rule()
    def restart(self) -> None:
        snapshot = through_json(self.consensus.snapshot())
        self.consensus = Consensus.restore(snapshot, method=self.consensus.method, duals=self.duals)
        assert through_json(self.consensus.snapshot())["scalars"] == snapshot["scalars"]

    @invariant()
    def the_running_sums_are_the_sums(self) -> None:
        if hasattr(self, "consensus"):
            assert_equal_sums(self.consensus)

    @invariant()
    def no_dual_is_larger_than_its_bound(self) -> None:
        if hasattr(self, "consensus"):
            for device, member in self.consensus.members.items():
                assert np.abs(self.duals.get(device)).max() <= member.reach

    def teardown(self) -> None:
        """When everything under way has arrived, the server holds the duals of the fleet, bit for bit."""
        if not hasattr(self, "consensus"):
            return
        for entry in self.waiting:
            self.consensus.accept(*entry)
        for device, nu in self.held.items():
            assert (self.duals.get(device) == nu).all()

    def _forget_contributions(self, device: str) -> None:
        self.waiting = [entry for entry in self.waiting if entry[0] != device]
        self.arrived = [entry for entry in self.arrived if entry[0] != device]


def assert_equal_sums(consensus: Consensus) -> None:
    H, R = consensus.sums
    again_H, again_R = consensus.recomputed()
    assert (again_H == H).all()
    assert again_R == R


Histories.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
)
test_the_running_sums_equal_the_recomputed_ones_after_any_history = Histories.TestCase


def history(consensus: Consensus, rng: np.random.Generator, rounds: int) -> None:
    for _ in range(rounds):
        cohort = [str(name) for name in rng.choice(DEVICES, 2, replace=False)]
        consensus.open_round(cohort)
        for name in cohort:
            consensus.accept(name, rng.normal(size=SIZE).astype(np.float32), consensus.penalty(name))
        consensus.set_quality({name: float(rng.uniform(0, 4)) for name in cohort})
        consensus.close_round()


@pytest.mark.parametrize("weighting", ["metric", "objective"])
def test_a_restored_server_continues_bit_for_bit_from_the_middle_of_a_round(weighting: str) -> None:
    duals = MemoryDuals()
    original = Consensus(np.zeros(SIZE, np.float32), method=weighted(weighting), duals=duals)
    for name in DEVICES:
        original.join(name, 7)
    history(original, np.random.default_rng(0), 20)
    original.open_round(DEVICES[:2])
    first = ("pi-1", np.full(SIZE, 0.1, np.float32), original.penalty("pi-1"))
    original.accept(*first)

    copied = MemoryDuals()
    for name in DEVICES:
        copied.put(name, duals.get(name))
    restored = Consensus.restore(through_json(original.snapshot()), method=weighted(weighting), duals=copied)

    for server in (original, restored):
        server.retract(*first)
        server.accept(*first)
    assert restored.close_round() == original.close_round()
    history(original, np.random.default_rng(1), 20)
    history(restored, np.random.default_rng(1), 20)
    np.testing.assert_equal(restored.snapshot(), original.snapshot())


def test_a_fleet_that_left_entirely_leaves_nothing_behind() -> None:
    consensus = Consensus(np.zeros(SIZE, np.float32), method=weighted("objective"))
    for name in DEVICES:
        consensus.join(name, 11)
    history(consensus, np.random.default_rng(2), 30)
    for name in DEVICES:
        consensus.retire(name)
    H, R = consensus.sums
    assert (H == 0).all()
    assert R == 0
    assert consensus.close_round().contributors == ()


def test_what_a_retired_device_contributed_to_the_open_round_stays_and_cannot_be_taken_back() -> None:
    consensus = Consensus(np.zeros(SIZE, np.float32), method=weighted("metric"))
    for name in DEVICES:
        consensus.join(name, 11)
    contribution = ("pi-0", np.full(SIZE, 0.5, np.float32), consensus.penalty("pi-0"))
    consensus.accept(*contribution)
    consensus.retire("pi-0")
    assert_equal_sums(consensus)
    consensus.join("pi-0", 11)
    with pytest.raises(ContributionError, match="device pi-0: the open round holds no such") as refusal:
        consensus.retract(*contribution)
    assert refusal.value.code == "not_contributed"
    assert consensus.close_round().contributors == ("pi-0",)
    assert consensus.z == pytest.approx(np.full(SIZE, 0.5))

"""H and R are sums over all members after any history: joins, retirements, late arrivals, lost state, new weights."""

import json

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fedeq_edge.consensus.admm import Consensus, MemoryDuals, Vector, advance_dual
from fedeq_edge.consensus.methods import Method, method

DEVICES = tuple(f"pi-{i}" for i in range(5))
SIZE = 4

devices = st.sampled_from(DEVICES)
seeds = st.integers(0, 2**32 - 1)
counts = st.integers(1, 500)


def blended(weighting: str) -> Method:
    return msgspec.structs.replace(method("admm"), weighting=weighting, blend=0.3)


class Histories(RuleBasedStateMachine):
    """A float32 fleet that keeps its own duals, and contributions that wait with the penalty they were made with."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, Vector] = {}
        self.waiting: list[tuple[str, Vector, float]] = []

    @initialize(weighting=st.sampled_from(["metric", "objective", "blend"]))
    def start(self, weighting: str) -> None:
        self.consensus = Consensus(np.ones(SIZE, np.float32), method=blended(weighting))

    @rule(device=devices, samples=counts)
    def join_or_come_back_without_state(self, device: str, samples: int) -> None:
        self.consensus.join(device, samples)
        self.held[device] = np.zeros(SIZE, np.float32)
        self.waiting = [entry for entry in self.waiting if entry[0] != device]

    @rule(device=devices, samples=counts, seed=seeds)
    def join_with_a_dual(self, device: str, samples: int, seed: int) -> None:
        nu = np.random.default_rng(seed).normal(size=SIZE).astype(np.float32)
        self.consensus.join(device, samples, nu=nu)
        self.held[device] = nu.copy()
        nu[:] = 1e9  # the caller's array is not the server's

    @rule(device=devices)
    def retire(self, device: str) -> None:
        if device in self.held:
            self.consensus.retire(device)
            del self.held[device]
            self.waiting = [entry for entry in self.waiting if entry[0] != device]

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
            self.held[device] = advance_dual(self.held[device], kappa, difference)
            self.waiting.append((device, difference, kappa))

    @rule(newest=st.booleans())
    def arrive(self, newest: bool) -> None:
        if self.waiting:
            # a device's own contributions keep their order, as on a connection
            device = self.waiting[-1 if newest else 0][0]
            first = next(entry for entry in self.waiting if entry[0] == device)
            self.waiting = [entry for entry in self.waiting if entry is not first]
            self.consensus.accept(*first)

    @rule()
    def close(self) -> None:
        self.consensus.close_round()

    @invariant()
    def the_running_sums_are_the_sums(self) -> None:
        if not hasattr(self, "consensus"):
            return
        H, R = self.consensus.sums
        again_H, again_R = self.consensus.recomputed()
        assert pytest.approx(again_H, rel=1e-12, abs=1e-9) == H
        assert pytest.approx(again_R, rel=1e-12, abs=1e-9) == R

    def teardown(self) -> None:
        """When everything under way has arrived, the server holds the duals of the fleet, bit for bit."""
        if not hasattr(self, "consensus"):
            return
        for entry in self.waiting:
            self.consensus.accept(*entry)
        H = np.zeros(SIZE)
        for device, nu in self.held.items():
            member = self.consensus.members[device]
            H += member.samples * member.quality**self.consensus.method.exponent * nu.astype(np.float64)
        assert self.consensus.recomputed()[0] == pytest.approx(H, rel=1e-12, abs=1e-12)


Histories.TestCase.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, derandomize=True, database=None
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


def test_a_restored_server_continues_bit_for_bit_from_the_middle_of_a_round() -> None:
    duals = MemoryDuals()
    original = Consensus(np.zeros(SIZE, np.float32), method=blended("objective"), duals=duals)
    for name in DEVICES:
        original.join(name, 7)
    history(original, np.random.default_rng(0), 20)
    original.open_round(DEVICES[:2])
    original.accept("pi-1", np.full(SIZE, 0.1, np.float32), original.penalty("pi-1"))

    snapshot = original.snapshot()
    snapshot["scalars"] = json.loads(json.dumps(snapshot["scalars"]))
    copied = MemoryDuals()
    for name in DEVICES:
        copied.put(name, duals.get(name))
    restored = Consensus.restore(snapshot, method=blended("objective"), duals=copied)

    assert restored.close_round() == original.close_round()
    history(original, np.random.default_rng(1), 20)
    history(restored, np.random.default_rng(1), 20)
    assert (restored.z == original.z).all()
    assert (restored.z_hat == original.z_hat).all()
    assert (restored.sums[0] == original.sums[0]).all()
    assert restored.sums[1] == original.sums[1]
    assert restored.members == original.members


def test_a_fleet_that_left_entirely_leaves_nothing_behind() -> None:
    consensus = Consensus(np.zeros(SIZE, np.float32), method=blended("objective"))
    for name in DEVICES:
        consensus.join(name, 11)
    history(consensus, np.random.default_rng(2), 30)
    for name in DEVICES:
        consensus.retire(name)
    H, R = consensus.sums
    assert (H == 0.0).all()
    assert R == 0.0
    assert consensus.close_round().contributors == ()


def test_the_dual_step_rounds_like_two_float32_operations_whatever_type_the_penalty_has() -> None:
    nu = np.array([1.0, -3.0, 1e-8], np.float32)
    difference = np.array([0.1, 0.3, 1e-8], np.float32)
    expected = nu + np.float32(0.1) * difference
    for kappa in (0.1, float(np.float32(0.1)), np.float64(0.1)):
        advanced = advance_dual(nu, float(kappa), difference)
        assert advanced.dtype == np.float32
        assert advanced.tobytes() == expected.tobytes()
    assert nu.tolist() == [1.0, -3.0, np.float32(1e-8)]

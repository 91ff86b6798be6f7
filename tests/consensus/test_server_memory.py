"""The controls that the default server is compared with: momentum, and running sums over all members."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.consensus.duals import MemoryDuals
from fedeq_edge.consensus.fixed import dual_step, fraction_bits
from fedeq_edge.consensus.methods import METHODS, Method
from fedeq_edge.consensus.records import PartialSum
from fedeq_edge.errors import ConfigError

Array = NDArray[np.float64]
NAMES = ("a", "b", "c", "d")
SAMPLES = np.array([1.0, 2.0, 3.0, 4.0])
START = np.array([3.0, -1.0, 2.0])
CURVATURES = np.random.default_rng(1).uniform(0.5, 3.0, size=(4, 3))
TARGETS = np.random.default_rng(2).normal(size=(4, 3))
OPTIMUM = (SAMPLES @ (CURVATURES * TARGETS)) / (SAMPLES @ CURVATURES)
MOMENTUM = METHODS["fedper-momentum"]
SUMS = METHODS["admm-sums"]


def assembled(method: Method, duals: MemoryDuals | None = None) -> Consensus:
    consensus = Consensus(START, method=method, duals=duals)
    for name, samples in zip(NAMES, SAMPLES, strict=True):
        consensus.join(name, int(samples))
    return consensus


def differences(z: Array, seed: int) -> Array:
    """Contributions of all four clients, as far as they are to go towards their own targets."""
    return np.random.default_rng(seed).uniform(0.1, 0.5, size=(4, 1)) * (TARGETS - z)


def contribute(consensus: Consensus, steps: Array, cohort: Sequence[int]) -> None:
    for i in cohort:
        consensus.accept(NAMES[i], steps[i], consensus.penalty(NAMES[i]))


def prox_round(consensus: Consensus, duals: Array, cohort: Sequence[int]) -> None:
    """Exact local steps on separable quadratics; the duals (4, 3) of the cohort have moved as counted."""
    z = consensus.z_hat
    for i in cohort:
        kappa = consensus.penalty(NAMES[i])
        theta = (CURVATURES[i] * TARGETS[i] - duals[i] + kappa * z) / (CURVATURES[i] + kappa)
        consensus.accept(NAMES[i], theta - z, kappa)
        duals[i] += dual_step(theta - z, kappa, fraction_bits(np.float64)) * 2.0 ** -fraction_bits(np.float64)
    consensus.close_round()


def test_momentum_follows_its_recursion() -> None:
    consensus = assembled(MOMENTUM)
    z, velocity = START.copy(), np.zeros(3)
    for number in range(5):
        cohort = [0, 2] if number % 2 else [1, 2, 3]
        steps = differences(z, number)
        contribute(consensus, steps, cohort)
        consensus.close_round()
        mean = SAMPLES[cohort] @ steps[cohort] / SAMPLES[cohort].sum()
        velocity = MOMENTUM.server_momentum * velocity + mean
        z = z + velocity
        assert consensus.z == pytest.approx(z, abs=1e-12)


def test_a_round_without_contributions_leaves_the_velocity_alone() -> None:
    consensus = assembled(MOMENTUM)
    steps = differences(START, 0)
    contribute(consensus, steps, [0])
    consensus.close_round()
    consensus.close_round()
    contribute(consensus, 0.0 * steps, [0])
    consensus.close_round()
    assert consensus.z == pytest.approx(START + 1.5 * steps[0], abs=1e-12)


def test_running_sums_follow_their_definition_with_stale_members() -> None:
    consensus = assembled(SUMS)
    thetas, duals = np.tile(START, (4, 1)), np.zeros((4, 3))
    for number in range(6):
        cohort = [number % 4, (number + 1) % 4]
        steps = differences(consensus.z, number)
        for i in cohort:
            thetas[i], duals[i] = consensus.z + steps[i], duals[i] + SUMS.rho * steps[i]
        contribute(consensus, steps, cohort)
        consensus.close_round()
        A = SAMPLES @ (SUMS.rho * thetas + duals)
        assert consensus.z == pytest.approx(A / (SUMS.rho * SAMPLES.sum()), abs=1e-8)


def test_running_sums_reach_the_optimum_with_two_of_four() -> None:
    consensus, duals = assembled(SUMS), np.zeros((4, 3))
    rng = np.random.default_rng(0)
    for _ in range(1500):
        prox_round(consensus, duals, rng.choice(4, 2, replace=False).tolist())
    assert consensus.z == pytest.approx(OPTIMUM, abs=1e-8)


def test_a_contribution_taken_back_leaves_no_trace_in_running_sums() -> None:
    first, second = assembled(SUMS), assembled(SUMS)
    steps = differences(START, 3)
    for consensus in (first, second):
        contribute(consensus, steps, [0, 1])
        consensus.close_round()
        contribute(consensus, 0.5 * steps, [2])
    contribute(first, -0.3 * steps, [0])
    first.retract("a", -0.3 * steps[0], first.penalty("a"))
    for consensus in (first, second):
        consensus.close_round()
    assert np.array_equal(first.z, second.z)


@pytest.mark.parametrize("method", [MOMENTUM, SUMS], ids=lambda method: method.name)
def test_a_restored_server_goes_on_bit_for_bit_in_the_middle_of_a_round(method: Method) -> None:
    duals = MemoryDuals()
    consensus = assembled(method, duals)
    steps = differences(START, 1)
    contribute(consensus, steps, [0, 1, 3])
    consensus.close_round()
    contribute(consensus, 0.5 * steps, [1])
    snapshot = consensus.snapshot()
    scalars = json.loads(json.dumps(snapshot["scalars"]))
    kept = MemoryDuals()
    for name in NAMES if method.keeps_duals else ():
        kept.put(name, duals.get(name))
    restored = Consensus.restore({"arrays": snapshot["arrays"], "scalars": scalars}, method=method, duals=kept)
    for server in (consensus, restored):
        server.retract("b", 0.5 * steps[1], server.penalty("b"))
        contribute(server, 0.25 * steps, [2])
        server.close_round()
    assert np.array_equal(consensus.z, restored.z)


def test_a_member_that_is_retired_no_longer_counts_in_running_sums() -> None:
    consensus = assembled(SUMS)
    steps = differences(START, 2)
    contribute(consensus, steps, [0, 1])
    consensus.close_round()
    for name in ("b", "c", "d"):
        consensus.retire(name)
    contribute(consensus, 0.0 * steps, [0])
    before = consensus.z
    consensus.close_round()
    nu = SUMS.rho * steps[0]
    assert consensus.z == pytest.approx(before + nu / SUMS.rho, abs=1e-8)


def test_running_sums_take_no_sum_of_several() -> None:
    partial = PartialSum(steps=np.zeros(3, np.int64), weight=1, squares=0, devices=("a",))
    with pytest.raises(ConfigError, match="bounds single contributions"):
        assembled(SUMS).accept_sum(partial)

"""Few-bit differences both ways leave the optimum where it is: the table of algorithm.md, with real coder and engine.

Eight strongly convex quadratics of dimension 64, which is one block of the integer codes, so that the bits are those
named (blocks are sent whole: at dimension 20 there would be three codes for a value). Duals have 44 fraction bits, and
z is exact to about 1e-13. Distances to the optimum after 1000 rounds, measured:

    up / down           8 of 8, kappa 2   2 of 8, kappa 2   8 of 8, kappa 0.3   2 of 8, kappa 0.3
    f32 / f32           9e-14             1e-13             4e-13               3e-9
    f16 / f16           3e-7              2e-7              2e-7                2e-7
    int8 / int8         8e-14             9e-14             4e-13               3e-9
    int4 / int4         7e-14             1e-13             4e-13               3e-9
    int2 / int4         7e-14             2e-13             4e-13               7e-9
    int2 / int2         8e-14             2e-13             5e-13               2e-8
    top10:int8 / int8   9e-14             5e-12             9e-9                3e-3
    top10:int4 / int4   9e-14             8e-12             1e-8                7e-3
    and, rounded otherwise:
    int2 / int2, down stochastic          8e-14   2e-13     diverges            6e-4
    levels -1, 0, 1 / int4                7e-14   diverges  5e-13               diverges

A difference shrinks with the distance and its code with it, so 32-bit codes reach the precision of the 64-bit problem.
float16 alone has a smallest number, 6e-8, and stops there. The last column is slow without a code, too.

Up, rounding is stochastic: what a device lost is gone with theta_i, and must be right in the mean. Down, it is to the
nearest: what z_hat did not take stays in z - z_hat, which the server keeps, and two bits are stable only so.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.consensus.fixed import dual_step, dual_value, fixed_penalty, fraction_bits, penalty_of
from fedeq_edge.consensus.methods import method
from fedeq_edge.errors import ContributionError
from fedeq_edge.wire import coding

Array = NDArray[np.floating]
Transmit = Callable[[Array], Array]
DIMENSION = 64
SAMPLES = {f"pi-{i}": i + 1 for i in range(8)}
START = np.random.default_rng(5).normal(size=DIMENSION) * 3.0
BITS = fraction_bits(np.float64)


@dataclass(frozen=True, kw_only=True)
class Quadratic:
    """F(theta) = theta' Q theta / 2 - b' theta."""

    Q: Array
    b: Array


def problems() -> dict[str, Quadratic]:
    rng = np.random.default_rng(0)
    clients = {}
    for name in SAMPLES:
        M = rng.normal(size=(DIMENSION, DIMENSION))
        Q = M @ M.T / DIMENSION + 0.1 * np.eye(DIMENSION)
        clients[name] = Quadratic(Q=Q, b=2.0 * rng.normal(size=DIMENSION))
    return clients


PROBLEMS = problems()
OPTIMUM: Array = np.linalg.solve(
    sum(SAMPLES[name] * problem.Q for name, problem in PROBLEMS.items()),
    sum(SAMPLES[name] * problem.b for name, problem in PROBLEMS.items()),
)


def coded(codec: str, rng: random.Random | None = None) -> Transmit:
    """What the other side decodes of a difference, rounded to nearest without a generator."""
    return lambda difference: coding.decode(
        codec, coding.encode(codec, difference.astype(np.float32), rng), difference.size
    ).astype(np.float64)


def ternary(rng: random.Random) -> Transmit:
    """The two-bit code that int2 is not: levels -1, 0, 1 of the largest magnitude, without bias."""

    def transmit(difference: Array) -> Array:
        scale = np.abs(difference).max()
        noise = np.array([rng.random() for _ in difference])
        rounded: Array = np.floor(difference / scale + noise) * scale
        return rounded

    return transmit


class Fleet:
    """A consensus and eight clients with an exact shared step, which both go on with what was decoded."""

    def __init__(self, kappa: float, up: Transmit, down: Transmit) -> None:
        self.up, self.down = up, down
        self.kappa = penalty_of(fixed_penalty(kappa))
        self.consensus = Consensus(START, method=msgspec.structs.replace(method("admm"), rho=kappa))
        self.nu = {name: np.zeros(DIMENSION, np.int64) for name in SAMPLES}
        self.inverse = {
            name: np.linalg.inv(problem.Q + self.kappa * np.eye(DIMENSION)) for name, problem in PROBLEMS.items()
        }
        for name, samples in SAMPLES.items():
            self.consensus.join(name, samples)

    def train(self, name: str) -> Array:
        """The decoded d_i; the dual has moved by it."""
        z = self.consensus.z_hat
        pull = PROBLEMS[name].b - dual_value(self.nu[name], np.float64) + self.kappa * z
        difference = self.up(self.inverse[name] @ pull - z)
        self.nu[name] = self.nu[name] + dual_step(difference, self.kappa, BITS)
        return difference

    def run(self, rounds: int, cohort: int) -> float:
        """Distance of z to the optimum after so many rounds, infinite where a contribution outgrew the duals."""
        rng = np.random.default_rng(1)
        for _ in range(rounds):
            names = [str(name) for name in rng.choice(list(SAMPLES), cohort, replace=False)]
            self.consensus.open_round(names)
            try:
                for name in names:
                    self.consensus.accept(name, self.train(name), self.kappa)
            except ContributionError:
                return np.inf
            self.consensus.close_round(self.down)
        return float(np.linalg.norm(self.consensus.z - OPTIMUM))


def fleet(kappa: float, up: str, down: str) -> Fleet:
    return Fleet(kappa, coded(up, random.Random(1)), coded(down))


@pytest.mark.parametrize(
    ("cohort", "kappa", "rounds", "reached"), [(8, 2.0, 130, 1e-12), (2, 2.0, 500, 1e-8), (8, 0.3, 300, 1e-10)]
)
@pytest.mark.parametrize(
    ("up", "down"), [("f32", "f32"), ("int8", "int8"), ("int4", "int4"), ("int2", "int4"), ("int2", "int2+z")]
)
def test_a_coded_federation_reaches_the_optimum(
    up: str, down: str, cohort: int, kappa: float, rounds: int, reached: float
) -> None:
    assert fleet(kappa, up, down).run(rounds, cohort) < reached


def test_codes_do_not_slow_a_small_cohort_with_a_soft_penalty() -> None:
    exact = fleet(0.3, "f32", "f32").run(600, 2)
    assert exact > 1e-7
    assert fleet(0.3, "int4", "int4").run(600, 2) < 3.0 * exact
    assert fleet(0.3, "int2", "int2").run(600, 2) < 10.0 * exact


def test_float16_stops_at_its_smallest_number() -> None:
    distance = fleet(2.0, "f16", "f16").run(200, 8)
    assert 1e-9 < distance < 1e-6


def test_two_bits_down_diverge_where_they_are_rounded_stochastically() -> None:
    rng = random.Random(1)
    start = float(np.linalg.norm(START - OPTIMUM))
    assert Fleet(0.3, coded("int2", rng), coded("int2", rng)).run(300, 8) > 100.0 * start


def test_two_bits_up_need_four_levels() -> None:
    three = Fleet(2.0, ternary(random.Random(1)), coded("int2")).run(600, 2)
    assert three > 1e4 * fleet(2.0, "int2", "int2").run(600, 2)


@pytest.mark.parametrize(("cohort", "kappa", "rounds", "reached"), [(8, 2.0, 300, 1e-10), (2, 2.0, 800, 1e-7)])
def test_a_tenth_of_the_values_is_enough_where_the_penalty_is_stiff(
    cohort: int, kappa: float, rounds: int, reached: float
) -> None:
    assert fleet(kappa, "top10:int8", "int8").run(rounds, cohort) < reached


def test_a_tenth_of_the_values_is_slow_where_the_penalty_is_soft_and_the_cohort_small() -> None:
    assert 1e-5 < fleet(0.3, "top10:int8", "int8").run(600, 2) < 1.0


def test_both_sides_hold_the_same_dual_after_a_coded_run() -> None:
    played = fleet(2.0, "int4", "int4")
    played.run(60, 3)
    H, _ = played.consensus.sums
    np.testing.assert_array_equal(H, sum(SAMPLES[name] * nu for name, nu in played.nu.items()))

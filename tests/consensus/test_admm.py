"""The facts of algorithm.md, section 4, on eight strongly convex quadratics with exact clients.

All in float64 unless a test says otherwise, so that "solves" means a distance below 1e-10. Duals then have 44 fraction
bits: each of their steps is rounded to 5.7e-14, and z is as exact as that divided by the curvature. There is room for
18 bits above the point: enough for these gradients times these few samples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.consensus.constraint import Constraint, RowBound, feasible
from fedeq_edge.consensus.fixed import FixedVector, dual_step, dual_value, fraction_bits
from fedeq_edge.consensus.methods import METHODS, Method, method
from fedeq_edge.errors import ContributionError

Array = NDArray[np.floating]
SAMPLES = (1, 2, 3, 4, 5, 6, 7, 8)
NAMES = tuple(f"pi-{i}" for i in range(8))


@dataclass(frozen=True, kw_only=True)
class Quadratic:
    """F(theta) = theta' Q theta / 2 - b' theta."""

    Q: Array
    b: Array

    def gradient(self, theta: Array) -> Array:
        return self.Q @ theta - self.b

    def prox(self, z: Array, nu: Array, kappa: float) -> Array:
        """argmin F(theta) + <nu, theta> + kappa/2 |theta - z|^2."""
        exact: Array = np.linalg.solve(self.Q + kappa * np.eye(z.size), self.b - nu + kappa * z)
        return exact


def fleet(dimension: int = 20) -> dict[str, Quadratic]:
    rng = np.random.default_rng(0)
    clients = {}
    for name in NAMES:
        M = rng.normal(size=(dimension, dimension))
        Q = M @ M.T / dimension + 0.1 * np.eye(dimension)
        clients[name] = Quadratic(Q=Q, b=2.0 * rng.normal(size=dimension))
    return clients


def minimiser(problems: dict[str, Quadratic], weights: Sequence[float], *, anchor: Array | None = None) -> Array:
    """argmin sum_i weights_i F_i / sum_i weights_i  (+ RHO/2 |z - anchor|^2)."""
    share = np.asarray(weights) / np.sum(weights)
    Q = np.einsum("i,ijk->jk", share, np.stack([problem.Q for problem in problems.values()]))
    b = share @ np.stack([problem.b for problem in problems.values()])
    if anchor is not None:
        Q, b = Q + RHO * np.eye(b.size), b + RHO * anchor
    exact: Array = np.linalg.solve(Q, b)
    return exact


class Client:
    """The client's side of section 4 with an exact shared step; it keeps its own dual."""

    def __init__(self, problem: Quadratic) -> None:
        self.problem = problem
        self.fixed: FixedVector = np.zeros(problem.b.size, np.int64)

    @property
    def nu(self) -> Array:
        return dual_value(self.fixed, np.float64)

    def move(self, kappa: float, difference: Array) -> Array:
        """`difference`; the dual has moved by it."""
        self.fixed = self.fixed + dual_step(difference, kappa, fraction_bits(np.float64))
        return difference

    def train(self, z: Array, kappa: float) -> Array:
        """d_i; the dual has moved."""
        return self.move(kappa, self.problem.prox(z, self.nu, kappa) - z)


RHO = 0.5
START = np.random.default_rng(5).normal(size=20) * 3.0
PROBLEMS = fleet()
OPTIMUM = minimiser(PROBLEMS, SAMPLES)
# from 1/4 to 4 with mean 1.125: a fleet as unequal as the clip allows
QUALITIES = (0.25, 0.5, 4.0, 1.0, 0.5, 0.25, 2.0, 0.5)


def tuned(name: str, **changes: object) -> Method:
    return msgspec.structs.replace(method(name), **changes)


def assemble(
    setting: Method, *, z: Array = START, constraints: Sequence[Constraint] = ()
) -> tuple[Consensus, dict[str, Client]]:
    consensus = Consensus(z, method=setting, constraints=constraints)
    for name, samples in zip(NAMES, SAMPLES, strict=True):
        consensus.join(name, samples)
    return consensus, {name: Client(problem) for name, problem in PROBLEMS.items()}


def settle_qualities(consensus: Consensus) -> Array:
    """The fleet's qualities after enough equal reports for them to have settled, (8,)."""
    for _ in range(400):
        consensus.set_quality(dict(zip(NAMES, QUALITIES, strict=True)))
    return np.array([consensus.members[name].quality for name in NAMES])


def counted(q: Array) -> Array:
    """q as it counts in a weight: in units of 1/256."""
    return np.round(256.0 * q) / 256.0


def play(consensus: Consensus, clients: dict[str, Client], cohort: Sequence[str]) -> None:
    """One round of this cohort without loss or delay."""
    consensus.open_round(cohort)
    z = consensus.z_hat.astype(np.float64)
    for name in cohort:
        kappa = consensus.penalty(name)
        consensus.accept(name, clients[name].train(z, kappa), kappa)
    consensus.close_round()


def cohorts(rounds: int, size: int, seed: int = 1) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [[str(name) for name in rng.choice(NAMES, size, replace=False)] for _ in range(rounds)]


def distance(consensus: Consensus, target: Array = OPTIMUM) -> float:
    return float(np.linalg.norm(consensus.z - target))


# ---- what the server solves --------------------------------------------------------------------------------


@pytest.mark.parametrize(("cohort", "kappa", "rounds"), [(8, 0.3, 1500), (8, 2.0, 600), (2, 0.3, 1500), (2, 2.0, 600)])
def test_the_server_reaches_the_optimum_at_full_and_partial_participation(
    cohort: int, kappa: float, rounds: int
) -> None:
    consensus, clients = assemble(tuned("admm", rho=kappa))
    for names in cohorts(rounds, cohort):
        play(consensus, clients, names)
    assert distance(consensus) < 1e-10
    assert np.linalg.norm(dual_value(consensus.sums[0], np.float64)) / sum(SAMPLES) < 1e-9  # sum omega_i nu_i vanishes


def test_at_the_fixed_point_every_dual_is_minus_its_gradient() -> None:
    consensus, clients = assemble(tuned("admm", rho=2.0))
    for names in cohorts(600, 2):
        play(consensus, clients, names)
    for client in clients.values():
        assert client.nu == pytest.approx(-client.problem.gradient(consensus.z), abs=1e-9)


def test_full_participation_is_the_mean_of_theta_plus_nu_over_kappa() -> None:
    consensus, clients = assemble(tuned("admm", rho=RHO))
    for _ in range(3):
        thetas = {}
        z = consensus.z
        consensus.open_round(NAMES)
        for name, client in clients.items():
            difference = client.train(z, RHO)
            thetas[name] = z + difference
            consensus.accept(name, difference, RHO)
        consensus.close_round()
        textbook = sum(
            (n * (thetas[name] + clients[name].nu / RHO) for name, n in zip(NAMES, SAMPLES, strict=True)), np.zeros(20)
        ) / sum(SAMPLES)
        assert consensus.z == pytest.approx(textbook, abs=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0])
def test_the_published_server_is_anchored_at_its_start_and_misses_the_optimum(scale: float) -> None:
    """sum omega_i nu_i - kappa z does not change from round to round, so it ends at argmin F + kappa/2 |z - z_0|^2."""
    start = scale * START
    consensus, clients = assemble(tuned("fedeq-published", rho=RHO), z=start)
    for _ in range(1500):
        play(consensus, clients, NAMES)
    assert distance(consensus, minimiser(PROBLEMS, SAMPLES, anchor=start)) < 1e-9
    assert distance(consensus) > 0.3


def test_the_mean_of_theta_plus_nu_over_kappa_without_H_does_not_converge_at_partial_participation() -> None:
    clients = {name: Client(problem) for name, problem in PROBLEMS.items()}
    weight = dict(zip(NAMES, SAMPLES, strict=True))
    z, distances = START, []
    for names in cohorts(1500, 2):
        messages = [z + clients[name].train(z, RHO) + clients[name].nu / RHO for name in names]
        z = np.average(messages, axis=0, weights=[weight[name] for name in names])
        distances.append(np.linalg.norm(z - OPTIMUM))
    assert min(distances[-300:]) > 0.1


def test_the_ratio_of_running_sums_is_exact_as_well() -> None:
    """z = A / R over everybody's last theta_i, stale ones included: exact, and slower with real participation."""
    clients = {name: Client(problem) for name, problem in PROBLEMS.items()}
    weight = dict(zip(NAMES, SAMPLES, strict=True))
    message = dict.fromkeys(NAMES, RHO * START)
    z = START
    for names in cohorts(1500, 2):
        for name in names:
            theta = z + clients[name].train(z, RHO)
            message[name] = RHO * theta + clients[name].nu
        z = sum((weight[name] * message[name] for name in NAMES), np.zeros(20)) / (RHO * sum(SAMPLES))
    assert np.linalg.norm(z - OPTIMUM) < 1e-10


def test_one_client_is_plain_minimisation() -> None:
    problem = PROBLEMS["pi-3"]
    consensus = Consensus(START, method=tuned("admm", rho=2.0))
    consensus.join("pi-3", 40)
    client = Client(problem)
    for _ in range(600):
        play(consensus, {"pi-3": client}, ["pi-3"])
    assert distance(consensus, np.linalg.solve(problem.Q, problem.b)) < 1e-10


# ---- quality weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weighting", "exponent"), [("metric", 0.0), ("objective", 1.0), ("blend", 0.3)])
def test_each_weighting_solves_the_problem_that_it_claims(weighting: str, exponent: float) -> None:
    consensus, clients = assemble(tuned("admm", rho=2.0, weighting=weighting, blend=0.3))
    q = settle_qualities(consensus)
    assert q.max() / q.min() > 10
    for names in cohorts(800, 2):
        play(consensus, clients, names)
    assert distance(consensus, minimiser(PROBLEMS, list(np.array(SAMPLES) * counted(q**exponent)))) < 1e-10
    assert (distance(consensus) < 1e-10) == (exponent == 0.0)


@pytest.mark.parametrize(("weighting", "exponent"), [("metric", 0.0), ("objective", 1.0)])
def test_qualities_that_move_while_the_fleet_trains_do_not_spoil_the_end(weighting: str, exponent: float) -> None:
    consensus, clients = assemble(tuned("admm", rho=2.0, weighting=weighting))
    rng = np.random.default_rng(2)
    for number, names in enumerate(cohorts(1000, 2)):
        play(consensus, clients, names)
        if number < 200:
            consensus.set_quality({name: float(rng.uniform(0.0, 4.0)) for name in names})
    q = np.array([consensus.members[name].quality for name in NAMES])
    assert distance(consensus, minimiser(PROBLEMS, list(np.array(SAMPLES) * counted(q**exponent)))) < 1e-10


def test_the_trap_quality_in_the_servers_weights_alone_solves_the_objective_row_while_claiming_the_metric_one() -> None:
    """The server weighs by rho q_i, but the clients train with rho: H is then sum n_i q_i nu_i."""
    consensus, clients = assemble(tuned("admm", rho=2.0, weighting="metric"))
    q = settle_qualities(consensus)
    for names in cohorts(1000, 2):
        consensus.open_round(names)
        z = consensus.z
        for name in names:
            consensus.accept(name, clients[name].train(z, 2.0), consensus.penalty(name))
        consensus.close_round()
    assert distance(consensus, minimiser(PROBLEMS, list(np.array(SAMPLES) * q))) < 1e-9
    assert distance(consensus) > 0.1


def test_in_metric_mode_a_weak_device_moves_the_mean_less_and_is_held_less() -> None:
    consensus, _ = assemble(tuned("admm", rho=2.0))
    q = settle_qualities(consensus)
    assert [consensus.penalty(name) for name in NAMES] == pytest.approx(list(2.0 * q))
    differences = np.random.default_rng(8).normal(size=(8, 20))
    for name, difference in zip(NAMES, differences, strict=True):
        consensus.accept(name, difference, consensus.penalty(name))
    consensus.close_round()
    mean = np.average(
        differences, axis=0, weights=[n * consensus.penalty(name) for name, n in zip(NAMES, SAMPLES, strict=True)]
    )
    assert consensus.z == pytest.approx(START + 2 * mean, abs=1e-12)  # H / R is the same mean after one full round


def test_a_quality_is_relative_to_the_fleets_last_scores_and_stays_within_the_clip() -> None:
    consensus, _ = assemble(tuned("admm"))
    q = settle_qualities(consensus)
    assert q == pytest.approx(np.clip(np.array(QUALITIES) / np.mean(QUALITIES), 0.25, 4.0))
    before = consensus.members["pi-1"].quality
    consensus.set_quality({"pi-0": 1e12})
    assert consensus.members["pi-0"].quality <= 4.0
    assert consensus.members["pi-1"].quality == before


# ---- delays, coding, constraints ---------------------------------------------------------------------------


def test_late_contributions_with_an_older_penalty_do_not_move_the_fixed_point() -> None:
    """Every third contribution arrives a round late; its device sits that round out, as its dual is on the way."""
    consensus, clients = assemble(tuned("admm", rho=2.0))
    rng = np.random.default_rng(3)
    delayed: list[tuple[str, Array, float]] = []
    for names in cohorts(1500, 2):
        consensus.open_round(names)
        z, arriving, delayed = consensus.z, delayed, []
        for name in set(names) - {name for name, _, _ in arriving}:
            kappa = consensus.penalty(name)
            contribution = (name, clients[name].train(z, kappa), kappa)
            (delayed if rng.random() < 1 / 3 else arriving).append(contribution)
        consensus.set_quality({name: float(rng.uniform(0.5, 2.0)) for name in names})
        for contribution in arriving:
            consensus.accept(*contribution)
        consensus.close_round()
    assert distance(consensus) < 1e-9


def test_a_late_arrival_enters_H_and_the_mean_of_the_round_in_which_it_comes() -> None:
    consensus, _ = assemble(tuned("admm", rho=RHO))
    difference = np.full(20, 0.25)
    consensus.accept("pi-7", difference, 2 * RHO)  # between two rounds, and with a penalty twice today's
    assert (consensus.sums[0] == 8 * dual_step(difference, 2 * RHO, 44)).all()
    consensus.open_round(["pi-0"])
    report = consensus.close_round()
    assert report.contributors == report.late == ("pi-7",)
    correction = 8 * 2 * RHO * difference / (RHO * sum(SAMPLES))
    assert consensus.z == pytest.approx(START + difference + correction)


def coarse(bits: int, rng: np.random.Generator) -> Callable[[Array], Array]:
    """A few-bit code with stochastic rounding, scale max |v|: what is decoded."""
    levels = 2 ** (bits - 1) - 1

    def decoded(vector: Array) -> Array:
        scale = float(np.abs(vector).max()) / levels
        return vector if scale == 0.0 else np.floor(vector / scale + rng.random(vector.size)) * scale

    return decoded


def test_four_bit_differences_both_ways_leave_the_fixed_point_where_it_is() -> None:
    consensus, clients = assemble(tuned("admm", rho=2.0))
    code = coarse(4, np.random.default_rng(4))
    for names in cohorts(1000, 2):
        z_hat = consensus.z_hat
        consensus.open_round(names)
        for name in names:
            client = clients[name]
            difference = code(client.problem.prox(z_hat, client.nu, 2.0) - z_hat)
            consensus.accept(name, client.move(2.0, difference), 2.0)
        consensus.close_round(code)
    assert distance(consensus) < 1e-10
    assert np.linalg.norm(consensus.z_hat - OPTIMUM) < 1e-10


def test_z_stays_feasible_although_the_dual_step_leaves_the_set() -> None:
    bounds = (RowBound(offset=0, rows=3, cols=5, radius=0.9),)
    consensus, clients = assemble(tuned("admm", rho=0.3), constraints=bounds)
    free, others = assemble(tuned("admm", rho=0.3))
    left = False
    for names in cohorts(60, 2):
        play(consensus, clients, names)
        play(free, others, names)
        assert feasible(consensus.z, bounds, tolerance=1e-12)
        left |= not feasible(free.z, bounds)
    assert left


def test_a_start_outside_the_set_is_projected() -> None:
    bounds = (RowBound(offset=0, rows=2, cols=10, radius=0.9),)
    consensus, _ = assemble(tuned("admm"), constraints=bounds)
    assert feasible(consensus.z_hat, bounds)


def test_float32_fleets_end_within_float32_of_the_optimum_with_equal_duals_on_both_sides() -> None:
    consensus = Consensus(START.astype(np.float32), method=tuned("admm", rho=2.0))
    duals = {name: np.zeros(20, np.int64) for name in NAMES}
    for name, samples in zip(NAMES, SAMPLES, strict=True):
        consensus.join(name, samples)
    for names in cohorts(600, 2):
        consensus.open_round(names)
        z_hat = consensus.z_hat
        for name in names:
            theta = PROBLEMS[name].prox(z_hat.astype(np.float64), duals[name] * 2.0**-32, 2.0)
            difference = (theta - z_hat).astype(np.float32)
            duals[name] += dual_step(difference, 2.0, 32)
            consensus.accept(name, difference, 2.0)
        consensus.close_round()
    assert consensus.z_hat.dtype == np.float32
    assert np.linalg.norm(consensus.z_hat - OPTIMUM) < 1e-5
    held = sum((n * duals[name] for name, n in zip(NAMES, SAMPLES, strict=True)), np.zeros(20, np.int64))
    assert (consensus.sums[0] == held).all()


# ---- special cases and edges -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedper", "fedrep", "ditto", "fedeq-published"])
def test_the_mean_servers_are_the_mean_of_theta_weighted_by_samples(name: str) -> None:
    consensus, _ = assemble(method(name))
    rng = np.random.default_rng(6)
    thetas = rng.normal(size=(3, 20))
    consensus.open_round(NAMES[:3])
    for device, theta in zip(NAMES, thetas, strict=False):
        consensus.accept(device, theta - consensus.z, consensus.penalty(device))
    consensus.close_round()
    assert consensus.z == pytest.approx(np.average(thetas, axis=0, weights=SAMPLES[:3]), abs=1e-12)


def test_the_quality_average_weighs_by_samples_times_quality_and_leaves_the_penalty_alone() -> None:
    consensus, _ = assemble(METHODS["quality-average"])
    q = settle_qualities(consensus)
    thetas = np.random.default_rng(7).normal(size=(8, 20))
    for device, theta in zip(NAMES, thetas, strict=True):
        assert consensus.penalty(device) == pytest.approx(METHODS["quality-average"].rho, abs=2**-33)
        consensus.accept(device, theta - consensus.z, consensus.penalty(device))
    consensus.close_round()
    assert consensus.z == pytest.approx(np.average(thetas, axis=0, weights=np.array(SAMPLES) * counted(q)), abs=1e-12)


def test_a_common_factor_of_all_sample_counts_changes_nothing() -> None:
    ends = []
    for factor in (1, 100):
        consensus = Consensus(START, method=tuned("admm", rho=RHO))
        clients = {name: Client(problem) for name, problem in PROBLEMS.items()}
        for name, samples in zip(NAMES, SAMPLES, strict=True):
            consensus.join(name, factor * samples)
        for names in cohorts(20, 2):
            play(consensus, clients, names)
        ends.append(consensus.z)
    assert ends[0] == pytest.approx(ends[1], abs=1e-12)


def test_an_empty_round_keeps_z_and_says_so() -> None:
    consensus, clients = assemble(tuned("admm"))
    play(consensus, clients, NAMES[:2])
    z, z_hat = consensus.z, consensus.z_hat
    consensus.open_round(NAMES[2:4])
    report = consensus.close_round()
    assert (consensus.z == z).all()
    assert (consensus.z_hat == z_hat).all()
    assert report.contributors == ()
    assert report.step == 0.0
    assert np.isnan(report.primal_residual)


def test_the_report_measures_disagreement_and_step() -> None:
    consensus, _ = assemble(tuned("fedavg", rho=RHO))
    consensus.open_round(["pi-0", "pi-1"])
    consensus.accept("pi-0", np.full(20, 1.0), RHO)
    consensus.accept("pi-1", np.full(20, -2.0), RHO)
    report = consensus.close_round()
    assert report.primal_residual == pytest.approx(np.sqrt((1 * 20 * 1.0 + 2 * 20 * 4.0) / 3))
    assert report.step == pytest.approx(np.sqrt(20.0))
    assert report.dual_residual == pytest.approx(RHO * report.step)
    assert report.correction == 0.0
    assert report.late == ()


@pytest.mark.parametrize(
    ("difference", "kappa", "code"),
    [
        (np.zeros(19), 1.0, "wrong_shape"),
        (np.full(20, np.nan), 1.0, "not_finite"),
        (np.full(20, np.inf), 1.0, "not_finite"),
        (np.full(20, 1e308), 1e10, "too_large"),
        (np.full(20, 2.0**8), 1.0, "too_large"),
        (np.zeros(20), 0.0, "bad_penalty"),
        (np.zeros(20), float("nan"), "bad_penalty"),
        (np.zeros(20), 0.1, "bad_penalty"),
    ],
)
def test_a_contribution_that_would_spoil_the_sums_is_refused_without_a_trace(
    difference: Array, kappa: float, code: str
) -> None:
    consensus, clients = assemble(tuned("admm"))
    play(consensus, clients, NAMES[:2])
    H, R = consensus.sums
    consensus.open_round(["pi-5"])
    with pytest.raises(ContributionError, match="device pi-5") as refusal:
        consensus.accept("pi-5", difference, kappa)
    assert refusal.value.code == code
    assert (consensus.sums[0] == H).all()
    assert consensus.sums[1] == R
    assert consensus.close_round().contributors == ()


def test_a_stranger_is_refused_by_name() -> None:
    consensus, _ = assemble(tuned("admm"))
    with pytest.raises(ContributionError, match="device pi-99 is no member") as refusal:
        consensus.accept("pi-99", np.zeros(20), 1.0)
    assert refusal.value.code == "not_a_member"


def test_a_device_without_samples_cannot_join() -> None:
    with pytest.raises(ContributionError, match="0 training samples"):
        Consensus(START, method=method("admm")).join("pi-0", 0)


@pytest.mark.parametrize("score", [-1.0, float("nan"), float("inf")])
def test_a_bad_score_changes_nobodys_quality(score: float) -> None:
    consensus, _ = assemble(tuned("admm"))
    with pytest.raises(ContributionError, match="device pi-1: quality score"):
        consensus.set_quality({"pi-0": 4.0, "pi-1": score})
    assert {member.score for member in consensus.members.values()} == {None}

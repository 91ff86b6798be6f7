import math

import pytest

from fedeq_edge.consensus import quality
from fedeq_edge.consensus.fixed import penalty_of


def residual_score(r: float, b: float, r0: float = 1e-2) -> float:
    return quality.score("residual", residual=r, backward_residual=b, forward=8, r0=r0)


def test_a_residual_of_r0_halves_the_score_and_both_residuals_are_scaled() -> None:
    assert residual_score(0.0, 0.0) == 1.0
    assert residual_score(1e-2, 0.0) == residual_score(0.0, 1e-2) == pytest.approx(0.5)
    assert residual_score(0.1, 0.1, r0=0.1) == pytest.approx(1 / 3)


@pytest.mark.parametrize("residual", [math.nan, math.inf])
def test_a_residual_that_is_no_number_is_the_worst_score(residual: float) -> None:
    assert residual_score(residual, 0.0) == 0.0


def test_the_iteration_rule_is_the_budget_and_the_uniform_rule_ignores_everything() -> None:
    assert quality.score("iterations", residual=1.0, backward_residual=1.0, forward=12, r0=1e-2) == 12.0
    assert quality.score("uniform", residual=1.0, backward_residual=1.0, forward=12, r0=1e-2) == 1.0


def test_q_moves_by_a_tenth_and_settles_at_the_relative_score() -> None:
    assert quality.moved(1.0, 2.0, 1.0) == pytest.approx(1.1)
    q = 1.0
    for _ in range(300):
        q = quality.moved(q, 2.0, 1.0)
    assert q == pytest.approx(2.0)


@pytest.mark.parametrize(("score", "limit"), [(1e9, 4.0), (0.0, 0.25)])
def test_a_liar_gains_a_factor_of_four_at_most(score: float, limit: float) -> None:
    q = 1.0
    for _ in range(300):
        q = quality.moved(q, score, 1.0)
    assert q == pytest.approx(limit)
    assert 0.25 <= q <= 4.0


def test_a_fleet_of_which_nobody_solves_anything_has_equal_qualities() -> None:
    assert quality.moved(1.0, 0.0, 0.0) == 1.0


@pytest.mark.parametrize(
    ("exponent", "omega", "kappa"),
    [(0.0, 50, 0.4), (1.0, 50 * 256 * 4, 0.1), (0.5, 50 * 256 * 2, 0.2)],
    ids=["metric", "objective", "blend"],
)
def test_the_exponent_shares_q_between_weight_and_penalty(exponent: float, omega: int, kappa: float) -> None:
    weights = quality.weights(50, 4.0, rho=0.1, exponent=exponent)
    assert weights.omega == omega
    assert penalty_of(weights.penalty) == pytest.approx(kappa)


def test_a_weight_holds_a_quality_to_a_256th() -> None:
    assert quality.weights(7, 1.0 + 1 / 256, rho=0.1, exponent=1.0).omega == 7 * 257
    assert quality.weights(7, 1.0 + 1 / 1024, rho=0.1, exponent=1.0).omega == 7 * 256

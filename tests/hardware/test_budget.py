"""The budget is the largest that fits, and a round never runs past its time."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedeq_edge.deq.budget import LARGEST_BUDGET
from fedeq_edge.deq.certificate import Certificate
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.deq.wellposed import adjoint_terms_for, certificate
from fedeq_edge.errors import ConfigError
from fedeq_edge.hardware.budget import (
    Allowance,
    Pace,
    budget_of,
    choose,
    for_certificate,
    round_seconds,
    seconds_of,
    step_seconds,
    within_joules,
    within_seconds,
)
from fedeq_edge.training.step import Budget, Calibration

MENU = (2, 3, 4, 6, 8, 12)
COST = Calibration(batch=16, fixed_s=0.01, evaluation_s=0.01, adjoint_s=0.02)

costs = st.builds(
    Calibration,
    batch=st.just(16),
    fixed_s=st.floats(1e-5, 0.1),
    evaluation_s=st.floats(1e-5, 0.1),
    adjoint_s=st.floats(0, 0.1),
)
menus = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def test_a_device_with_plenty_of_time_gets_the_whole_menu() -> None:
    allowance = choose(COST, steps=10, compute_s=1000.0, menu=MENU, adjoint_ratio=0.5)

    assert allowance.menu == MENU
    assert allowance.budget == Budget(forward=12, adjoint=6)
    assert allowance.steps == 10


def test_the_mean_over_the_affordable_part_has_to_fit_into_four_fifths() -> None:
    # Without adjoint terms a step at K in {2, 3, 4} costs 0.01 + 0.03 s on average, at {2, 3, 4, 6} 0.0475 s.
    just_enough = choose(COST, steps=100, compute_s=4.0 / 0.8 + 1e-9, menu=MENU, adjoint_ratio=0.0)
    a_bit_less = choose(COST, steps=100, compute_s=4.0 / 0.8 - 1e-3, menu=MENU, adjoint_ratio=0.0)

    assert just_enough.menu == (2, 3, 4)
    assert just_enough.predicted_s == pytest.approx(4.0)
    assert a_bit_less.menu == (2, 3)


def test_the_number_of_steps_falls_when_even_the_smallest_k_is_too_much() -> None:
    allowance = choose(COST, steps=100, compute_s=1.0, menu=MENU, adjoint_ratio=0.0)

    assert allowance.menu == (2,)
    assert allowance.steps == 26  # 0.8 s / 0.03 s
    assert choose(COST, steps=100, compute_s=0.0, menu=MENU, adjoint_ratio=0.0).steps == 1


def test_a_derated_device_gets_less_than_a_cool_one() -> None:
    cool = choose(COST, steps=100, compute_s=8.0, menu=MENU, adjoint_ratio=0.4)
    hot = choose(COST, steps=100, compute_s=8.0, menu=MENU, adjoint_ratio=0.4, derate=0.5)

    assert hot.budget.forward < cool.budget.forward
    assert hot.predicted_s <= 0.8 * 8.0


def test_an_unordered_menu_with_repeats_is_read_as_a_set() -> None:
    assert choose(COST, steps=1, compute_s=99.0, menu=[8, 2, 8, 4], adjoint_ratio=0.0).menu == (2, 4, 8)


@pytest.mark.parametrize("menu", [(), (0, 4), (-1,)])
def test_a_menu_without_a_usable_k_is_refused(menu: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="budgets"):
        choose(COST, steps=1, compute_s=1.0, menu=menu, adjoint_ratio=0.4)


def test_a_device_that_abstains_cannot_choose_a_budget() -> None:
    with pytest.raises(ValueError, match="derate"):
        choose(COST, steps=1, compute_s=1.0, menu=MENU, adjoint_ratio=0.4, derate=0.0)


@given(
    cost=costs,
    menu=menus,
    steps=st.integers(1, 500),
    ratio=st.floats(0, 1),
    less=st.floats(0, 100),
    more=st.floats(0, 100),
)
def test_more_time_never_gives_less_work(
    cost: Calibration, menu: list[int], steps: int, ratio: float, less: float, more: float
) -> None:
    small, large = (
        choose(cost, steps=steps, compute_s=seconds, menu=menu, adjoint_ratio=ratio) for seconds in sorted((less, more))
    )

    assert set(small.menu) <= set(large.menu)
    assert small.steps <= large.steps
    assert small.budget.forward == max(small.menu)


@given(cost=costs, menu=menus, steps=st.integers(1, 500), ratio=st.floats(0, 1), compute_s=st.floats(0, 100))
def test_the_prediction_fits_unless_it_is_a_single_step(
    cost: Calibration, menu: list[int], steps: int, ratio: float, compute_s: float
) -> None:
    allowance = choose(cost, steps=steps, compute_s=compute_s, menu=menu, adjoint_ratio=ratio)

    assert allowance.steps == 1 or allowance.predicted_s <= 0.8 * compute_s * (1 + 1e-9)


@given(cost=costs, ratio=st.floats(0, 1), seconds=st.floats(0.5, 100))
def test_the_budget_within_a_time_is_the_largest_that_fits(cost: Calibration, ratio: float, seconds: float) -> None:
    budget = within_seconds(cost, seconds, ratio)

    assert step_seconds(cost, budget) <= seconds
    assert budget == budget_of(budget.forward, ratio)
    assert budget.forward == LARGEST_BUDGET or step_seconds(cost, budget_of(budget.forward + 1, ratio)) > seconds


def test_a_time_that_pays_for_no_evaluation_is_refused_with_the_least_that_would() -> None:
    assert within_seconds(COST, 0.02, 0.0) == Budget(forward=1, adjoint=0)
    with pytest.raises(ConfigError, match=r"single evaluation takes 0\.02 s, more than the 0\.019 s"):
        within_seconds(COST, 0.019, 0.0)


def test_joules_are_seconds_times_the_watts_of_the_board() -> None:
    assert seconds_of(6.2, watts=3.1) == pytest.approx(2.0)
    assert within_joules(COST, 0.34, 0.5, watts=3.1) == within_seconds(COST, 0.11, 0.5)
    with pytest.raises(ConfigError, match=r"active_watts.*profile\.toml"):
        within_joules(COST, 1.0, 0.5, watts=None)


def test_a_rounds_energy_shortens_its_time_and_never_lengthens_it() -> None:
    assert round_seconds(30.0, energy_j=10.0, watts=2.0) == 5.0
    assert round_seconds(30.0, energy_j=1000.0, watts=2.0) == 30.0
    assert round_seconds(30.0, energy_j=None, watts=2.0) == 30.0
    assert round_seconds(30.0, energy_j=10.0, watts=None) == 30.0


@pytest.mark.parametrize(
    "spec",
    [
        ModelSpec(input_shape=(5,), classes=2, channels=12),
        ModelSpec(input_shape=(5,), classes=2, channels=12, norm="spectral", radius=0.7),
        ModelSpec(input_shape=(5,), classes=2, channels=12, cell="monotone", radius=0.5),
        ModelSpec(input_shape=(2, 6, 6), classes=2, channels=4),
    ],
    ids=["rows", "spectral", "monotone", "image"],
)
@pytest.mark.parametrize("accuracy", [0.5, 0.05, 1e-3])
def test_the_budget_for_a_certificate_proves_the_accuracy_and_hardly_more(spec: ModelSpec, accuracy: float) -> None:
    theta, _ = initial(spec, 0)
    first = certificate(theta, spec, 1)
    assert first is not None

    budget = for_certificate(first, accuracy)

    def bound(K: int) -> float:
        proof = certificate(theta, spec, K)
        assert proof is not None
        return proof.bound

    rounding = 1e-4  # of float32; more evaluations do not lower it
    assert bound(budget.forward) <= accuracy * (1 + rounding) + rounding
    assert budget.forward == 1 or bound(budget.forward - 1) > accuracy * (1 - rounding)
    assert budget.adjoint == adjoint_terms_for(first.gamma, accuracy)


def test_a_cell_without_feedback_needs_no_more_than_two_evaluations() -> None:
    still = Certificate(norm="max", gamma=0.0, evaluations=1, bound=1e-6, unit="state")

    assert for_certificate(still, 1e-3) == Budget(forward=1, adjoint=0)
    assert for_certificate(still, 1e-9) == Budget(forward=2, adjoint=0)
    with pytest.raises(ConfigError, match="accuracy > 0"):
        for_certificate(still, 0.0)


def test_no_evaluation_is_planned_beyond_what_is_proven_to_be_enough() -> None:
    assert choose(COST, steps=1, compute_s=99.0, menu=MENU, adjoint_ratio=0.5, enough=5).menu == (2, 3, 4, 5)
    assert choose(COST, steps=1, compute_s=99.0, menu=MENU, adjoint_ratio=0.5, enough=1).menu == (1,)
    assert choose(COST, steps=1, compute_s=99.0, menu=MENU, adjoint_ratio=0.5, enough=100).menu == MENU


def _run_round(allowance: Allowance, pace: Pace, slower: float, seed: int = 0) -> tuple[float, list[int]]:
    """Train on a device that is `slower` than its calibration, with 20 % jitter; elapsed seconds and the Ks."""
    draw, elapsed, used = random.Random(seed), 0.0, list[int]()
    while (K := pace.cap(elapsed)) is not None:
        budget = budget_of(draw.choice([k for k in allowance.menu if k <= K]), 0.4)
        elapsed += slower * draw.uniform(0.8, 1.2) * step_seconds(COST, budget)
        pace.record(budget, elapsed)
        used.append(budget.forward)
    return elapsed, used


def _round(slower: float, drift: float = 1.0) -> tuple[Pace, Allowance, float, list[int]]:
    allowance = choose(COST, steps=60, compute_s=10.0, menu=MENU, adjoint_ratio=0.4, derate=1 / drift)
    pace = Pace(COST, allowance, compute_s=10.0, adjoint_ratio=0.4, drift=drift)
    elapsed, used = _run_round(allowance, pace, slower)
    return pace, allowance, elapsed, used


def test_a_device_at_its_calibrated_speed_does_what_was_planned() -> None:
    pace, allowance, _, used = _round(slower=1.0)

    assert not pace.reduced
    assert len(used) == allowance.steps
    assert pace.drift == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("slower", [1.5, 2.0, 3.5, 20.0])
def test_a_slow_device_lowers_k_and_ends_in_time(slower: float) -> None:
    pace, _, elapsed, used = _round(slower)

    assert pace.reduced
    assert elapsed <= 10.0
    assert used
    assert sum(used[-5:]) < 5 * 12


def test_the_drift_learned_in_one_round_plans_the_next() -> None:
    first, _, _, cut_short = _round(slower=2.5)
    second, allowance, elapsed, used = _round(slower=2.5, drift=first.drift)

    assert first.drift == pytest.approx(2.5, rel=0.15)
    assert len(used) == allowance.steps
    assert len(used) >= len(cut_short)
    assert not second.reduced
    assert elapsed <= 10.0


def test_one_outlier_costs_budget_for_a_while_and_is_then_forgotten() -> None:
    allowance = choose(COST, steps=200, compute_s=100.0, menu=MENU, adjoint_ratio=0.4)
    pace = Pace(COST, allowance, compute_s=100.0, adjoint_ratio=0.4)
    elapsed = 30.0  # the laptop was suspended
    pace.record(budget_of(12, 0.4), elapsed)
    assert pace.drift > 1.2

    for _ in range(60):
        elapsed += step_seconds(COST, budget_of(4, 0.4))
        pace.record(budget_of(4, 0.4), elapsed)

    assert pace.drift == pytest.approx(1.0, abs=0.01)


def test_the_first_step_is_always_allowed_and_the_second_needs_time() -> None:
    allowance = choose(COST, steps=5, compute_s=0.01, menu=MENU, adjoint_ratio=0.4)
    pace = Pace(COST, allowance, compute_s=0.01, adjoint_ratio=0.4)

    assert pace.cap(0.0) == 2
    pace.record(budget_of(2, 0.4), 0.05)
    assert pace.cap(0.05) is None

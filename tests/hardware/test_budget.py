"""The budget is the largest that fits, and a round never runs past its time."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedeq_edge.errors import ConfigError
from fedeq_edge.hardware.budget import Allowance, Pace, budget_of, choose, step_seconds
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

"""Fixed-point duals: one rounding per step, exact sums, and bounds that hold before anything wraps."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedeq_edge.consensus.fixed import (
    STEP_LIMIT,
    WHOLE,
    ExactSum,
    clip_factor,
    dual_step,
    dual_value,
    fixed_penalty,
    fraction_bits,
    largest,
    penalty_of,
    scaled,
)
from fedeq_edge.errors import ConfigError, ContributionError

entries = st.floats(-1e4, 1e4, width=32)
penalties = st.floats(1e-9, 1e2).map(lambda kappa: penalty_of(fixed_penalty(kappa)))


@settings(derandomize=True, database=None)
@given(entry=entries, kappa=penalties)
def test_a_step_is_the_exact_product_rounded_to_a_float64_and_then_to_an_integer(entry: float, kappa: float) -> None:
    step = int(dual_step(np.array([entry], np.float32), kappa, 32)[0])
    exact = Fraction(entry) * Fraction(kappa) * 2**32
    assert step == round(Fraction(float(exact)))  # Fraction's float and round are correctly rounded, ties to even
    assert abs(step - exact) <= Fraction(1, 2) + abs(exact) / 2**53


def test_the_bits_of_a_step_are_those_of_every_platform() -> None:
    difference = np.array([0.1, -0.3, 1e-8, 1e-42, 3.5 * 2.0**-32, 2.5 * 2.0**-32, 1234.5], np.float32)
    assert dual_step(difference, 1.0, 32).tolist() == [429496736, -1288490240, 43, 0, 4, 2, 5302137126912]


@pytest.mark.parametrize("most", [2.0**18, 2.0**19, 2.0**19 - 2.0**-33, 2.0**19 + 2.0**-32, 2.0**20 - 1.0])
def test_halves_go_to_the_even_integer_whatever_stands_beside_them(most: float) -> None:
    halves = (np.arange(-8, 9) + 0.5) * 2.0**-32
    step = dual_step(np.array([*halves, 0.0, -0.0, most, -most]), 1.0, 32)
    assert step.tolist() == [round(Fraction(entry) * 2**32) for entry in [*halves, 0.0, 0.0, most, -most]]


@settings(derandomize=True, database=None)
@given(kappa=st.floats(0.0, 1e300, exclude_min=True))
def test_a_penalty_travels_as_a_float_without_loss_and_is_never_zero(kappa: float) -> None:
    fixed = fixed_penalty(kappa)
    assert fixed >= 1
    assert fixed_penalty(penalty_of(fixed)) == fixed
    assert abs(penalty_of(fixed) - kappa) <= 2.0**-32


@pytest.mark.parametrize("entry", [2.0**20, -(2.0**20), 1e30, np.inf, np.nan])
def test_a_step_of_the_limit_or_beyond_is_refused_with_its_size(entry: float) -> None:
    with pytest.raises(ContributionError, match=r"the limit is 1\.04858e") as refusal:
        dual_step(np.array([0.0, entry]), 1.0, 32)
    assert refusal.value.code == "too_large"
    assert dual_step(np.array([2.0**20 - 1.0]), 1.0, 32)[0] == STEP_LIMIT - 2**32


def test_a_dual_as_floats_is_in_the_units_of_a_gradient() -> None:
    nu = dual_step(np.array([0.25, -1.5]), 2.0, fraction_bits(np.float32))
    assert dual_value(nu, np.float32).tolist() == [0.5, -3.0]
    assert dual_value(nu, np.float32).dtype == np.float32
    assert dual_value(nu << 12, np.float64).tolist() == [0.5, -3.0]


def test_a_federation_of_another_type_has_no_duals() -> None:
    with pytest.raises(ConfigError, match="float16 have no fixed-point duals; use float32"):
        fraction_bits(np.float16)


@settings(derandomize=True, database=None)
@given(
    norm=st.floats(0.0, 1e30),
    bound=st.floats(0.0, 1e30),
)
def test_a_clip_factor_is_the_largest_that_keeps_the_bound(norm: float, bound: float) -> None:
    factor = clip_factor(norm, bound)
    assert 0 <= factor <= WHOLE
    assert norm * (factor / WHOLE) <= bound * (1 + 1e-15)
    assert factor == WHOLE or norm * ((factor + 1) / WHOLE) > bound * (1 - 1e-15)


def test_a_float32_difference_is_scaled_without_rounding() -> None:
    difference = np.random.default_rng(0).normal(size=100).astype(np.float32)
    for factor in (1, 12345, WHOLE):
        exact = [Fraction(float(entry)) * factor / WHOLE for entry in difference]
        assert [Fraction(float(entry)) for entry in scaled(difference, factor)] == exact


def test_the_largest_entry_of_int64_has_no_int64_magnitude() -> None:
    assert largest(np.array([-(2**63), 5])) == 2**63
    assert largest(np.array([], np.int64)) == 0


@settings(derandomize=True, database=None)
@given(terms=st.lists(st.tuples(st.integers(-(2**40), 2**40), st.integers(-1000, 1000)), max_size=20))
def test_a_sum_stays_within_its_bound_and_a_look_makes_the_bound_tight(terms: list[tuple[int, int]]) -> None:
    total = ExactSum(np.zeros(1, np.int64))
    for entry, factor in terms:
        total.add(np.array([entry]), factor, abs(entry))
    exact = sum(entry * factor for entry, factor in terms)
    assert total.values.tolist() == [exact]
    assert abs(exact) <= total.bound
    assert total.look() == total.bound == abs(exact)

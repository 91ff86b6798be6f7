import math
import subprocess
import sys

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from fedeq_edge.consensus import METHODS, dual_step, scaled
from fedeq_edge.consensus.fixed import WHOLE
from fedeq_edge.consensus.privacy import Accountant, Privacy, clip_factor, fixed_cohort, noised, poisson_cohort
from fedeq_edge.errors import ConfigError

KEY = bytes(range(32))
differences = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20).map(
    lambda drawn: np.array(drawn, np.float32)
)


def squared_norm(step: np.ndarray) -> int:
    """Exact: python integers."""
    return sum(int(value) ** 2 for value in step)


# ---- clipping ----------------------------------------------------------------------------------------------


@given(difference=differences, kappa=st.sampled_from([2.0**-20, 0.25, 1.0]), bound=st.integers(1, 2**46))
def test_no_dual_moves_farther_than_the_bound(difference: np.ndarray, kappa: float, bound: int) -> None:
    factor = clip_factor(dual_step(difference, kappa, 32), bound)
    assert squared_norm(dual_step(scaled(difference, factor), kappa, 32)) <= bound**2


def test_a_step_within_the_bound_passes_untouched() -> None:
    step = np.array([3, -4], np.int64) * 2**20
    assert clip_factor(step, 5 * 2**20 + 1) == WHOLE
    assert clip_factor(np.zeros(2, np.int64), 1) == WHOLE


def test_the_factor_is_the_largest_that_surely_fits() -> None:
    difference = np.array([3.0, -4.0], np.float32)
    factor = clip_factor(dual_step(difference, 1.0, 32), 2**32)
    assert factor == WHOLE // 5
    assert squared_norm(dual_step(scaled(difference, factor + 1), 1.0, 32)) > 2**64


# ---- noise -------------------------------------------------------------------------------------------------


def noise(std: float, size: int = 100_001, round_number: int = 0) -> np.ndarray:
    return noised(np.zeros(size, np.int64), std, key=KEY, round_number=round_number)


@pytest.mark.parametrize("std", [3.0, 2.0**33])
def test_the_noise_is_gaussian_with_its_std_within_chi_square_bounds(std: float) -> None:
    drawn = noise(std).astype(np.float64)
    low, high = stats.chi2.ppf([1e-6, 1 - 1e-6], drawn.size)
    # rounding to whole units adds the variance of a uniform unit (Sheppard), 1/12
    assert low < (drawn**2).sum() / (std**2 + 1 / 12) < high
    assert abs(drawn.mean()) < 5 * std / math.sqrt(drawn.size)
    assert abs((np.abs(drawn) > 3 * std + 0.5).mean() - 2 * stats.norm.sf(3 + 0.5 / std)) < 8e-4
    assert abs(stats.kurtosis(drawn)) < 6 * math.sqrt(24 / drawn.size)


def test_large_noise_passes_kolmogorov_and_smirnov_and_its_values_are_uncorrelated() -> None:
    drawn = noise(2.0**33) / 2.0**33
    assert stats.kstest(drawn, "norm").pvalue > 1e-4
    half = drawn.size // 2
    for lag in (1, half, half + 1):  # neighbours, and the two values of one Box-Muller pair
        assert abs(np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1]) < 5 / math.sqrt(drawn.size - lag)


def test_the_same_sum_of_the_same_round_is_published_again_and_any_other_with_fresh_noise() -> None:
    total = np.arange(1000, dtype=np.int64)
    first = noised(total, 1e6, key=KEY, round_number=4)
    assert np.array_equal(first, noised(total, 1e6, key=KEY, round_number=4))
    retracted = total.copy()
    retracted[0] -= 1
    for other, key, number in ((retracted, KEY, 4), (total, KEY[::-1], 4), (total, KEY, 5)):
        fresh = noised(other, 1e6, key=key, round_number=number) - other
        assert abs(np.corrcoef(fresh, first - total)[0, 1]) < 5 / math.sqrt(1000)


# ---- the accountant ----------------------------------------------------------------------------------------


def epsilon(rate: float, noise_multiplier: float, rounds: int, delta: float = 1e-5) -> float:
    privacy = Privacy(clip=1.0, noise_multiplier=noise_multiplier, delta=delta)
    return Accountant(privacy).epsilon(planned=rounds, rate=rate)


@pytest.mark.parametrize(
    ("rate", "noise_multiplier", "rounds", "published"),
    [
        (0.01, 4.0, 10_000, 1.26),  # Abadi et al. 2016 (arXiv 1607.00133), figure 2: moments accountant, 100 epochs
        (256 / 60_000, 1.3, 4687, 1.34),  # Bu et al. 2020, Harvard Data Science Review, figure 4: 20 epochs
        (256 / 60_000, 0.7, 16_406, 8.68),  # the same, 70 epochs
    ],
)
def test_epsilon_is_that_of_published_runs_less_what_later_conversions_gained(
    rate: float, noise_multiplier: float, rounds: int, published: float
) -> None:
    """The papers turn Renyi into (epsilon, delta) by Mironov 2017; Canonne et al. 2020 gain 10 to 20 %."""
    assert 0.75 * published < epsilon(rate, noise_multiplier, rounds) < published


@pytest.mark.parametrize(("noise_multiplier", "rounds"), [(1.0, 1), (5.0, 20), (20.0, 100)])
def test_without_sampling_epsilon_is_just_above_the_exact_one_of_gaussian_noise(
    noise_multiplier: float, rounds: int
) -> None:
    """Balle and Wang 2018 (arXiv 1805.06530), theorem 8: composed Gaussians are one Gaussian."""
    mu = math.sqrt(rounds) / noise_multiplier

    def excess(candidate: float) -> float:
        tail = stats.norm.cdf(mu / 2 - candidate / mu) - math.exp(candidate) * stats.norm.cdf(-mu / 2 - candidate / mu)
        return float(tail) - 1e-5

    exact = optimize.root_scalar(excess, bracket=(1e-3, 100.0)).root
    assert exact < epsilon(1.0, noise_multiplier, rounds) < 1.15 * exact


def test_recorded_rounds_and_planned_ones_spend_alike_and_survive_a_restart() -> None:
    privacy = Privacy(clip=1.0, noise_multiplier=1.0)
    accountant = Accountant(privacy)
    assert accountant.epsilon() == 0.0
    for rate in (0.1, 0.1, 0.2):
        accountant.record(rate)
    restarted = Accountant(privacy, accountant.history)
    restarted.record(0.1)
    assert accountant.epsilon(planned=1, rate=0.1) == restarted.epsilon() > accountant.epsilon() > 0.0
    assert accountant.history == {0.1: 2, 0.2: 1}


def test_a_cohort_of_fixed_size_counts_one_device_in_place_of_another() -> None:
    """Everybody asked: replacing a device moves the sum by twice the bound, as if half the noise had been added."""
    fixed = Privacy(clip=1.0, noise_multiplier=4.0, sampling="fixed")
    everybody = Accountant(fixed).epsilon(planned=5, rate=1.0)
    assert everybody == pytest.approx(epsilon(1.0, 2.0, 5))
    assert epsilon(0.1, 4.0, 5) < Accountant(fixed).epsilon(planned=5, rate=0.1) < everybody


@settings(max_examples=8, deadline=None)
@given(rate=st.floats(0.001, 1.0), rounds=st.integers(1, 500))
def test_more_rounds_more_of_the_fleet_or_less_noise_never_cost_less(rate: float, rounds: int) -> None:
    spent = epsilon(rate, 2.0, rounds)
    assert epsilon(rate, 2.0, rounds + 1) >= spent
    assert epsilon(min(1.0, rate * 1.5), 2.0, rounds) >= spent
    assert epsilon(rate, 1.5, rounds) >= spent


# ---- cohorts and settings ----------------------------------------------------------------------------------


def test_a_poisson_cohort_asks_each_device_by_itself_and_is_the_same_after_a_restart() -> None:
    fleet = [f"d{number}" for number in range(20_000)]
    cohort = poisson_cohort(fleet, 0.1, key=KEY, round_number=3)
    assert cohort == poisson_cohort(fleet, 0.1, key=KEY, round_number=3)
    assert abs(len(cohort) - 2000) < 5 * math.sqrt(20_000 * 0.1 * 0.9)
    both = set(cohort) & set(poisson_cohort(fleet, 0.1, key=KEY, round_number=4))
    assert abs(len(both) - 200) < 5 * math.sqrt(20_000 * 0.01 * 0.99)
    assert poisson_cohort(fleet, 1.0, key=KEY, round_number=0) == tuple(fleet)


def test_a_cohort_of_fixed_size_is_uniform_and_the_same_after_a_restart() -> None:
    fleet = [f"d{number}" for number in range(10)]
    drawn = [fixed_cohort(fleet, 3, key=KEY, round_number=number) for number in range(2000)]
    assert drawn == [fixed_cohort(fleet[::-1], 3, key=KEY, round_number=number) for number in range(2000)]
    assert {len(set(cohort)) for cohort in drawn} == {3}
    counts = np.array([sum(device in cohort for cohort in drawn) for device in fleet])
    assert np.abs(counts - 600).max() < 5 * math.sqrt(2000 * 0.3 * 0.7)


def test_a_draw_tells_the_rate_and_the_size_that_is_expected() -> None:
    fleet = ["a", "b", "c"]
    _, poisson = Privacy(clip=1.0, noise_multiplier=1.0).draw(fleet, 0.5, key=KEY, round_number=1)
    assert (poisson.rate, poisson.expected) == (0.5, 1.5)
    fixed = Privacy(clip=1.0, noise_multiplier=1.0, sampling="fixed")
    cohort, draw = fixed.draw(fleet, 0.1, key=KEY, round_number=1)
    assert (len(cohort), draw.expected) == (1, 1.0)
    assert draw.rate == pytest.approx(1 / 3)  # of three, not the tenth that nobody can be


def test_the_bound_is_the_clip_in_units_of_a_dual_step() -> None:
    privacy = Privacy(clip=2.0, noise_multiplier=1.0)
    assert privacy.bound(0.25, 32) == 2**31
    with pytest.raises(ConfigError, match=r"clip 2\.0 times kappa 1e-20"):
        privacy.bound(1e-20, 32)
    with pytest.raises(ConfigError, match="noise and bound lie between"):
        privacy.bound(1.0, 60)


def test_methods_whose_sums_no_bound_holds_are_refused_by_name() -> None:
    privacy = Privacy(clip=1.0, noise_multiplier=1.0)
    for name in ("fedavg", "fedprox", "fedper", "fedrep", "ditto", "fedeq-published"):
        privacy.check(METHODS[name])
    with pytest.raises(ConfigError, match="server = 'fresh'"):
        privacy.check(METHODS["admm"])
    with pytest.raises(ConfigError, match="quality"):
        privacy.check(METHODS["quality-average"])
    with pytest.raises(ConfigError, match='set robust = "none"'):
        privacy.check(msgspec.structs.replace(METHODS["fedavg"], robust="median"))
    with pytest.raises(ConfigError, match=r"clip 1\.0 times kappa 1e-11 is 0 units"):
        privacy.check(msgspec.structs.replace(METHODS["fedavg"], rho=1e-11))


@pytest.mark.parametrize(
    "fields",
    [{"clip": 0.0}, {"clip": math.inf}, {"noise_multiplier": -1.0}, {"noise_multiplier": math.nan}, {"delta": 1.0}],
    ids=str,
)
def test_promises_that_mean_nothing_are_refused_and_named(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        Privacy(**{"clip": 1.0, "noise_multiplier": 1.0, **fields})  # type: ignore[arg-type]  # floats all


@pytest.mark.parametrize("rate", [0.0, 1.5, math.nan])
def test_a_sampling_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match="sampling rate"):
        Accountant(Privacy(clip=1.0, noise_multiplier=1.0)).record(rate)


def test_the_settings_load_without_the_accountants_libraries() -> None:
    code = "import sys, fedeq_edge.consensus.privacy; print({'dp_accounting', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

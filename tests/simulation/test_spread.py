"""Numbers over seeds, and which differ by more than chance: against the closed forms."""

import math
import statistics

import pytest

from fedeq_edge.simulation.spread import Spread, spread, standings

scipy_stats = pytest.importorskip("scipy.stats")


def test_a_spread_is_of_the_runs_that_have_the_number() -> None:
    values = [0.9, None, 0.94, 0.95]
    known = [0.9, 0.94, 0.95]
    found = spread(values)
    assert found.mean == pytest.approx(statistics.fmean(known))
    assert found.sd == pytest.approx(statistics.stdev(known))
    assert found.runs == 3


def test_one_run_has_no_spread_and_none_has_no_mean() -> None:
    assert spread([0.5, None]) == Spread(mean=0.5, sd=None, runs=1)
    assert spread([None]) == Spread(mean=None, sd=None, runs=0)


@pytest.mark.parametrize("runs", [2, 3, 4, 6])
def test_noise_between_two_of_equal_spread_is_that_of_students_test(runs: int) -> None:
    first, second = ([base + 0.01 * (-1) ** i for i in range(runs)] for base in (0.9, 0.8))
    pooled = statistics.variance(first) / 2 + statistics.variance(second) / 2
    t = scipy_stats.t.ppf(0.975, 2 * runs - 2)
    noise = standings({"a": first, "b": second})["b"].noise
    assert noise == pytest.approx(t * math.sqrt(2 * pooled / runs), rel=1e-3)


def test_a_difference_within_noise_is_a_tie_and_a_larger_one_is_not() -> None:
    found = standings({"a": [0.90, 0.92, 0.91], "b": [0.905, 0.915, 0.90], "c": [0.5, 0.51, 0.52]})
    assert {name: one.verdict for name, one in found.items()} == {"a": "best", "b": "tied", "c": "behind"}
    assert found["c"].difference == pytest.approx(0.4)


def test_two_seeds_that_happen_to_agree_make_no_winner_where_others_spread() -> None:
    lucky = {"a": [0.910, 0.9101], "b": [0.900, 0.9001]}
    assert standings(lucky)["b"].verdict == "behind"
    among_others = {**lucky, "c": [0.87, 0.90], "d": [0.86, 0.90], "e": [0.88, 0.905]}
    assert standings(among_others)["b"].verdict == "tied"


def test_with_one_seed_each_nothing_is_known_but_an_exact_tie() -> None:
    found = standings({"a": [0.9], "b": [0.8], "c": [0.9]})
    assert {name: one.verdict for name, one in found.items()} == {"a": "best", "b": "unknown", "c": "tied"}
    assert found["b"].noise is None


def test_the_same_answers_for_every_seed_are_ahead_of_others_without_any_noise() -> None:
    found = standings({"a": [0.9, 0.9], "b": [0.8, 0.8], "c": [0.9, 0.9]})
    assert [found[name].verdict for name in "abc"] == ["best", "behind", "tied"]
    assert found["b"].noise == 0.0

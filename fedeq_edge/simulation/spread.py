"""Numbers over seeds: their mean and spread, and which of them differ by more than chance makes them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

# Student's t, two-sided 95 %, by degrees of freedom; between two of them the larger value holds.
_T: Final = {
    1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
    12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980,
}  # fmt: skip  # a table reads as one
# Two means of shares closer than this come from the same answers: float noise, far below one sample.
_TIE: Final = 1e-9

Verdict = Literal["best", "tied", "behind", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Of the runs that have a number: mean, standard deviation (sample's, None of one run), how many they are."""

    mean: float | None
    sd: float | None
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How one stands to the best. difference: what its mean lacks, from 0; noise: what chance alone may make of it.

    tied: no more than noise; unknown: nobody ran twice, so that noise is None.
    """

    verdict: Verdict
    difference: float
    noise: float | None


def spread(values: Sequence[float | None]) -> Spread:
    """Of the values that are there."""
    told = [float(value) for value in values if value is not None]
    if not told:
        return Spread(mean=None, sd=None, runs=0)
    mean = math.fsum(told) / len(told)
    sd = math.sqrt(_squares(told) / (len(told) - 1)) if len(told) > 1 else None
    return Spread(mean=mean, sd=sd, runs=len(told))


def standings(values: Mapping[str, Sequence[float]]) -> dict[str, Standing]:
    """Each beside the one with the highest mean; values: by name, at least one a name.

    Noise is t s sqrt(1/n + 1/m) for n and m runs, with t of Student's distribution, two-sided 95 %. s is the spread
    within all names together: two or three runs say little about the spread of one. Where the two compared spread more
    than that, theirs counts. Runs of one seed are taken as independent, which makes noise rather too large.
    """
    if not values:
        return {}
    means = {name: math.fsum(found) / len(found) for name, found in values.items()}
    best = max(means, key=lambda name: means[name])
    freedom = sum(len(found) - 1 for found in values.values())
    common = sum(map(_squares, values.values())) / freedom if freedom else 0.0

    def standing(name: str) -> Standing:
        difference = means[best] - means[name]
        noise = _noise(values[best], values[name], common, freedom) if freedom else None
        if name == best:
            return Standing(verdict="best", difference=0.0, noise=None)
        return Standing(verdict=_verdict(difference, noise), difference=difference, noise=noise)

    return {name: standing(name) for name in values}


def _verdict(difference: float, noise: float | None) -> Verdict:
    if difference <= _TIE:
        return "tied"
    if noise is None:
        return "unknown"
    return "tied" if difference <= noise else "behind"


def _noise(best: Sequence[float], other: Sequence[float], common: float, freedom: int) -> float:
    """common: variance within all, with so many degrees of freedom, at least 1."""
    own = len(best) + len(other) - 2
    theirs = (_squares(best) + _squares(other)) / own if own else 0.0
    variance = max(common, theirs) * (1 / len(best) + 1 / len(other))
    return _T[max(known for known in _T if known <= freedom)] * math.sqrt(variance)


def _squares(values: Sequence[float]) -> float:
    """Sum of squared distances from the mean."""
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values)

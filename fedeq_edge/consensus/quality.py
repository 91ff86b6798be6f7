"""Quality weights: how well a device solves its fixed points, and what that changes in the consensus.

q_i in [1/4, 4], around 1 over the fleet, multiplies the weight omega_i, the penalty kappa_i, or a part of each.
The share of the data belongs to n_i, never to q_i. Source: algorithm.md, section 4, "Quality weights" (ours, after
the weighted average of DEQ-FL, arXiv 2305.18646, which it corrects).
"""

import math
from typing import Literal, NamedTuple

from fedeq_edge.consensus.fixed import fixed_penalty

Rule = Literal["residual", "iterations", "uniform"]
Weighting = Literal["metric", "objective", "blend"]

SMALLEST = 0.25
"""Least q: a weak device still moves the consensus."""
LARGEST = 4.0
"""Largest q: q is reported by the device itself, and this bounds what a liar gains."""
QUALITY_ONE = 256
"""q^a = 1 as an int, where the weight omega holds q."""
MEMORY = 0.9
"""Share of the old q that a new report leaves: one noisy epoch must not move kappa much."""


class Weights(NamedTuple):
    """omega: weight in the objective, an integer up to the common factor. penalty: kappa in units of 2^-32."""

    omega: int
    penalty: int


def score(rule: Rule, *, residual: float, backward_residual: float, forward: int, r0: float) -> float:
    """Score s_i >= 0 of one device's last local epoch; only ratios between devices matter.

    residual: 1 / (1 + (r/r0)^2 + (b/r0)^2) of the forward and the backward relative residual; a residual that is
    not a number scores 0, as the worst. iterations: s_i = K_i, the forward budget. uniform: 1.
    """
    if rule == "uniform":
        return 1.0
    if rule == "iterations":
        return float(forward)
    squares = (residual / r0) ** 2 + (backward_residual / r0) ** 2
    return 0.0 if math.isnan(squares) else 1.0 / (1.0 + squares)


def moved(quality: float, score: float, mean_score: float) -> float:
    """q_i after a report: a step of 1 - MEMORY towards clip(s_i / mean_j s_j); stays in [SMALLEST, LARGEST].

    mean_score is over the last scores of the fleet; where it is 0 nobody is better than another and the aim is 1.
    """
    relative = score / mean_score if mean_score > 0.0 else 1.0
    aim = min(max(relative, SMALLEST), LARGEST)
    return MEMORY * quality + (1.0 - MEMORY) * aim


def weights(samples: int, quality: float, *, rho: float, exponent: float) -> Weights:
    """omega_i = n_i q_i^a and kappa_i = rho q_i^(1-a), with a the `exponent`: 0 metric, 1 objective, else blend.

    The problem solved is sum n_i q_i^a F_i. n_i stands for p_i = n_i / sum n: the server's formulas do not change
    when all omega_i have a common factor, and without the sum a newcomer leaves everybody else's omega_i alone.
    Both are integers, as sums of integers are exact: q_i^a counts in 1/256, which is finer than a score is known.
    """
    share = 1 if exponent == 0.0 else round(QUALITY_ONE * quality**exponent)
    return Weights(omega=samples * share, penalty=fixed_penalty(rho * quality ** (1.0 - exponent)))

"""The order of a round's work: learning rate, batches and budgets, alike on every backend (numpy only)."""

import math
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.training.step import Plan


def learning_rate(plan: Plan, completed: int, *, rounds: int | None = None) -> float:
    """Step size after `completed` of `rounds` (None: the plan's): half a cosine from `learning_rate` to
    `learning_rate * final_rate`.
    """
    share = min(completed / (rounds or plan.rounds), 1.0)
    cosine = 0.5 * (1.0 + math.cos(math.pi * share))
    return plan.learning_rate * (plan.final_rate + (1.0 - plan.final_rate) * cosine)


def steps_per_epoch(samples: int, batch: int) -> int:
    """Batches in one pass over `samples` >= 1; a rest of at most half a batch waits for the next shuffle."""
    return max(1, math.ceil((samples - batch // 2) / batch))


def batches(samples: int, batch: int, epochs: int, generator: np.random.Generator) -> list[NDArray[np.int64]]:
    """Row numbers of each batch, `epochs * steps_per_epoch` arrays; every epoch is shuffled anew."""
    starts = range(0, steps_per_epoch(samples, batch) * batch, batch)
    order = (generator.permutation(samples) for _ in range(epochs))
    return [rows[start : start + batch] for rows in order for start in starts]


def draw_forward(menu: Sequence[int], cap: int, generator: np.random.Generator) -> int:
    """K for one batch, uniform over the entries of the ascending `menu` up to `cap` >= menu[0].

    Mixing keeps one model accurate at every budget of the menu (algorithm.md, "Practice").
    """
    allowed = bisect_right(menu, cap)
    return menu[int(generator.integers(allowed))]

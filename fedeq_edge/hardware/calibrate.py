"""Measure what one training step of this model costs on this device."""

import time
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.hardware.clock import Clock, DeviceClock
from fedeq_edge.training.step import Calibration

Step = Callable[[int, int], None]
"""Runs one training step with K forward evaluations and k adjoint terms."""

# More repeats than this no longer move a median; small models would otherwise fill the whole time cap.
MOST_SWEEPS = 15


def calibrate(
    step: Step, batch: int, budgets: Sequence[int], *, clock: Clock | None = None, limit_s: float = 1.0
) -> Calibration:
    """Cost of a step as  fixed + K * evaluation + k * adjoint  device seconds, by least squares over medians.

    budgets: the fleet's menu of K, ascending or not; its ends and middle are measured, each without and with
    adjoint terms. limit_s: host seconds after which no further sweep begins (one sweep is always completed).
    """
    tick = DeviceClock() if clock is None else clock
    points = _points(budgets)
    for K, k in points:  # caches, allocator pools and lazy initialisation are not what a round pays
        step(K, k)
    costs = _sweep(step, points, tick, limit_s)
    fixed_s, evaluation_s, adjoint_s = _nonnegative_fit(points, costs)
    slowdown = tick.slowdown if isinstance(tick, DeviceClock) else 1.0
    return Calibration(batch=batch, fixed_s=fixed_s, evaluation_s=evaluation_s, adjoint_s=adjoint_s, slowdown=slowdown)


def _points(budgets: Sequence[int]) -> list[tuple[int, int]]:
    menu = sorted(set(budgets))
    # One K alone could not tell the fixed part from the evaluations.
    ks = sorted({menu[0], menu[len(menu) // 2], menu[-1]}) if len(menu) > 1 else [menu[0], 2 * menu[0] + 1]
    return [(K, k) for K in ks for k in (0, max(1, K // 2))]


def _sweep(step: Step, points: list[tuple[int, int]], clock: Clock, limit_s: float) -> NDArray[np.float64]:
    """Median device seconds per point, (points,); interleaved, so that a slow moment hits all points alike."""
    ends = time.monotonic() + limit_s
    sweeps: list[list[float]] = []
    while not sweeps or (len(sweeps) < MOST_SWEEPS and time.monotonic() < ends):
        sweeps.append([_timed(step, K, k, clock) for K, k in points])
    return np.asarray(np.median(np.array(sweeps), axis=0), dtype=np.float64)


def _timed(step: Step, K: int, k: int, clock: Clock) -> float:
    began = clock()
    step(K, k)
    return clock() - began


def _nonnegative_fit(points: list[tuple[int, int]], costs: NDArray[np.float64]) -> tuple[float, float, float]:
    """Least squares with all three costs >= 0: the best feasible one of the unconstrained fits over subsets.

    With three unknowns the seven subsets are all the active sets there are, so this is exact.
    """
    design = np.array([(1.0, K, k) for K, k in points])
    best, least = np.zeros(3), np.inf
    for size in (3, 2, 1):
        for columns in map(list, combinations(range(3), size)):
            candidate = np.zeros(3)
            candidate[columns] = np.linalg.lstsq(design[:, columns], costs, rcond=None)[0]
            error = float(np.sum((design @ candidate - costs) ** 2))
            if candidate.min() >= 0 and error < least:
                best, least = candidate, error
    return float(best[0]), float(best[1]), float(best[2])

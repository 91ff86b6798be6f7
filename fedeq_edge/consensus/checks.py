"""What cannot enter a sum without spoiling it for everybody is refused here, before anything has changed."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.consensus.fixed import (
    SUM_LIMIT,
    ExactSum,
    FixedVector,
    FloatVector,
    fixed_penalty,
    largest,
    penalty_of,
)
from fedeq_edge.consensus.records import PartialSum, Share
from fedeq_edge.errors import ContributionError

_SAMPLES_LIMIT = 2**32
"""n_i stays below, so that the product with a quality is an int64 factor."""


def check_samples(device: str, samples: int) -> None:
    """n_i = `samples` is a weight. Raises ContributionError "no_samples"."""
    if not 1 <= samples < _SAMPLES_LIMIT:
        raise ContributionError("no_samples", f"device {device}: {samples} training samples; it needs at least 1")


def check_score(device: str, score: float) -> None:
    """s_i = `score` can move a quality. Raises ContributionError "bad_score"."""
    if not (score >= 0.0 and math.isfinite(score)):
        raise ContributionError("bad_score", f"device {device}: quality score {score} is no finite number >= 0")


def checked_penalty(device: str, kappa: float) -> int:
    """kappa 2^32, exact. Raises ContributionError "bad_penalty"."""
    if not (kappa > 0.0 and math.isfinite(kappa) and penalty_of(fixed_penalty(kappa)) == kappa):
        raise ContributionError(
            "bad_penalty", f"device {device}: penalty {kappa} is no finite multiple of 2^-32 above 0; send the task's"
        )
    return fixed_penalty(kappa)


def check_shape(whose: str, vector: NDArray[Any], size: int) -> None:
    """`vector` has shape (size,). Raises ContributionError "wrong_shape"."""
    if vector.shape != (size,):
        raise ContributionError(
            "wrong_shape",
            f"{whose}: vector of shape {vector.shape}, expected {(size,)}; was it started with another model file?",
        )


def exact_difference(device: str, difference: FloatVector, z_hat: FloatVector) -> NDArray[np.float64]:
    """The values of `difference` in the type of z_hat, (p,). Raises ContributionError "wrong_shape", "not_finite"."""
    check_shape(f"device {device}", difference, z_hat.size)
    if not np.isfinite(difference).all():
        raise ContributionError("not_finite", f"device {device}: vector holds NaN or infinity; its training diverged")
    return difference.astype(z_hat.dtype, copy=False).astype(np.float64)


def square(device: str, exact: NDArray[np.float64]) -> float:
    """|d|^2, by numpy's own sum: that of BLAS would depend on the number of threads.

    Raises ContributionError "too_large".
    """
    with np.errstate(over="ignore"):
        total = float(np.square(exact).sum())
    if not math.isfinite(total):
        raise ContributionError("too_large", f"device {device}: the norm of its step overflows; its training diverged")
    return total


def check_dual(device: str, nu: FixedVector, omega: int, size: int) -> None:
    """omega nu can be a term of H. Raises ContributionError "wrong_shape" or "too_large"."""
    check_shape(f"device {device}", nu, size)
    if nu.dtype != np.int64 or omega * largest(nu) >= SUM_LIMIT:
        raise ContributionError(
            "too_large", f"device {device}: omega nu is no int64 vector below 2^62; let it join without a dual"
        )


def check_sum(partial: PartialSum, size: int) -> None:
    """A `PartialSum` of (size,) int64 with a weight and devices. Raises ContributionError "bad_sum"."""
    fits = partial.steps.shape == (size,) and partial.steps.dtype == np.int64
    if not (fits and partial.weight > 0 and partial.squares >= 0 and partial.devices):
        raise ContributionError(
            "bad_sum",
            f"sum over {len(partial.devices)} devices: {partial.steps.dtype} vector of shape {partial.steps.shape} "
            f"with weight {partial.weight}; expected int64 of shape {(size,)} and a weight above 0",
        )


def check_share(worker: str, share: Share, size: int) -> None:
    """Vectors (size,), and nothing below 0. Raises ContributionError "wrong_shape" or "bad_sum"."""
    check_shape(f"share of worker {worker}", share.steps, size)
    check_shape(f"share of worker {worker}", share.duals, size)
    if not (share.weight >= 0 and share.squares >= 0 and share.penalties >= 0):
        raise ContributionError("bad_sum", f"worker {worker}: a weight in its share is below 0; update it")


def checked_total(vectors: Sequence[FixedVector], size: int) -> FixedVector:
    """The sum of the workers' vectors, (size,). Raises ContributionError "too_large"."""
    magnitudes = sum((np.abs(vector.astype(np.float64)) for vector in vectors), np.zeros(size))
    if magnitudes.max() > SUM_LIMIT:  # as float64, as in `check_room`
        raise ContributionError("too_large", "the sum of all shares would leave 62 bits; did a training diverge?")
    return sum(vectors, np.zeros(size, np.int64))


def check_room(where: str, sums: Sequence[ExactSum], vector: FixedVector, factor: int, magnitude: int) -> None:
    """The total of `sums` has room for factor vector, all (p,); where their bounds left it open, they are tight now.

    magnitude: no entry of `vector` is larger. Raises ContributionError "too_large".
    """
    if sum(part.bound for part in sums) + abs(factor) * magnitude < SUM_LIMIT:
        return
    total = sum((part.values for part in sums), np.zeros(vector.size)) + factor * vector.astype(np.float64)
    if np.abs(total).max() > SUM_LIMIT:  # as float64, which cannot wrap; its rounding is far from int64's limit
        raise ContributionError(
            "too_large", f"{where}: the weighted sum of the duals would leave 62 bits; did the training diverge?"
        )
    for part in sums:
        part.look()

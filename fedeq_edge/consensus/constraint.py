"""The convex set of well-posed cells, and the projection onto it.

A cell act(W z + U x + b) with a 1-Lipschitz activation contracts in the maximum norm when every row of W lies
in the l1 ball of a radius below 1 (algorithm.md, section 1a). The set is convex, so averages of well-posed
cells stay inside; the dual step H / R does not, which is why the server projects after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.errors import ConfigError

FloatArray = NDArray[np.floating]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBound:
    """Each row of the row-major (rows, cols) block at `offset` of a flat vector has l1 norm <= `radius`, > 0."""

    offset: int
    rows: int
    cols: int
    radius: float

    def __post_init__(self) -> None:
        if self.offset < 0 or self.rows < 1 or self.cols < 1 or not 0.0 < self.radius < np.inf:
            raise ConfigError(
                f"{self} describes no block; give offset >= 0, rows and cols >= 1 and a finite radius > 0"
            )


def project(vector: FloatArray, bounds: Sequence[RowBound]) -> None:
    """Move every bounded row of `vector`, contiguous (p,), to the nearest point of its l1 ball, in place.

    Rows already inside keep their bits; a float32 row may exceed the radius by its rounding.
    Raises ConfigError when a bound reaches past the end of the vector.
    Source: Duchi, Shalev-Shwartz, Singer, Chandra, ICML 2008, figure 1.
    """
    for bound in bounds:
        block = _block(vector, bound)
        outside = np.abs(block).sum(axis=1) > bound.radius
        if outside.any():
            block[outside] = _onto_l1_balls(block[outside], bound.radius)


def row_norms(vector: FloatArray, bound: RowBound) -> FloatArray:
    """l1 norm of each row of the block, shape (rows,). Raises ConfigError when the block does not fit."""
    norms: FloatArray = np.abs(_block(vector, bound)).sum(axis=1)
    return norms


def feasible(vector: FloatArray, bounds: Sequence[RowBound], *, tolerance: float = 1e-6) -> bool:
    """Whether every bounded row has l1 norm <= radius * (1 + tolerance); the default allows for float32."""
    return all(bool((row_norms(vector, bound) <= bound.radius * (1 + tolerance)).all()) for bound in bounds)


def _block(vector: FloatArray, bound: RowBound) -> FloatArray:
    """The block as a view, so that writing to it writes to the vector."""
    end = bound.offset + bound.rows * bound.cols
    if end > vector.size:
        raise ConfigError(
            f"{bound} ends at {end}, but the vector has {vector.size} entries; "
            "give the bounds of the model that the vector came from"
        )
    return vector[bound.offset : end].reshape(bound.rows, bound.cols)


def _onto_l1_balls(rows: FloatArray, radius: float) -> FloatArray:
    """Soft-threshold rows, shape (n, cols) and all outside the ball, by the shifts that put them on the sphere."""
    # float64 whatever comes in: the cumulative sum of a wide float32 row loses digits that the shift needs
    magnitude = np.abs(rows.astype(np.float64))
    descending = -np.sort(-magnitude, axis=1)
    ranks = np.arange(1, rows.shape[1] + 1)
    shifts = (np.cumsum(descending, axis=1) - radius) / ranks
    kept = (descending > shifts).sum(axis=1)  # >= 1 as every row is outside
    shift = np.take_along_axis(shifts, kept[:, None] - 1, axis=1)
    projected: FloatArray = np.sign(rows) * np.maximum(magnitude - shift, 0.0)
    return projected

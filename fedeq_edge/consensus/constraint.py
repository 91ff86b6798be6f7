"""Convex sets of well-posed weights, and the nearest point of each.

What is fused is the weight itself, and every set here is convex: an average of weights that are well posed is well
posed (algorithm.md, section 1). The dual step H / R is no average, which is why the server projects after it.
Why each set makes a cell well posed: deq/wellposed.py. Distances are Frobenius', the arithmetic is float64 whatever the
vector holds. A projection aims inside its set by what the rounding to the vector's type can add: float32 weights end
inside, and a second projection leaves their bits alone; float64 weights end inside to float64's rounding.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.errors import ConfigError

FloatArray = NDArray[np.floating]
Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint(ABC):
    """The block of `shape`, row-major, at `offset` of a flat vector has level at most `radius`, > 0."""

    offset: int
    radius: float

    def __post_init__(self) -> None:
        if self.offset < 0 or min(self.shape) < 1 or not 0.0 < self.radius < np.inf:
            raise ConfigError(
                f"{self} describes no block; give offset >= 0, sizes of at least 1 and a finite radius > 0"
            )

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the block."""

    @abstractmethod
    def level(self, block: Matrix) -> float:
        """The convex function of the block that `radius` bounds."""

    @abstractmethod
    def nearest(self, block: Matrix, epsilon: float) -> Matrix:
        """The nearest block inside, where `epsilon` is the spacing of 1 in the type that will store it.

        `block` itself comes back where it is inside already.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBound(Constraint):
    """Every row of a matrix (rows, cols) lies in an l1 ball: the largest absolute row sum, |.|_inf, is bounded.

    Projection: Duchi, Shalev-Shwartz, Singer, Chandra, ICML 2008, figure 1.
    """

    rows: int
    cols: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, cols)."""
        return self.rows, self.cols

    def level(self, block: Matrix) -> float:
        """Largest l1 norm of a row."""
        return float(np.abs(block).sum(axis=1).max())

    def nearest(self, block: Matrix, epsilon: float) -> Matrix:
        """Rows outside their ball are soft-thresholded onto it."""
        outside = np.abs(block).sum(axis=1) > self.radius
        if not outside.any():
            return block
        target = self.radius * (1.0 - epsilon)
        if outside.all():  # as while training: spares two copies
            return _onto_l1_balls(block, target)
        moved = block.copy()
        moved[outside] = _onto_l1_balls(block[outside], target)
        return moved


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralBound(Constraint):
    """The largest singular values of a layer's taps (rows, cols, taps) add up to no more than the radius.

    A dense matrix has one tap. For a convolution the sum bounds the L2 operator norm at every size of the state,
    zero-padded or not, since a shift of the state has norm 1; unlike the norm at one size it has an exact projection:
    singular vectors stay, and the singular values (taps, rank) go onto an l1,infinity ball.
    """

    rows: int
    cols: int
    taps: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, cols, taps)."""
        return self.rows, self.cols, self.taps

    def level(self, block: Matrix) -> float:
        """Sum over the taps of their largest singular values."""
        return float(np.linalg.norm(block, 2, axis=(0, 1)).sum())

    def nearest(self, block: Matrix, epsilon: float) -> Matrix:
        """Each tap's singular values are clipped at a cap of its own; the caps add up to the radius."""
        if np.linalg.norm(block, axis=(0, 1)).sum() <= self.radius:  # Frobenius bounds spectral: most exits of small W
            return block
        left, values, right = np.linalg.svd(np.moveaxis(block, 2, 0), full_matrices=False)
        if values[:, 0].sum() <= self.radius:
            return block
        # Rounding moves a tap by at most epsilon / 2 of its Frobenius norm, which is at most sqrt(rank) caps.
        caps = _caps(values, self.radius * (1.0 - epsilon * np.sqrt(values.shape[1])))
        excess = np.maximum(values - caps[:, None], 0.0)
        nearest: Matrix = block - np.moveaxis((left * excess[:, None, :]) @ right, 0, 2)
        return nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class MonotoneBound(Constraint):
    """The symmetric part of a square matrix (size, size) has no eigenvalue above the radius; the rest of it is free.

    With m = 1 - radius > 0 these are the W for which I - W is strongly monotone, <z, (I - W) z> >= m |z|^2: those that
    Winston & Kolter (NeurIPS 2020, Proposition 1) write as (1 - m) I - A'A + B - B'. *Ours* is to keep W itself: the
    set of W is convex and has this projection, while an average of A and B is no average of W.
    """

    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(size, size)."""
        return self.size, self.size

    def level(self, block: Matrix) -> float:
        """Largest eigenvalue of the symmetric part."""
        return float(np.linalg.eigvalsh(_symmetric(block))[-1])

    def nearest(self, block: Matrix, epsilon: float) -> Matrix:
        """Eigenvalues of the symmetric part are clipped; the antisymmetric part stays."""
        symmetric = _symmetric(block)
        if _positive_definite(self.radius * np.eye(self.size) - symmetric):
            return block
        values, vectors = np.linalg.eigh(symmetric)
        if values[-1] <= self.radius:
            return block
        # Rounding moves an eigenvalue by at most epsilon / 2 of the Frobenius norm, which no projection enlarges.
        excess = np.maximum(values - (self.radius - epsilon * np.linalg.norm(block)), 0.0)
        nearest: Matrix = block - (vectors * excess) @ vectors.T
        return nearest


def project(vector: FloatArray, constraints: Sequence[Constraint]) -> None:
    """Move every constrained block of `vector`, contiguous (p,), to the nearest point of its set, in place.

    What is inside keeps its bits. A block that holds NaN or infinity has no nearest point and stays as it is.
    Raises ConfigError when a constraint reaches past the end of the vector.
    """
    for constraint in constraints:
        block = _block(vector, constraint)
        exact = block.astype(np.float64)
        if np.isfinite(exact).all():
            nearest = constraint.nearest(exact, float(np.finfo(vector.dtype).eps))
            if nearest is not exact:
                block[...] = nearest


def feasible(vector: FloatArray, constraints: Sequence[Constraint], *, tolerance: float = 1e-6) -> bool:
    """Whether every block has level <= radius * (1 + tolerance); the default allows for a float32 copy of float64.

    Raises ConfigError when a constraint reaches past the end of the vector.
    """
    return all(
        constraint.level(_block(vector, constraint).astype(np.float64)) <= constraint.radius * (1.0 + tolerance)
        for constraint in constraints
    )


def _block(vector: FloatArray, constraint: Constraint) -> FloatArray:
    """The block as a view, so that writing to it writes to the vector."""
    end = constraint.offset + int(np.prod(constraint.shape))
    if end > vector.size:
        raise ConfigError(
            f"{constraint} ends at {end}, but the vector has {vector.size} entries; "
            "give the constraints of the model that the vector came from"
        )
    return vector[constraint.offset : end].reshape(constraint.shape)


def _onto_l1_balls(rows: Matrix, radius: float) -> Matrix:
    """Soft-threshold rows, shape (n, cols) and all outside the ball, by the shifts that put them on the sphere."""
    magnitude = np.abs(rows)
    # In place from here: half of a small device's training step was spent on temporaries of this function.
    shifts = np.negative(magnitude)
    shifts.sort(axis=1)
    np.cumsum(shifts, axis=1, out=shifts)
    shifts += radius
    shifts /= np.arange(-1, -1 - rows.shape[1], -1)
    # (sum of the k largest - radius) / k is largest at the k that are kept.
    magnitude -= shifts.max(axis=1, keepdims=True)
    np.maximum(magnitude, 0.0, out=magnitude)
    projected: Matrix = np.copysign(magnitude, rows, out=magnitude)
    return projected


def _caps(values: Matrix, radius: float) -> Matrix:
    """(n,) caps whose clipping of descending rows (n, k) >= 0 is the projection onto the l1,infinity ball.

    Each row with a cap above 0 gives up the same amount lambda = sum_j (values_j - cap)_+, and the caps add up to the
    radius (Quattoni, Carreras, Collins, Darrell, ICML 2009). A cap is max_k (sum of the k largest - lambda) / k, or 0:
    convex in lambda, so Newton's method from 0 rises to the root without passing it, in finitely many steps.
    """
    ranks = np.arange(1, values.shape[1] + 1)
    sums = np.cumsum(values, axis=1)
    given = 0.0
    while True:
        candidates = (sums - given) / ranks
        best = candidates.argmax(axis=1)
        caps: Matrix = np.maximum(np.take_along_axis(candidates, best[:, None], axis=1)[:, 0], 0.0)
        raised = given + (caps.sum() - radius) / (1.0 / ranks[best])[caps > 0.0].sum()
        if raised <= given:
            return caps
        given = raised


def _symmetric(matrix: Matrix) -> Matrix:
    return 0.5 * (matrix + matrix.T)


def _positive_definite(matrix: Matrix) -> bool:
    """By Cholesky: a twentieth of the time of the eigenvalues (64 rows on a CPU)."""
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    return True

"""Fixed point: duals, penalties and weights as integers, whose sums do not depend on the order of the terms.

A dual nu_i is an int64 vector in units of 2^-s, s = `fraction_bits`; a penalty kappa_i is an int in units of 2^-32.
Client and server move a dual by the same `dual_step`, so both hold the same integers, and sums of integers are exact:
a contribution can be taken back, partial sums of workers add up, and masks modulo 2^64 cancel.

Every platform computes the same bits. The conversion of a difference to float64 is exact, and so is a product with a
power of two; what rounds is one product and one rounding to an integer, each correctly rounded by IEEE 754, and no sum
follows the product that a compiler could fuse with it. A step is below 2^52, where float64 holds all integers.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fedeq_edge.errors import ConfigError, ContributionError

FixedVector = NDArray[np.int64]
"""Shape (p,), in units of 2^-s."""
FloatVector = NDArray[np.floating]
"""Shape (p,), float32 or float64."""

PENALTY_BITS = 32
"""A penalty is a multiple of 2^-32 = 2.3e-10, far below any useful kappa."""
_PENALTY_ONE = 1 << PENALTY_BITS
_INTEGERS = 2.0**53
STEP_LIMIT = 2**52
"""A step of the dual is smaller, per entry: float64 still tells all integers apart, and 1024 such steps fit in 2^62."""
SUM_LIMIT = 2**62
"""What a dual, and a sum of duals, stays below, per entry: half of int64, so that two of them can be added."""
WHOLE = 2**16
"""A clip factor of 1: factors are multiples of 2^-16, by which a float32 difference is scaled without rounding."""
_PART = 8192
"""Entries worked on at a time: what lies between fits in a core's cache, where vectors would all be fresh memory."""


def fraction_bits(dtype: DTypeLike) -> int:
    """s of the unit 2^-s of a dual: 32 in a float32 federation, 44 in a float64 one (numerical tests).

    32 bits resolve 2.3e-10 and leave room for |kappa d| < 2^20; 44 resolve 5.7e-14, for |kappa d| < 2^8.
    Raises ConfigError for another type.
    """
    bits = {np.dtype(np.float32): 32, np.dtype(np.float64): 44}.get(np.dtype(dtype))
    if bits is None:
        raise ConfigError(f"parameters of type {np.dtype(dtype)} have no fixed-point duals; use float32")
    return bits


def dual_step(difference: FloatVector, kappa: float, bits: int, factor: int = WHOLE) -> FixedVector:
    """rint(kappa d 2^bits), (p,) int64: what nu moves by, the same on client and server. Ties go to the even integer.

    difference: theta - z_hat as it was decoded, (p,); factor / WHOLE of it is d. kappa: the penalty of the task, > 0, a
    multiple of 2^-32.
    Raises ContributionError "too_large" where an entry is not below STEP_LIMIT, or not a number.
    Source: algorithm.md, section 4, step 4.
    """
    step = np.empty(difference.size, np.int64)
    for part, moved in _steps(difference, kappa * 2.0**bits, bits, factor):
        step[part] = moved
    return step


def move_dual(nu: FixedVector, difference: FloatVector, kappa: float, bits: int, factor: int = WHOLE) -> None:
    """nu, (p,), has moved by the `dual_step` of these; nothing has where that raises."""
    for part, moved in _steps(difference, kappa * 2.0**bits, bits, factor):
        nu[part] += moved.astype(np.int64)


def _steps(difference: FloatVector, unit: float, bits: int, factor: int) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """(where, the steps there as float64 integers), part after part."""
    _check_step(difference, unit, bits, factor)
    for part in _parts(difference.size):
        exact = scaled(difference[part], factor) * unit
        yield part, np.rint(exact, out=exact)


def _check_step(difference: FloatVector, unit: float, bits: int, factor: int) -> None:
    """Of the largest entry alone: scaling and rounding keep the order of magnitudes."""
    most = np.array(
        [max(difference.max(initial=0.0), -difference.min(initial=0.0))]
    )  # no number where an entry is none
    with np.errstate(over="ignore", invalid="ignore"):
        step = float(np.rint(scaled(most, factor) * unit)[0])
    if not step < STEP_LIMIT:
        raise ContributionError(
            "too_large",
            f"the dual would move by {step * 2.0**-bits:.3g}, and the limit is {STEP_LIMIT * 2.0**-bits:g}; "
            "did the training diverge?",
        )


def dual_value(nu: FixedVector, dtype: DTypeLike) -> FloatVector:
    """nu 2^-s as floats, (p,) of type `dtype`: the term of the client's gradient, in the units of a gradient."""
    unit = 2.0 ** -fraction_bits(dtype)
    value: FloatVector = np.empty(nu.size, dtype)
    for part in _parts(nu.size):
        value[part] = nu[part].astype(np.float64) * unit
    return value


def _parts(size: int) -> Iterator[slice]:
    return (slice(start, start + _PART) for start in range(0, size, _PART))


def fixed_penalty(kappa: float) -> int:
    """The multiple of 2^-32 nearest to kappa, finite and > 0; at least 1, as a penalty of 0 would stop the dual."""
    # The product with a power of two is exact, and a float beyond 2^53 is an integer: that product might be infinite.
    return max(1, round(kappa * _PENALTY_ONE) if kappa < _INTEGERS else int(kappa) * _PENALTY_ONE)


def penalty_of(fixed: int) -> float:
    """kappa = fixed 2^-32, the float that travels; exact for what `fixed_penalty` returns."""
    return fixed / _PENALTY_ONE


def clip_factor(norm: float, bound: float) -> int:
    """The largest multiple f of 1 / WHOLE, at most WHOLE, with norm f / WHOLE <= bound; both >= 0 and finite."""
    return WHOLE if norm <= bound else math.floor(bound / norm * WHOLE)


def scaled(difference: FloatVector, factor: int) -> NDArray[np.float64]:
    """difference factor / WHOLE, (p,) float64: what counts of a clipped contribution, on the client and the server."""
    exact = difference.astype(np.float64, copy=False)
    return exact if factor == WHOLE else exact * (factor / WHOLE)


def largest(vector: FixedVector) -> int:
    """The largest magnitude of an entry, exact also for -2^63; 0 without entries."""
    return max(int(vector.max(initial=0)), -int(vector.min(initial=0)))


class ExactSum:
    """A sum of integer multiples of int64 vectors, (p,).

    bound: no entry is larger, an int without limit that grows without a look at the entries; `look` tightens it.
    Its owner sees to it that no entry reaches 2^63.
    """

    def __init__(self, start: FixedVector) -> None:
        self.values = start.copy()
        self.bound = largest(start)

    def look(self) -> int:
        """`bound` is the largest magnitude of an entry."""
        self.bound = largest(self.values)
        return self.bound

    def add(self, vector: FixedVector, factor: int, magnitude: int) -> None:
        """values += factor vector, where no entry of `vector` is larger than `magnitude`."""
        self.values += vector if factor == 1 else factor * vector
        self.bound += abs(factor) * magnitude

"""What the consensus keeps of a device, takes in, hands over and reports."""

import math
from dataclasses import dataclass

from fedeq_edge.consensus.fixed import WHOLE, FixedVector

SQUARE_BITS = 128
"""|d|^2 is summed in units of 2^-128: residuals down to 1e-19 are told from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """What the server knows of one device. samples: n_i >= 1. quality: q_i. score: the last s_i, None before.

    omega, penalty: omega_i and kappa_i 2^32, kept as they were computed: another platform's power function must not
    move them. reach: no entry of nu_i is larger, in units of 2^-s; 0 where the server keeps no duals.
    """

    samples: int
    omega: int
    penalty: int
    quality: float = 1.0
    score: float | None = None
    reach: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Arrival:
    """One contribution to the open round, as it counted: omega_i, kappa_i 2^32 and the factor in 1 / WHOLE.

    square: |d|^2 as it was sent. held: nu_i still holds the step, so that it can be taken back.
    """

    device: str
    omega: int
    penalty: int
    factor: int
    square: float
    held: bool = True

    @property
    def weight(self) -> int:
        """omega_i kappa_i, in units of 2^-32."""
        return self.omega * self.penalty

    @property
    def weighted_square(self) -> int:
        """omega_i kappa_i |d_i|^2 of what counted, in units of 2^-32 times 2^-SQUARE_BITS."""
        share = self.factor / WHOLE
        return self.weight * int(math.ldexp(self.square * share * share, SQUARE_BITS))


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialSum:
    """What several devices contribute together: a worker's round, or a sum that was masked.

    steps: sum omega_i step_i modulo 2^64, (p,) int64. weight: sum omega_i kappa_i 2^32. squares: sum of
    omega_i kappa_i |d_i|^2, in units of 2^-160, for the report alone. devices: whose, sorted, once per contribution.
    """

    steps: FixedVector
    weight: int
    squares: int
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one worker's devices have contributed to a round, and what they hold together after it; all of it exact.

    steps, weight, squares: as in a `PartialSum`. duals: sum omega_i nu_i over its members, these steps included, (p,)
    int64 modulo 2^64; 0 with the server "mean". penalties: sum omega_i kappa_i 2^32 over its members.
    """

    steps: FixedVector
    weight: int
    squares: int
    duals: FixedVector
    penalties: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """How far the fleet is from agreeing, after one `close_round`.

    primal_residual: root of the mean of |d_i|^2 with weights omega_i kappa_i; NaN for an empty round.
    step: |z - z_old|. dual_residual: step times the mean penalty (Boyd et al. 2011, section 3.3).
    correction: |H / R|, which vanishes at the optimum (0 for the server "mean"). contributors: sorted, once per
    contribution. late: those of them that were not in the cohort.
    """

    primal_residual: float
    dual_residual: float
    step: float
    correction: float
    contributors: tuple[str, ...]
    late: tuple[str, ...]

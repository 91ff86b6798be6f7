"""What a solve found out: the state, how far it came, and whether to trust it."""

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from fedeq_edge.errors import SolverError


class Result(IntEnum):
    """How a sample's solve ended, from best to worst; `message` says it to the user."""

    CONVERGED = 0
    BUDGET_SPENT = 1
    DIVERGED = 2
    NON_FINITE = 3

    @property
    def message(self) -> str:
        """What it means and what to change."""
        return _MESSAGES[self]


_MESSAGES = {
    Result.CONVERGED: "the relative residual reached the tolerance",
    Result.BUDGET_SPENT: "the budget was spent before the tolerance was reached; raise the budget or the tolerance",
    Result.DIVERGED: "the iteration moves away from fixed points; constrain the cell (radius < 1) or damp the solver",
    Result.NON_FINITE: "the iteration produced NaN or infinity; check the input, or constrain the cell (radius < 1)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Outcome of one batched solve; B samples.

    state: (B, ...) the z that `residual` belongs to. value: (B, ...) = f(state), the answer to use: it was computed for
    the residual anyway and, in a contraction, is nearer to the fixed point. spent: evaluations of f for the batch.
    residuals, counts, results: per sample and on the host, where the driver decides on them; `residual`, `evaluations`
    and `result` give them as tensors. earlier: residuals at the look before the last, and how many evaluations ago that
    was; None where there was one look.
    """

    value: Tensor
    state: Tensor
    spent: int
    residuals: list[float]
    counts: list[int]
    results: list[Result]
    earlier: tuple[list[float], int] | None

    @property
    def residual(self) -> Tensor:
        """(B,) |f(z) - z| / max(|f(z)|, 1e-9) at `state`; infinite where no evaluation was finite (`state` is z_0)."""
        return torch.tensor(self.residuals, dtype=self.value.dtype, device=self.value.device)

    @property
    def evaluations(self) -> Tensor:
        """(B,) int64, evaluations until the sample stopped."""
        return torch.tensor(self.counts, dtype=torch.int64, device=self.value.device)

    @property
    def result(self) -> Tensor:
        """(B,) int64, a `Result` per sample."""
        return torch.tensor(self.results, dtype=torch.int64, device=self.value.device)

    @property
    def rate(self) -> Tensor:
        """(B,) factor by which one evaluation changed the residual between the last two looks, NaN after one look."""
        if self.earlier is None:
            return torch.full_like(self.residual, torch.nan)
        before, evaluations = self.earlier
        rate: Tensor = (self.residual / torch.tensor(before, dtype=self.value.dtype)) ** (1.0 / evaluations)
        return rate

    @property
    def worst(self) -> Result:
        """The worst result in the batch."""
        return max(self.results)

    def throw(self) -> None:
        """Raise SolverError unless every sample converged; the message counts the samples and says what to change."""
        failed = sum(result is not Result.CONVERGED for result in self.results)
        if failed:
            finite = [residual for residual in self.residuals if math.isfinite(residual)]
            largest = f"{max(finite):.1e}" if finite else "none finite"
            raise SolverError(
                f"solve: {failed} of {len(self.results)} samples did not converge in {self.spent} evaluations "
                f"(largest residual: {largest}): {self.worst.message}"
            )

"""What a solve found out: the state, how far it came, and whether to trust it."""

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

    value: (B, ...) = f(z), the state to use: the last (Picard) or the best (Anderson) evaluation that was finite.
    residual: (B,) = |f(z) - z| / max(|f(z)|, 1e-6) of the z from which `value` was computed, one step older than it;
        infinite where no measured evaluation was finite (`value` is then z_0).
    evaluations: (B,) int64, evaluations until the sample stopped. spent: evaluations of f for the whole batch.
    result: (B,) int64, a `Result` per sample.
    """

    value: Tensor
    residual: Tensor
    evaluations: Tensor
    spent: int
    result: Tensor

    @property
    def worst(self) -> Result:
        """The worst result in the batch."""
        return Result(int(self.result.max()))

    def throw(self) -> None:
        """Raise SolverError unless every sample converged; the message counts the samples and says what to change."""
        failed = int((self.result != Result.CONVERGED).sum())
        if failed:
            finite = self.residual[torch.isfinite(self.residual)]
            largest = f"{float(finite.max()):.1e}" if len(finite) else "none finite"
            raise SolverError(
                f"solve: {failed} of {len(self.result)} samples did not converge in {self.spent} evaluations "
                f"(largest residual: {largest}): {self.worst.message}"
            )

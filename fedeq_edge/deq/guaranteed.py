"""Acceleration that never ends worse than plain iteration, to the letter.

Theory of operation. What plain iteration finds within a budget is known only to those who iterate plainly. So every
sample is walked twice from z0, plainly and accelerated, and one call of torch.vmap(f) on the stack (2, B, ...) is one
evaluation of the budget for both walks. To the driver (`solvers`) that is a batch of 2 B rows, the plain walks first,
looked at after every evaluation; the rows of a sample stop together, and the better one is the sample's answer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from textwrap import shorten

import torch
from torch import Tensor

from fedeq_edge.deq.acceleration import Adaptive, Anderson
from fedeq_edge.deq.method import Look, Memory
from fedeq_edge.deq.solution import Solution
from fedeq_edge.errors import ConfigError

# Plain and accelerated.
WALKS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Guaranteed:
    """The better of plain and accelerated iteration, sample by sample, for the same number of evaluations of f.

    After K evaluations a sample's residual is at most that of Picard() after K, to the rounding of batched kernels, for
    every K and every map, contracting or not; with a tolerance it stops no later than Picard(check_every=1). f must be
    one that torch.vmap can stack: no branch on values, no randomness, no in-place change of what it captures.

    An evaluation, with all that belongs to it, takes as long as 2.1 (conv, B = 32), 2.7 (dense, B = 64) or 3.8 (dense,
    B = 1: torch.vmap alone costs 30 us a call) of `Anderson`, and as long as 2.9, 4.7 or 15 of `Picard`; measured on
    the cells of `make bench-deq`.
    """

    accelerated: Anderson | Adaptive = field(default_factory=Anderson)

    @property
    def interval(self) -> int:
        """Every evaluation is looked at: plain iteration may stop, or be at its best, after any of them."""
        return 1

    @property
    def damping(self) -> float:
        """Plain steps are undamped."""
        return 1.0

    @property
    def keeps_best(self) -> bool:
        """Yes, of each walk."""
        return True

    def init(self, z0: Tensor) -> Memory:
        """Memory for one solve from z0 (2 B, ...): the starts of the plain walks, then those of the accelerated."""
        return _Beside(self.accelerated, z0)


def both_walks(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """f for the rows (2 B, ...) of both walks, in one call of f.

    It raises ConfigError where torch.vmap cannot make that call; what f raises by itself goes through.
    """
    stacked = torch.vmap(f)

    def evaluate(z: Tensor) -> Tensor:
        pair = z.reshape(WALKS, -1, *z.shape[1:])
        try:
            image: Tensor = stacked(pair).flatten(0, 1)
        except RuntimeError as error:
            f(pair[0])  # a fault of f's own is raised here, as without Guaranteed
            raise ConfigError(
                "solve: Guaranteed evaluates both walks in one call, but torch.vmap cannot stack this f "
                f"({shorten(str(error), 100)}); write f without branches on values, randomness and in-place changes of "
                "captured tensors, or solve with Anderson() alone"
            ) from error
        return image

    return evaluate


def better_walk(found: Solution) -> Solution:
    """Of each sample's two rows in `found` (2 B) the one with the smaller residual, with all that is known of it."""
    samples = len(found.residuals) // WALKS
    plain, accelerated = found.residuals[:samples], found.residuals[samples:]
    rows = [i if plain[i] <= accelerated[i] else i + samples for i in range(samples)]
    index = torch.tensor(rows, device=found.value.device)
    earlier = found.earlier
    return Solution(
        value=found.value.index_select(0, index),
        state=found.state.index_select(0, index),
        spent=found.spent,
        residuals=[found.residuals[row] for row in rows],
        counts=[found.counts[row] for row in rows],
        results=[found.results[row] for row in rows],
        earlier=earlier and ([earlier[0][row] for row in rows], earlier[1]),
    )


class _Beside:
    """Plain steps for the first half of the rows; the second half goes where the accelerated method says."""

    def __init__(self, accelerated: Anderson | Adaptive, z0: Tensor) -> None:
        self._samples, self._window = len(z0) // WALKS, accelerated.interval
        self._memory = accelerated.init(z0[self._samples :])
        self._trail: list[Tensor] = []
        self._held: list[float] = []

    def advance(self, look: Look) -> Tensor:
        """As the accelerated method would by itself: it hears of the last look in each of its windows."""
        samples = self._samples
        if not self._trail:
            self._held = look.held[samples:]
        self._trail.append(look.trail[-1][samples:])
        if len(self._trail) < self._window:
            return look.image
        window = Look(
            trail=self._trail,
            image=look.image[samples:],
            residual=look.residual[samples:],
            held=self._held,
            best=look.best[samples:],
            clean=look.clean,
        )
        self._trail = []
        return torch.cat([look.image[:samples], self._memory.advance(window)])

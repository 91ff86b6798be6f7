"""What a solver is to the driver (`solvers.solve`), and the plainest one.

A method is a frozen bundle of settings; `init` gives its memory for one solve, which the driver asks after every
*look* where f is evaluated next. Between looks every method steps plainly. Residuals, stopping, best-so-far and budgets
are the driver's alone, so that no method repeats them.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fedeq_edge.errors import ConfigError


@dataclass(slots=True)
class Look:
    """What the driver saw at one look; B samples.

    trail: the states since the last look, oldest first: f(trail[i]) = trail[i + 1], but for damping. image:
    f(trail[-1]). residual: B numbers, |f(z) - z| of z = trail[-1] relative to |f(z)|. held: B numbers, the residual of
    each sample's answer before this look, infinite where it had none. best: the answers, this look included.
    clean: every residual of a sample that iterates is finite and, where the method keeps the best, below `held`.
    """

    trail: list[Tensor]
    image: Tensor
    residual: list[float]
    held: list[float]
    best: Tensor
    clean: bool


class Memory(Protocol):
    """What a method remembers during one solve."""

    def advance(self, look: Look) -> Tensor:
        """Where f is evaluated next."""
        ...


class Solver(Protocol):
    """Settings of a method."""

    @property
    def interval(self) -> int:
        """Evaluations between two looks, >= 1; the last evaluation of the budget is always looked at."""
        ...

    @property
    def damping(self) -> float:
        """Of the plain steps between looks, in (0, 1]: z <- (1 - damping) z + damping f(z)."""
        ...

    @property
    def keeps_best(self) -> bool:
        """Whether a worse residual leaves the answer as it was: methods whose residual is not monotone want that."""
        ...

    def init(self, z0: Tensor) -> Memory:
        """Memory for one solve from z0 (B, ...)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Picard:
    """z <- (1 - damping) z + damping f(z): the cheapest, and the best where the cell contracts fast (rate below 0.6).

    After K evaluations the answer is f(z_{K-1}), with the residual of z_{K-1}. 0 < damping <= 1. check_every: a look at
    the residual costs about a third of a small cell's evaluation, so every fourth evaluation is looked at; 1 stops a
    sample at the very evaluation at which it reached the tolerance, as the exported ONNX loop does.
    """

    damping: float = 1.0
    check_every: int = 4

    def __post_init__(self) -> None:
        if not 0.0 < self.damping <= 1.0:
            raise ConfigError(f"Picard: damping is {self.damping}; choose 0 < damping <= 1 (1 is the plain iteration)")
        if self.check_every < 1:
            raise ConfigError(f"Picard: check_every is {self.check_every}; give at least 1")

    @property
    def interval(self) -> int:
        """As `check_every` says."""
        return self.check_every

    @property
    def keeps_best(self) -> bool:
        """No: plain iteration goes where it goes, and its answer is the last finite one."""
        return False

    def init(self, z0: Tensor) -> Memory:
        """Nothing to remember but the damping."""
        del z0
        return _Plain(self.damping)


@dataclass(frozen=True, slots=True)
class _Plain:
    damping: float

    def advance(self, look: Look) -> Tensor:
        return damped(look.trail[-1], look.image, self.damping)


def damped(z: Tensor, fz: Tensor, damping: float) -> Tensor:
    """z + damping (f(z) - z); unlike torch.lerp an infinite f(z) gives infinity, not NaN."""
    return fz if damping == 1.0 else z.add(fz - z, alpha=damping)

"""What a learner needs of the library that computes: parameters in, training steps and equilibrium features out.

A `Backend` is one model behind one library (training/torch_step.py, onnx/backend.py); arrays are numpy's on both sides.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.deq.description import Description
from fedeq_edge.training.step import Budget, Vector

Samples = NDArray[np.float32]
Labels = NDArray[np.int64]
Matrix = NDArray[np.float32]
Step = TypeVar("Step")

DIVERGED_REMEDY = 'lower learning_rate or clip in the plan, or constrain the cell (cell = "contractive")'


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """What ADMM adds to the gradient: nu + kappa (w - z) on the first s numbers of w. z, nu: (s,)."""

    z: Vector
    nu: Vector
    kappa: float

    def add_to(self, gradient: Vector, w: Vector) -> None:
        """`gradient` (p + h,) holds the pull as well, in place."""
        shared = len(self.z)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows here shows in the next loss
            gradient[:shared] += self.nu + self.kappa * (w[:shared] - self.z)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One training step: loss before it (no penalty in it), mean residuals of forward and backward solve, budget."""

    loss: float
    residual: float
    backward_residual: float
    budget: Budget


def micro_batches(batch: int, most: int | None) -> list[slice]:
    """The parts of a batch of so many samples that are differentiated at once.

    `most` in each, all in one where that is 0 or None. As even as they can be: a part of one or two samples would cost
    as much as one of ten.
    """
    parts = -(-batch // most) if most else 1
    bounds = [batch * part // parts for part in range(parts + 1)]
    return [slice(*ends) for ends in itertools.pairwise(bounds)]


def sample_mean(parts: Sequence[tuple[int, Step]], field: Callable[[Step], float]) -> float:
    """Mean over the samples of a batch, from (samples, step) of its parts; of one part what it says, to the bit."""
    if len(parts) == 1:
        return field(parts[0][1])
    return sum(count * field(step) for count, step in parts) / sum(count for count, _ in parts)


class Descent(Protocol):
    """SGD with momentum on w = [theta | head], from the parameters that the backend held when it began."""

    def step(self, x: Samples, y: Labels, budget: Budget) -> Measured:
        """The backend holds the parameters after one step on the batch x (B, *input_shape), y (B,).

        Raises SolverError, before they have changed, when the loss or its gradient is not finite.
        """
        ...


class Backend(Protocol):
    """One model, theta (p,) and head (h,), and the library that trains it."""

    @property
    def description(self) -> Description:
        """Of the model."""
        ...

    @property
    def solver(self) -> bytes:
        """A graph that solves the model (onnx/solver.py), empty where the library has none."""
        ...

    def load(self, theta: Vector, head: Vector) -> None:
        """The model computes with copies of these. Raises ConfigError for another size and for NaN or infinity."""
        ...

    def parameters(self) -> tuple[Vector, Vector]:
        """Copies of theta and head as they are now."""
        ...

    def descent(self, *, rate: float, pull: Pull | None = None, frozen_head: bool = False, seed: int = 0) -> Descent:
        """Steps of one round at this step size, velocity 0; pull: ADMM's part, None when training alone.

        frozen_head: the head was fitted by itself (`Method.head_step` "refit") and stays. seed: of whatever a step
        draws.
        """
        ...

    def solve(self, x: Samples, forward: int) -> tuple[Matrix, Vector]:
        """(features (B, f), relative residuals (B,)) of x (B, *input_shape) at K = `forward`."""
        ...


@runtime_checkable
class AnytimeBackend(Backend, Protocol):
    """A backend whose solves at several budgets share their evaluations."""

    def solve_each(self, x: Samples, budgets: Sequence[int]) -> list[tuple[Matrix, Vector]]:
        """What `solve` gives at each of these K >= 1, at the price of the largest."""
        ...


def solve_each(backend: Backend, x: Samples, budgets: Sequence[int]) -> list[tuple[Matrix, Vector]]:
    """What `backend.solve` gives at each of these K: in one walk where it can."""
    if isinstance(backend, AnytimeBackend):
        return backend.solve_each(x, budgets)
    return [backend.solve(x, K) for K in budgets]

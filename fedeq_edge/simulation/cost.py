"""What training costs a board, in seconds that no clock is read for: counted, not measured, alike on every machine.

A step's seconds are fixed + K evaluation + k adjoint (`Calibration`). They are counted from the multiplications of the
model on a reference core, the x86-64 profile's, and multiplied by a board's slowness; an experiment may give them
instead. The learner's clock advances by them (`Timed`), so its planning and its pace are those of the board.
"""

from collections.abc import Sequence
from math import prod
from typing import Final

import msgspec

from fedeq_edge.deq.layout import Layout, head_layout, theta_layout
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.hardware.budget import step_seconds
from fedeq_edge.training.backend import Backend, Descent, Labels, Matrix, Measured, Pull, Samples, solve_each
from fedeq_edge.training.step import Budget, Calibration, Plan, Vector

# Multiply-adds a second of the reference core at fp32 convolutions of this kind, and what an evaluation costs besides:
# some ten calls into a library. Orders of magnitude; an experiment on absolute times gives measured [cost].
RATE: Final = 4e9
CALLS_S: Final = 1e-4
# The reverse of an evaluation multiplies twice for once; a step differentiates stem, head and one evaluation.
REVERSE: Final = 2.0
WHOLE_STEP: Final = 3.0


def counted(spec: ModelSpec, batch: int) -> Calibration:
    """Reference seconds of a training step of this model on `batch` samples."""
    theta = theta_layout(spec)
    cell = _macs(tuple(slot for slot in theta if slot.name.startswith("cell.")), prod(spec.state_shape[1:]))
    stem = _macs(tuple(slot for slot in theta if slot.name.startswith("stem.")), prod(spec.state_shape[1:]))
    head = _macs(head_layout(spec), 1)
    evaluation_s = CALLS_S + cell * batch / RATE
    return Calibration(
        batch=batch,
        fixed_s=WHOLE_STEP * (CALLS_S + (stem + head) * batch / RATE) + REVERSE * evaluation_s,
        evaluation_s=evaluation_s,
        adjoint_s=REVERSE * evaluation_s,
    )


def planned(counted: Calibration, plan: Plan) -> Calibration:
    """The same where a plan differentiates through its last evaluations, or penalises the Jacobian."""
    evaluation_s, more = counted.evaluation_s, 0.0
    if plan.unrolled:  # one of them is in every step
        more += REVERSE * (plan.unrolled - 1)
    if plan.jacobian_penalty > 0.0:  # one evaluation and a product with its Jacobian, both of them reversed
        more += (1.0 + REVERSE) ** 2
    return msgspec.structs.replace(
        counted,
        fixed_s=counted.fixed_s + more * evaluation_s,
        adjoint_s=0.0 if plan.unrolled else counted.adjoint_s,
    )


def counted_explicit(multiplications: int, batch: int) -> Calibration:
    """Reference seconds of a training step of an explicit network: forward and backward, whatever K."""
    forward_s = CALLS_S + multiplications * batch / RATE
    return Calibration(batch=batch, fixed_s=(1.0 + REVERSE) * forward_s, evaluation_s=0.0, adjoint_s=0.0)


def slowed(reference: Calibration, slowdown: float) -> Calibration:
    """The same on a board that is so many times slower."""
    return Calibration(
        batch=reference.batch,
        fixed_s=reference.fixed_s * slowdown,
        evaluation_s=reference.evaluation_s * slowdown,
        adjoint_s=reference.adjoint_s * slowdown,
        slowdown=slowdown,
    )


class VirtualClock:
    """A `Clock` that stands still until it is told how long something took."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        """Device seconds now."""
        return self.now_s


class Timed:
    """A `Backend` whose work advances `clock` by what it costs the board: `calibration`, times `pace` >= 1."""

    def __init__(self, backend: Backend, clock: VirtualClock, calibration: Calibration, pace: float) -> None:
        self.description, self.solver = backend.description, backend.solver
        self._backend, self._clock, self._calibration, self._pace = backend, clock, calibration, pace

    def load(self, theta: Vector, head: Vector) -> None:
        """The model computes with copies of these."""
        self._backend.load(theta, head)

    def parameters(self) -> tuple[Vector, Vector]:
        """Copies of theta and head as they are now."""
        return self._backend.parameters()

    def descent(self, *, rate: float, pull: Pull | None = None, frozen_head: bool = False, seed: int = 0) -> Descent:
        """Steps of one round, each of which takes its time."""
        return _TimedDescent(self._backend.descent(rate=rate, pull=pull, frozen_head=frozen_head, seed=seed), self)

    def solve(self, x: Samples, forward: int) -> tuple[Matrix, Vector]:
        """Features and residuals of x at K = `forward`."""
        found = self._backend.solve(x, forward)
        self._clock.now_s += self._pace * forward * self._calibration.evaluation_s * len(x) / self._calibration.batch
        return found

    def solve_each(self, x: Samples, budgets: Sequence[int]) -> list[tuple[Matrix, Vector]]:
        """The same at each of these K; what measures accuracy takes no time, as a board would not do it."""
        return solve_each(self._backend, x, budgets)

    def took(self, budget: Budget) -> None:
        """A training step with this budget is over."""
        self._clock.now_s += self._pace * step_seconds(self._calibration, budget)


class _TimedDescent:
    def __init__(self, descent: Descent, backend: Timed) -> None:
        self._descent, self._backend = descent, backend

    def step(self, x: Samples, y: Labels, budget: Budget) -> Measured:
        measured = self._descent.step(x, y, budget)
        self._backend.took(measured.budget)
        return measured


def _macs(layout: Layout, positions: int) -> float:
    """Multiply-adds of one sample: every weight once at each of the positions."""
    return float(sum(slot.size for slot in layout if slot.name.endswith("weight")) * positions)

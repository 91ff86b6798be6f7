"""Fixed points z = f(z) of a batch within an exact number of evaluations.

Theory of operation. One driver (`solve`) owns the budget, the residuals, the best answer and the stopping of single
samples; a method (`method.Solver`: Picard, Anderson, Adaptive) only says where f is evaluated next; Guaranteed has
two of them walk side by side. The driver *looks* at the residual every few evaluations, and at the end of the budget:

    r = |f(z) - z| / max(|f(z)|, 1e-9)  per sample;   a sample stops where r <= tol;   the batch when all have

so a sample stops at its own residual whatever its batch mates do. Three rules keep the overhead small and the answers
right. A look costs one synchronisation with the host: B residuals come over, and every decision is made on them there.
Whole batches are taken by reference, and rows are copied only where samples differ (they stopped, got worse, or are not
finite): selection by rows, never mask * value, since 0 * inf is NaN (the defect of torchdeq 0.1.0's batch mixing).
Comparisons are written so that NaN means "not done". The states since the last look are remembered by reference, so
that a sample that overflowed can end with its last finite state.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import lt

import numpy as np
import torch
from torch import Tensor

from fedeq_edge.deq.acceleration import Adaptive
from fedeq_edge.deq.batch import norms, put, relative_residual
from fedeq_edge.deq.guaranteed import WALKS, Guaranteed, better_walk, both_walks
from fedeq_edge.deq.method import Look, Picard, Solver, damped
from fedeq_edge.deq.solution import Result, Solution
from fedeq_edge.deq.spec import SMALLEST_NORM
from fedeq_edge.errors import ConfigError

StepFunction = Callable[[Tensor], Tensor]

# |f(z) - z| may grow for a while in a non-normal contraction; growth beyond ten times the first step is no transient.
DIVERGENCE = 10.0
# Bytes of a batch's state up to which a window of states is remembered: beyond, they crowd f out of a small CPU's cache
# (10 % of a convolutional cell's time at 1 MB), and an overflow ends with the last finite state that was looked at.
SMALL_STATE = 2**14


def solve(
    f: StepFunction,
    z0: Tensor,
    *,
    solver: Solver | None = None,
    budget: int,
    tol: float | None = 1e-4,
    independent: bool = True,
    throw: bool = False,
) -> Solution:
    """Fixed point of the batched map f from z0 (B, ...), with at most `budget` evaluations of f, counted exactly.

    solver: Adaptive() if None. tol: relative residual at which a sample stops; None spends the whole budget.
    independent: a sample keeps the answer with which it stopped, so that it is solved alike alone and in any batch (to
    rounding); False lets all go on until the last has stopped. throw: raise SolverError unless every sample converged.
    Records no graph; never raises for NaN. Raises ConfigError for limits out of range, for an f whose output has
    another shape or dtype than z0, and with `Guaranteed` for one that torch.vmap cannot stack.
    """
    if budget < 1:
        raise ConfigError(f"solve: budget is {budget}; a solve needs at least 1 evaluation")
    if tol is not None and not tol > 0.0:
        raise ConfigError(f"solve: tol is {tol}; give a relative residual above 0, or None to spend the whole budget")
    method, start = solver or Adaptive(), z0.detach()
    with torch.no_grad():
        if isinstance(method, Guaranteed):
            twice = _Run(torch.cat([start] * WALKS), method, tol, independent, walks=WALKS)
            solution = better_walk(twice.spend(both_walks(_checked(f)), budget))
        else:
            solution = _Run(start, method, tol, independent).spend(f, budget)
    if throw:
        solution.throw()
    return solution


def iterate(f: StepFunction, z0: Tensor, *, evaluations: int, solver: Solver | None = None) -> Tensor:
    """The state after exactly so many evaluations (0: z0), without graph; plain iteration without any measurement.

    solver: Picard() if None; a method that keeps its best answer gives that. The hot path of training: with Picard it
    costs what f costs.
    """
    method = solver or Picard()
    if evaluations and method.keeps_best:
        return solve(f, z0, solver=method, budget=evaluations, tol=None).value
    with torch.no_grad():
        z = z0.detach()
        for index in range(evaluations):
            fz = f(z)
            if not index:
                _check_image(fz, z)
            z = damped(z, fz, method.damping)
    return z


class _Run:
    """One solve. `_value`, `_state`, `_held`: every sample's answer so far, also of those that stopped and go on being
    evaluated with their batch; what the stopped ones keep is in `_stops`. walks: so many equal parts of the batch are
    walks of the same samples, which stop together (guaranteed.py).
    """

    def __init__(self, z0: Tensor, solver: Solver, tol: float | None, independent: bool, *, walks: int = 1) -> None:
        self._solver, self._tol, self._independent, self._walks = solver, tol, independent, walks
        self._memory = solver.init(z0)
        self._state = self._value = z0
        self._held = [math.inf] * len(z0)
        self._active: Sequence[int] = range(len(z0))
        self._resting: set[int] = set()
        self._stops: list[_Stop] = []
        self._difference: Tensor | None = None
        self._earlier: tuple[list[float], int] | None = None
        self._lost: list[int] = []
        self._overflowed: set[int] = set()
        self._spent = 0
        self._converged = False

    def spend(self, f: StepFunction, budget: int) -> Solution:
        """Evaluate until every sample has stopped or the budget is spent."""
        damping, due = self._solver.damping, min(budget, self._solver.interval)
        z = self._state
        # A method that mixes needs the states between looks; plain iteration only to end an overflow well.
        remember = self._solver.keeps_best or z.nbytes <= SMALL_STATE
        trail = [z]
        for index in range(1, budget + 1):
            fz = f(z)
            if index == 1:
                _check_image(fz, z)
                self._first = (z, fz)
            if index < due:
                z = fz if damping == 1.0 else damped(z, fz, damping)
                if remember:
                    trail.append(z)
                else:
                    trail[0] = z
                continue
            look = self._look(trail, fz, index)
            if self._converged or index == budget:
                break
            # Stopped samples go on being evaluated with their batch; their answer is held and no other sees them.
            z = self._memory.advance(look)
            trail = [z]
            due = min(budget, index + self._windows(look.residual) * self._solver.interval)
        return self._solution()

    # ---- looking -------------------------------------------------------------------------------------------

    def _look(self, trail: list[Tensor], fz: Tensor, index: int) -> Look:
        """Measure, take the new answers, and stop the samples that reached the tolerance."""
        residual, held = self._measure(trail[-1], fz), self._held
        clean = math.isfinite(sum(residual)) and self._all_better(residual, held)
        if clean:
            self._state, self._value, self._held, self._lost = trail[-1], fz, residual, []
        else:
            self._take(trail, fz, residual)
        if self._spent:
            self._earlier = (held, index - self._spent)
        self._spent = index
        if self._tol is not None:
            self._stop(self._tol)
        return Look(trail, fz, residual, held, self._value, clean)

    def _measure(self, z: Tensor, fz: Tensor) -> list[float]:
        """The relative residual of each sample, on the host: the one synchronisation of a look."""
        if len(z) == 1 and z.device.type == "cpu":
            # One sample on the CPU is the case of a device that answers, and numpy's calls cost a third of torch's.
            image = fz.numpy()
            length = math.sqrt(np.vdot(image, image))
            if not math.isfinite(length):
                return [math.inf]
            step = image - z.numpy()
            return [math.sqrt(np.vdot(step, step)) / max(length, SMALLEST_NORM)]
        # Into a buffer: allocating a state can cost more than the subtraction.
        self._difference = torch.sub(fz, z, out=self._difference)
        residual: list[float] = (norms(self._difference) / norms(fz).clamp_min_(SMALLEST_NORM)).tolist()
        # Zero is the residual of a fixed point, or of a state whose square is out of range.
        if 0.0 in residual:
            residual = relative_residual(z, fz).tolist()
        return residual

    def _all_better(self, residual: list[float], held: list[float]) -> bool:
        if not self._solver.keeps_best:
            return True
        if len(self._active) == len(residual):
            return all(map(lt, residual, held))
        return all(residual[i] < held[i] for i in self._active)

    def _take(self, trail: list[Tensor], fz: Tensor, residual: list[float]) -> None:
        """New answers for the samples that have one.

        Where f overflowed or made NaN, that is the last state of the window whose image is finite.
        """
        z = trail[-1]
        self._lost = [i for i, number in enumerate(residual) if not math.isfinite(number)]
        if self._lost:
            z, fz, residual = self._last_finite(trail, fz, residual)
        bar = self._held if self._solver.keeps_best else [math.inf] * len(residual)
        worse = [i for i, (new, old) in enumerate(zip(residual, bar, strict=True)) if not new < old]
        value, state = fz.clone(), z.clone()
        put(value, worse, self._value)
        put(state, worse, self._state)
        kept = set(worse)
        self._held = [self._held[i] if i in kept else number for i, number in enumerate(residual)]
        self._state, self._value = state, value

    def _last_finite(
        self, trail: list[Tensor], fz: Tensor, residual: list[float]
    ) -> tuple[Tensor, Tensor, list[float]]:
        """(z, f(z), residual) with the lost samples at their last finite image in this window, if there is one."""
        z, image, residual = trail[-1].clone(), fz.clone(), residual.copy()
        damping, left = self._solver.damping, self._lost
        images = [before + (after - before) / damping for before, after in pairwise(trail)]
        window = list(zip(trail, [*images, fz], strict=True))
        if not self._spent:
            window.insert(0, self._first)
        for before, after in reversed(window):
            usable, finite = _finite(before), _finite(after)
            found = [i for i in left if usable[i] and finite[i]]
            put(z, found, before)
            put(image, found, after)
            if found:
                # In double precision: the square of a float32 number near its limit is out of range.
                measured = relative_residual(before[found].double(), after[found].double()).tolist()
                for i, number in zip(found, measured, strict=True):
                    residual[i] = number
            infinite = _infinite(after)
            self._overflowed.update(i for i in left if usable[i] and infinite[i])
            left = [i for i in left if i not in found]
        return z, image, residual

    # ---- stopping ------------------------------------------------------------------------------------------

    def _windows(self, residual: list[float]) -> int:
        """Intervals until the next look: two where no sample can be expected to stop at the next one.

        A sample further from the tolerance than halvings at every evaluation would bring it rests for one look, and
        must not stop there: alone it would not be looked at, and batch mates must make no difference.
        """
        interval = self._solver.interval
        if self._tol is None or self._solver.keeps_best or interval == 1:
            return 1
        bar, rested = self._tol * 2**interval, self._resting
        if not rested and min(residual) > bar:
            return 2
        self._resting = (
            {i for i in self._active if residual[i] > bar and i not in rested} if self._independent else set()
        )
        return 1

    def _stop(self, tol: float) -> None:
        """Samples at the tolerance have stopped; `_converged` if all have."""
        held, resting = self._held, self._resting
        reached = [i for i in self._active if held[i] <= tol and i not in resting] if min(held) <= tol else []
        if self._walks > 1:
            reached = self._with_their_walks(reached)
        if len(reached) == len(self._active):
            self._converged = True
        elif reached and self._independent:
            self._stops.append(self._kept(reached))
            stopped = set(reached)
            self._active = [i for i in self._active if i not in stopped]

    def _with_their_walks(self, reached: list[int]) -> list[int]:
        """The active rows of every sample that has a row in `reached`."""
        samples = len(self._held) // self._walks
        stopping = {i % samples for i in reached}
        return [i for i in self._active if i % samples in stopping]

    def _kept(self, samples: list[int]) -> "_Stop":
        rows = torch.tensor(samples, device=self._value.device)
        state, value = self._state.index_select(0, rows), self._value.index_select(0, rows)
        return _Stop(self._spent, samples, rows, state, value, [self._held[i] for i in samples])

    def _solution(self) -> Solution:
        value, state, residuals, counts = self._value, self._state, self._held, [self._spent] * len(self._held)
        if self._stops:
            value, state, residuals = value.clone(), state.clone(), residuals.copy()
        for stop in self._stops:
            state.index_copy_(0, stop.rows, stop.state)
            value.index_copy_(0, stop.rows, stop.value)
            for i, number in zip(stop.samples, stop.residual, strict=True):
                residuals[i], counts[i] = number, stop.index
        return Solution(
            value=value,
            state=state,
            spent=self._spent,
            residuals=residuals,
            counts=counts,
            results=[Result.CONVERGED] * len(residuals) if self._converged else self._results(residuals),
            earlier=self._earlier,
        )

    def _results(self, held: list[float]) -> list[Result]:
        """How each sample of a batch that has not converged ended; held: residuals of the answers."""
        z0, f0 = self._first
        growth = (norms(self._value - self._state) / norms(f0 - z0)).tolist()
        ended = [Result.DIVERGED if number > DIVERGENCE else Result.BUDGET_SPENT for number in growth]
        for i in self._lost:
            # An f that is infinite from the start has not grown.
            grew = i in self._overflowed and math.isfinite(held[i])
            ended[i] = Result.DIVERGED if grew or ended[i] is Result.DIVERGED else Result.NON_FINITE
        if self._tol is not None:
            ended = [
                Result.CONVERGED if number <= self._tol else code for number, code in zip(held, ended, strict=True)
            ]
        return ended


@dataclass(frozen=True, slots=True)
class _Stop:
    """Samples (their `rows` as an index) that stopped at one look, and what they keep."""

    index: int
    samples: list[int]
    rows: Tensor
    state: Tensor
    value: Tensor
    residual: list[float]


def _finite(states: Tensor) -> list[bool]:
    """Per sample, whether every number is finite."""
    finite: list[bool] = torch.isfinite(states).flatten(1).all(dim=1).tolist()
    return finite


def _infinite(states: Tensor) -> list[bool]:
    """Per sample, whether it holds an infinity and no NaN: it grew beyond the numbers."""
    infinite: list[bool] = (torch.isinf(states).flatten(1).any(1) & ~torch.isnan(states).flatten(1).any(1)).tolist()
    return infinite


def _checked(f: StepFunction) -> StepFunction:
    """f, refusing an image unlike its state before that is one of a stack."""

    def checked(z: Tensor) -> Tensor:
        fz = f(z)
        _check_image(fz, z)
        return fz

    return checked


def _check_image(fz: Tensor, z: Tensor) -> None:
    if fz.shape != z.shape:
        raise ConfigError(
            f"solve: the cell maps a state of shape {tuple(z.shape)} to {tuple(fz.shape)}; both must be alike"
        )
    if fz.dtype != z.dtype:
        raise ConfigError(
            f"solve: the cell maps a state of {z.dtype} to {fz.dtype}; build cell and z0 with the same dtype"
        )

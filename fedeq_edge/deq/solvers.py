"""Fixed points z = f(z) of a batch within an exact number of evaluations.

Theory of operation. One driver (`solve`) owns the budget, the residuals and the stopping of single samples. A solver is
a frozen bundle of settings; `begin` gives its memory for one solve, which answers two questions after each evaluation:
which samples take the new state as their answer, and where f is evaluated next. Iteration n, all per sample:

    f = step(z);  r_n = |f - z| / max(|f|, 1e-6);  done = r <= tol, of the iteration before
    value, r = (f, r_n) where not done (and accepted);  evaluations += not done
    stop when every r <= tol, or n = budget

so a sample stops at its own residual whatever its batch mates do, and an ONNX Loop can count the same. Comparisons are
written so that NaN means "not done", and selection is `torch.where`, never mask * value: 0 * inf is NaN (the defect of
torchdeq 0.1.0's batch mixing).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedeq_edge.deq.batch import norms, per_sample
from fedeq_edge.deq.solution import Result, Solution
from fedeq_edge.errors import ConfigError

StepFunction = Callable[[Tensor], Tensor]

# Below this norm a state counts as zero in the relative residual; the exported ONNX loop uses the same number.
SMALLEST_NORM = 1e-6
# |f(z) - z| may grow for a while in a non-normal contraction; growth beyond ten times the first step is no transient.
DIVERGENCE = 10.0


class Memory(Protocol):
    """What a solver remembers during one solve."""

    def accepts(self, residual: Tensor, held: Tensor) -> Tensor:
        """(B,) bool: samples whose evaluation, of that residual, replaces the held answer with the held residual."""
        ...

    def advance(self, z: Tensor, fz: Tensor, held: Tensor, index: int) -> Tensor:
        """Where f is evaluated next, given f(z) of evaluation `index` and the answer held so far."""
        ...


class Solver(Protocol):
    """Settings of a method."""

    @property
    def measures(self) -> bool:
        """Whether the method needs the residual after every evaluation."""
        ...

    def begin(self, z0: Tensor) -> Memory:
        """Memory for one solve from z0."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Picard:
    """z <- (1 - damping) z + damping f(z): the cheapest, and the best where the cell contracts fast (rate below 0.6).

    Returns f of the last z: z_K = f(z_{K-1}) with the residual |z_K - z_{K-1}| / |z_K|. 0 < damping <= 1.
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.damping <= 1.0:
            raise ConfigError(f"Picard: damping is {self.damping}; choose 0 < damping <= 1 (1 is the plain iteration)")

    @property
    def measures(self) -> bool:
        """No: residuals serve the stopping rule alone."""
        return False

    def begin(self, z0: Tensor) -> Memory:
        """Nothing to remember but the damping."""
        del z0
        return _PicardMemory(self.damping)


@dataclass(frozen=True, slots=True)
class _PicardMemory:
    damping: float

    def accepts(self, residual: Tensor, held: Tensor) -> Tensor:
        del held
        return torch.isfinite(residual)

    def advance(self, z: Tensor, fz: Tensor, held: Tensor, index: int) -> Tensor:
        del held, index
        return fz if self.damping == 1.0 else z.lerp(fz, self.damping)


@dataclass(frozen=True, slots=True, kw_only=True)
class Anderson:
    """Anderson acceleration type II, per sample: for cells that contract slowly.

    memory: evaluations kept (m). mixing: weight beta of f against z in the mix. every: mix at every so manieth
    evaluation and step plainly between (alternating Anderson-Picard; 3 measured best on CPUs). ridge: added to the Gram
    matrix of residuals divided by its largest diagonal, so that the scale of the activations does not matter. growth: a
    residual this many times the best refuses the mix (a guard of 2 cost thousands of evaluations on a benign problem).

    A refused or non-finite mix falls back to the best f(z) and forgets that sample's history; the best evaluation is
    returned. Source: Walker & Ni, SIAM J. Numer. Anal. 49 (2011), algorithm AA; the guards are ours.
    """

    memory: int = 5
    mixing: float = 1.0
    every: int = 1
    ridge: float = 1e-6
    growth: float = 1e3

    def __post_init__(self) -> None:
        if self.memory < 1 or self.every < 1:
            raise ConfigError(f"Anderson: memory {self.memory} and every {self.every} must be at least 1")
        if not (0.0 < self.mixing <= 1.0 and self.ridge > 0.0 and self.growth > 1.0):
            raise ConfigError(
                "Anderson: needs 0 < mixing <= 1, ridge > 0 and growth > 1, "
                f"not {self.mixing}, {self.ridge}, {self.growth}"
            )

    @property
    def measures(self) -> bool:
        """Yes: the best evaluation is kept and growth is watched."""
        return True

    def begin(self, z0: Tensor) -> Memory:
        """Empty history for the batch z0 (B, ...): two states per entry."""
        return _AndersonMemory(self, z0)


class _AndersonMemory:
    """Ring of the last m pairs (f(z), f(z) - z) per sample and the Gram matrix of the second."""

    def __init__(self, settings: Anderson, z0: Tensor) -> None:
        batch, m = z0.shape[0], settings.memory
        self._settings = settings
        self._states = z0.new_zeros(batch, m, z0[0].numel())
        self._steps = torch.zeros_like(self._states)
        self._gram = z0.new_zeros(batch, m, m)
        self._used = z0.new_zeros(batch, m, dtype=torch.bool)
        self._refused = z0.new_zeros(batch, dtype=torch.bool)

    def accepts(self, residual: Tensor, held: Tensor) -> Tensor:
        # Written so that a NaN residual is refused.
        self._refused = ~(residual <= self._settings.growth * held)
        return residual < held

    def advance(self, z: Tensor, fz: Tensor, held: Tensor, index: int) -> Tensor:
        self._remember(z, fz, index)
        if index % self._settings.every:
            return torch.where(per_sample(self._refused, fz), held, fz)
        mixed = self._mix().reshape(fz.shape)
        sound = torch.isfinite(norms(mixed)) & ~self._refused
        self._used &= sound[:, None]
        return torch.where(per_sample(sound, fz), mixed, held)

    def _remember(self, z: Tensor, fz: Tensor, index: int) -> None:
        slot = (index - 1) % self._settings.memory
        keep = ~self._refused
        # Zeros in place of a refused evaluation: its NaN would survive any weight of zero.
        state = torch.where(per_sample(keep, fz), fz, 0.0).flatten(1)
        step = torch.where(per_sample(keep, fz), fz - z, 0.0).flatten(1)
        self._states[:, slot], self._steps[:, slot] = state, step
        # Products and a sum: a batched matrix-vector product is five times slower at these sizes (5 x 1024 on a CPU).
        row = (self._steps * step[:, None, :]).sum(dim=2)
        self._gram[:, slot], self._gram[:, :, slot] = row, row
        self._used &= keep[:, None]
        self._used[:, slot] = keep

    def _mix(self) -> Tensor:
        """sum_i alpha_i (f_i - (1 - beta) r_i) with alpha minimising |sum_i alpha_i r_i|, sum alpha = 1."""
        weights = self._weights()[:, None, :]
        mixed = torch.bmm(weights, self._states)
        if self._settings.mixing < 1.0:
            mixed -= (1.0 - self._settings.mixing) * torch.bmm(weights, self._steps)
        return mixed[:, 0]

    def _weights(self) -> Tensor:
        """alpha (B, m): zero for unused entries, whose rows are replaced by those of the identity."""
        both = self._used[:, :, None] & self._used[:, None, :]
        gram = torch.where(both, self._gram, 0.0)
        largest = gram.diagonal(dim1=1, dim2=2).amax(dim=1).clamp_min(torch.finfo(gram.dtype).tiny)
        diagonal = torch.where(self._used, self._settings.ridge, 1.0)
        system = gram / largest[:, None, None] + torch.diag_embed(diagonal).to(gram.dtype)
        # solve_ex never raises: a singular system gives non-finite weights, which the caller refuses.
        raw = torch.linalg.solve_ex(system, self._used.to(gram.dtype))[0]
        weights: Tensor = raw / raw.sum(dim=1, keepdim=True)
        return weights


def solve(
    f: StepFunction,
    z0: Tensor,
    *,
    solver: Solver | None = None,
    budget: int,
    tol: float = 1e-4,
    check_every: int = 1,
    throw: bool = False,
) -> Solution:
    """Fixed point of the batched map f from z0 (B, ...), with at most `budget` evaluations of f, counted exactly.

    solver: Picard() if None. tol: relative residual at which a sample stops; 0 never stops and, with Picard, measures
    the first and the last evaluation only. check_every: evaluations between two looks of Picard at the residual (the
    last is always looked at; Anderson looks at each). throw: raise SolverError unless every sample converged.
    Records no graph; never raises for NaN. Raises ConfigError for a budget below 1.
    """
    _check_limits(budget, tol, check_every)
    with torch.no_grad():
        run = _Run(z0.detach(), solver or Picard(), tol)
        for index in range(1, budget + 1):
            finished = run.evaluate(f, index, look=index == budget or (tol > 0.0 and index % check_every == 0))
            if finished:
                break
        solution = run.solution()
    if throw:
        solution.throw()
    return solution


def iterate(f: StepFunction, z0: Tensor, *, evaluations: int, solver: Solver | None = None) -> Tensor:
    """The state after exactly so many evaluations (0: z0), without graph and, with Picard, without any measurement.

    The hot path of training: what it costs is what f costs.
    """
    method = solver or Picard()
    if evaluations and method.measures:
        return solve(f, z0, solver=method, budget=evaluations, tol=0.0).value
    with torch.no_grad():
        z = z0.detach()
        memory = method.begin(z)
        for index in range(1, evaluations + 1):
            z = memory.advance(z, f(z), z, index)
    return z


def relative_residual(z: Tensor, fz: Tensor) -> Tensor:
    """(B,) |f(z) - z| / max(|f(z)|, 1e-6), L2 over everything but the batch."""
    return norms(fz - z) / norms(fz).clamp_min(SMALLEST_NORM)


class _Run:
    """State of one solve between evaluations; `active` is None while every sample iterates."""

    def __init__(self, z0: Tensor, solver: Solver, tol: float) -> None:
        batch = z0.shape[0]
        self._tol, self._measures = tol, solver.measures
        self._memory = solver.begin(z0)
        self._z = self._value = z0
        self._residual = z0.new_full((batch,), torch.inf)
        self._evaluations = z0.new_zeros(batch, dtype=torch.int64)
        self._active: Tensor | None = None
        self._spent = self._counted = 0

    def evaluate(self, f: StepFunction, index: int, *, look: bool) -> bool:
        """Spend one evaluation; whether every sample has stopped."""
        z, fz = self._z, f(self._z)
        self._spent = index
        if index == 1:
            self._first_step = norms(fz - z)
        if look or self._measures:
            self._look(z, fz)
            if self._tol > 0.0 and self._stop():
                return True
        # Stopped samples go on being evaluated with their batch; their answer is held and no other sample sees them.
        self._z = self._memory.advance(z, fz, self._value, index)
        return False

    def _look(self, z: Tensor, fz: Tensor) -> None:
        """Measure, and let the samples that still iterate take their new answer."""
        self._last_step = norms(fz - z)
        self._last_residual = self._last_step / norms(fz).clamp_min(SMALLEST_NORM)
        accepted = self._memory.accepts(self._last_residual, self._residual)
        since, self._counted = self._spent - self._counted, self._spent
        if self._active is None:
            self._evaluations += since
        else:
            accepted &= self._active
            self._evaluations += since * self._active
        self._value = torch.where(per_sample(accepted, fz), fz, self._value)
        self._residual = torch.where(accepted, self._last_residual, self._residual)

    def _stop(self) -> bool:
        """Stop samples that reached the tolerance; whether all have. The one host synchronisation of a look."""
        active = ~(self._residual <= self._tol)
        remaining = int(active.sum())
        self._active = None if remaining == len(active) else active
        return remaining == 0

    def solution(self) -> Solution:
        ended = torch.full_like(self._evaluations, Result.BUDGET_SPENT)
        ended[self._last_step > DIVERGENCE * self._first_step] = Result.DIVERGED
        ended[~torch.isfinite(self._last_residual)] = Result.NON_FINITE
        ended[self._residual <= self._tol] = Result.CONVERGED
        return Solution(
            value=self._value, residual=self._residual, evaluations=self._evaluations, spent=self._spent, result=ended
        )


def _check_limits(budget: int, tol: float, check_every: int) -> None:
    if budget < 1 or check_every < 1 or not tol >= 0.0:
        raise ConfigError(
            f"solve: budget {budget} and check_every {check_every} must be at least 1 and tol {tol} at least 0"
        )

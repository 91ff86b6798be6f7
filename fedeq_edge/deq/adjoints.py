"""Gradients at a fixed point: with v = dloss/dz and J = df/dz, the vector u = v + J^T u, then u^T df/dtheta.

Theory of operation. Of the K evaluations that a forward pass spends, a method says how many keep their graph
(`graphed`) and makes those itself (`attach`); the others are made before, without graph. Two families share that seam:

- `KTerm` and `Implicit` keep one. They pass its outcome through an identity whose backward turns v into u by products
  with J^T; autograd then carries u through that one evaluation to the parameters and to the injection. So memory is
  that of one evaluation whatever K is. The products come from the same graph, or from a formula of the cell
  (`linearise`), which is 1.6 to 2 times cheaper on a dense cell and hardly so on a convolution.
- `Unrolled` keeps several and differentiates through all of them: memory grows with their number.

Use `loss.backward(inputs=[...parameters...])` (or `DEQ.backward`): without `inputs` autograd also computes the gradient
with respect to the detached z, one needless product.

The error of the gradient is O(r + b): forward residual and backward residual (algorithm.md section 3). No gradient is
replaced in silence: where u could not be had, v takes its place (that is JFB) and the report says so; where the
incoming v is not finite, backward raises SolverError.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any, Protocol

import torch
from torch import Tensor

from fedeq_edge.deq.batch import norms, per_sample, relative_residual
from fedeq_edge.deq.method import Solver
from fedeq_edge.deq.solution import Result
from fedeq_edge.deq.solvers import StepFunction, solve
from fedeq_edge.errors import ConfigError, SolverError

AdjointStep = Callable[[Tensor, Tensor], Tensor]
"""(v, u) -> v + J^T u, all (B, ...), at one state: an evaluation of the adjoint equation. Changes neither argument."""
Linearise = Callable[[Tensor], AdjointStep]
"""From f(z) to the adjoint equation at z."""

# Below it a per-sample gradient counts as zero: the smallest normal float32 and some room for its square root.
_SMALLEST_GRADIENT = 1e-30


@dataclass(slots=True)
class AdjointReport:
    """What the backward pass found; filled in when it runs, NaN before.

    terms: products with J^T spent. residual: mean over the batch of |last term| / |u| (`Implicit`: relative residual;
    `Unrolled`: |gradient at the first of its states| / |v|); 1 where v was taken for u.
    result: worst over the batch; from DIVERGED on, the samples concerned took v for u.
    """

    terms: int = 0
    residual: float = nan
    result: Result = Result.BUDGET_SPENT


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjoined:
    """u (B, ...), finite where v is, and what to report of it."""

    value: Tensor
    terms: int
    residual: float
    result: Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """value (B, ...): the last evaluation, with a graph. residual (B,): its forward relative residual, without one.

    report: of the backward pass through `value`, filled in when that runs.
    """

    value: Tensor
    residual: Tensor
    report: AdjointReport


class Adjoint(Protocol):
    """Settings of a gradient method."""

    def graphed(self, budget: int) -> int:
        """How many of `budget` >= 1 evaluations the method makes itself, with their graph: from 1 to `budget`."""
        ...

    def attach(
        self, f: StepFunction, z: Tensor, *, evaluations: int = 1, linearise: Linearise | None = None
    ) -> Attached:
        """The outcome of `evaluations` = graphed(K) evaluations of f from z (B, ...), ready for backward.

        linearise: the products with J^T by formula, where the cell has one (`cell.LinearisableCell`).
        Backward raises SolverError for a gradient that comes in as NaN or infinity.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KTerm:
    """Truncated Neumann series u = sum_{i=0..k} (J^T)^i v; k = 0 is JFB (Fung et al., AAAI 2022).

    |u - u_k| <= g^(k+1) / (1 - g) |v| where |J| <= g (algorithm.md section 3).
    """

    terms: int

    def __post_init__(self) -> None:
        if self.terms < 0:
            raise ConfigError(f"KTerm: terms is {self.terms}; use 0 (JFB) or more")

    def graphed(self, budget: int) -> int:
        """One."""
        del budget
        return 1

    def attach(
        self, f: StepFunction, z: Tensor, *, evaluations: int = 1, linearise: Linearise | None = None
    ) -> Attached:
        """One evaluation at z, its backward followed by `terms` products."""
        del evaluations
        return _attach(self, f, z, linearise)

    def solve(self, step: AdjointStep, v: Tensor) -> Adjoined:
        """The partial sum by Horner's rule, u <- v + J^T u; the residual is that of its last term, 1 for JFB."""
        u, before = v, torch.zeros_like(v)
        for _ in range(self.terms):
            u, before = step(v, u), u
        residual = norms(u - before) / norms(u).clamp_min(_SMALLEST_GRADIENT)
        mean = float(residual.mean())
        if isfinite(mean):
            return Adjoined(value=u, terms=self.terms, residual=mean, result=Result.BUDGET_SPENT)
        return _fallen_back(u, v, torch.isfinite(residual), residual, self.terms, Result.NON_FINITE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Implicit:
    """The adjoint solved as a fixed point of its own, with at most `budget` products, to the relative tolerance `tol`.

    The incoming gradient is brought to norm 1 per sample first, so the tolerance does not depend on the loss's scale
    (an absolute one cost torchdeq 0.1.0 four digits on a mean loss). solver: as in `solvers.solve`; an accelerated one
    pays where J contracts slowly. tol None spends the whole budget.
    """

    budget: int
    tol: float | None = 1e-4
    solver: Solver | None = None

    def __post_init__(self) -> None:
        if self.budget < 1 or not (self.tol is None or self.tol > 0.0):
            raise ConfigError(f"Implicit: budget {self.budget} must be at least 1 and tol {self.tol} None or above 0")

    def graphed(self, budget: int) -> int:
        """One."""
        del budget
        return 1

    def attach(
        self, f: StepFunction, z: Tensor, *, evaluations: int = 1, linearise: Linearise | None = None
    ) -> Attached:
        """One evaluation at z, its backward followed by the adjoint solve."""
        del evaluations
        return _attach(self, f, z, linearise)

    def solve(self, step: AdjointStep, v: Tensor) -> Adjoined:
        """u to the tolerance, or as far as the budget goes; samples whose adjoint diverges keep v."""
        scale = per_sample(norms(v), v)
        unit = v / scale.clamp_min(_SMALLEST_GRADIENT)
        found = solve(lambda u: step(unit, u), unit, solver=self.solver, budget=self.budget, tol=self.tol)
        u = found.value * scale
        if found.worst < Result.DIVERGED:
            residual = float(found.residual.mean())
            return Adjoined(value=u, terms=found.spent, residual=residual, result=found.worst)
        return _fallen_back(u, v, found.result < Result.DIVERGED, found.residual, found.spent, found.worst)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unrolled:
    """Differentiation through the last `steps` evaluations z <- (1 - damping) z + damping f(z), None: through all K.

    None is back-propagation through the iteration, the reference for the other methods; it also reaches z_0 where that
    depends on the injection. A number is the phantom gradient of Geng et al., "On training implicit models", NeurIPS
    2021, arXiv 2111.05177; damping is their lambda. Memory: that of so many evaluations.
    """

    steps: int | None = None
    damping: float = 1.0

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"Unrolled: steps is {self.steps}; use 1 or more, or None for every evaluation")
        if not 0.0 < self.damping <= 1.0:
            raise ConfigError(f"Unrolled: damping is {self.damping}; choose 0 < damping <= 1")

    def graphed(self, budget: int) -> int:
        """`steps`, or the whole budget."""
        return budget if self.steps is None else min(self.steps, budget)

    def attach(
        self, f: StepFunction, z: Tensor, *, evaluations: int = 1, linearise: Linearise | None = None
    ) -> Attached:
        """So many evaluations from z, each with its graph."""
        del linearise  # autograd walks the graph by itself
        states, fz = [z], z
        with torch.enable_grad():
            for _ in range(evaluations):
                fz = f(states[-1])
                states.append(fz if self.damping == 1.0 else states[-1].lerp(fz, self.damping))
        report = AdjointReport()
        if states[-1].requires_grad:
            _observe(states[1], states[-1], report, terms=evaluations - 1)
        residual = relative_residual(states[-2].detach(), fz.detach())
        return Attached(value=states[-1], residual=residual, report=report)


class _AdjointEquation(Protocol):
    """A method that solves u = v + J^T u."""

    def solve(self, step: AdjointStep, v: Tensor) -> Adjoined: ...


def _attach(equation: _AdjointEquation, f: StepFunction, z: Tensor, linearise: Linearise | None) -> Attached:
    """f(z) with a graph, whose backward is that of the fixed point; higher derivatives are refused."""
    report = AdjointReport()
    z = z.detach()
    if linearise is None:
        z.requires_grad_()
    with torch.enable_grad():
        fz = f(z)
        value: Tensor = _FixedPoint.apply(  # type: ignore[no-untyped-call]  # torch leaves apply untyped
            fz, equation, linearise or _recorded(fz, z), report
        )
    return Attached(value=value, residual=relative_residual(z.detach(), fz.detach()), report=report)


def _recorded(fz: Tensor, z: Tensor) -> Linearise:
    """Products with J^T on the graph that f left between z and fz."""

    def step(v: Tensor, u: Tensor) -> Tensor:
        if torch._C._are_functorch_transforms_active():  # `Guaranteed` stacks two u, and a scalar would hold neither
            stacked: Tensor = torch.autograd.grad(fz, z, u, retain_graph=True)[0]
            return v + stacked
        with torch.enable_grad():
            weighed: Tensor = _Weighed.apply(fz, u)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        return v + torch.autograd.grad(weighed, z, retain_graph=True)[0]

    return lambda _: step


class _Weighed(torch.autograd.Function):
    """A scalar whose gradient is u, for <f(z), u>, which nobody reads.

    Given u itself, torch compares shapes by its symbolic ones, for which it imports sympy: half a second and 35 MB.
    """

    @staticmethod
    def forward(ctx: Any, fz: Tensor, u: Tensor) -> Tensor:
        ctx.u = u
        return fz.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        found: Tensor = ctx.u
        return found, None


class _FixedPoint(torch.autograd.Function):
    """Identity of f(z) forward; v -> u backward."""

    @staticmethod
    def forward(
        ctx: Any,
        fz: Tensor,
        equation: _AdjointEquation,
        linearise: Linearise,
        report: AdjointReport,
    ) -> Tensor:
        # Attributes instead of save_for_backward: fz must keep its graph. No cycle: fz does not refer to the output.
        ctx.fz, ctx.equation, ctx.linearise, ctx.report = fz, equation, linearise, report
        return fz.view_as(fz)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():  # once_differentiable lets autograd.grad(..., inputs) go on with a part missing
            raise ConfigError(
                "backward: create_graph asks for second derivatives, which KTerm and Implicit lack; use Unrolled()"
            )
        (v,) = gradients
        found: Adjoined = ctx.equation.solve(ctx.linearise(ctx.fz.detach()), v)
        if found.result >= Result.DIVERGED:
            _refuse_non_finite(v)  # only now: a test of every gradient would cost a host synchronisation more
        ctx.report.terms, ctx.report.residual, ctx.report.result = found.terms, found.residual, found.result
        return found.value, None, None, None


def _fallen_back(u: Tensor, v: Tensor, sound: Tensor, residual: Tensor, terms: int, result: Result) -> Adjoined:
    """u where a sample is `sound` (B,), else v."""
    return Adjoined(
        value=torch.where(per_sample(sound, v), u, v),
        terms=terms,
        residual=float(torch.where(sound, residual, 1.0).mean()),
        result=result,
    )


def _observe(first: Tensor, last: Tensor, report: AdjointReport, *, terms: int) -> None:
    """Hooks that fill the report while autograd walks from the `last` unrolled state to the `first`."""
    incoming: list[Tensor] = []

    def arrive(v: Tensor) -> None:
        _refuse_non_finite(v)
        incoming.append(norms(v))

    def leave(oldest: Tensor) -> None:
        report.terms = terms
        report.residual = float((norms(oldest) / incoming.pop().clamp_min(_SMALLEST_GRADIENT)).mean())
        if not isfinite(report.residual):
            report.result = Result.NON_FINITE

    last.register_hook(arrive)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    first.register_hook(leave)  # type: ignore[no-untyped-call]  # as above


def _refuse_non_finite(v: Tensor) -> None:
    """Raise SolverError unless v (B, ...) is finite."""
    spoilt = len(v) - int(torch.isfinite(v).flatten(1).all(dim=1).sum())
    if spoilt:
        raise SolverError(
            f"backward: the gradient that reaches the fixed point is not finite for {spoilt} of {len(v)} samples; "
            "look at the loss and at what follows the equilibrium"
        )

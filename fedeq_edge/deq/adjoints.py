"""Gradients at a fixed point: with v = dloss/dz and J = df/dz, the vector u = v + J^T u, then u^T df/dtheta.

Theory of operation. `attach` evaluates f once with a graph, at a detached z, and passes the outcome through an identity
whose backward turns v into u by vector-Jacobian products on that same graph; autograd then carries u through f to the
parameters and to the injection. So memory is that of one evaluation whatever the budget was, and training with a budget
of K spends K - 1 evaluations without graph and one here.

Use `loss.backward(inputs=[...parameters...])` (or `DEQ.backward`): without `inputs` autograd also computes the gradient
with respect to the detached z, one needless product.

The error of the gradient is O(r + b): forward residual and backward residual (algorithm.md section 3).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import nan
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedeq_edge.deq.batch import norms, per_sample
from fedeq_edge.deq.solution import Result
from fedeq_edge.deq.solvers import Picard, Solver, StepFunction, solve
from fedeq_edge.errors import ConfigError

# Below it a per-sample gradient counts as zero: the smallest normal float32 and some room for its square root.
_SMALLEST_GRADIENT = 1e-30


@dataclass(slots=True)
class AdjointReport:
    """What the backward pass found; filled in when it runs, NaN before.

    terms: products with J^T spent. residual: mean over the batch of |last term| / |u| (`Implicit`: relative residual).
    result: worst over the batch. NON_FINITE says that u is not the adjoint: the last finite u took its place.
    """

    terms: int = 0
    residual: float = nan
    result: Result = Result.BUDGET_SPENT


@dataclass(frozen=True, slots=True)
class Adjoined:
    """u (B, ...), and what to report of it."""

    value: Tensor
    terms: int
    residual: Tensor
    result: Result


class Adjoint(Protocol):
    """Settings of a gradient method."""

    def solve(self, vjp: StepFunction, v: Tensor) -> Adjoined:
        """u = v + J^T u, as far as the method goes; vjp maps u to J^T u."""
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

    def solve(self, vjp: StepFunction, v: Tensor) -> Adjoined:
        """The partial sum; the residual is that of its last term, 1 for JFB."""
        value = term = v
        for _ in range(self.terms):
            term = vjp(term)
            value = value + term
        norm = norms(value)
        residual = torch.where(norm > 0.0, norms(term) / norm.clamp_min(_SMALLEST_GRADIENT), norm)
        finite = torch.isfinite(norm)
        result = Result.BUDGET_SPENT if bool(finite.all()) else Result.NON_FINITE
        if result is Result.NON_FINITE:
            value = torch.where(per_sample(finite, v), value, v)
        return Adjoined(value=value, terms=self.terms, residual=residual, result=result)


@dataclass(frozen=True, slots=True, kw_only=True)
class Implicit:
    """The adjoint solved as a fixed point of its own, with at most `budget` products, to the relative tolerance `tol`.

    The incoming gradient is brought to norm 1 per sample first, so the tolerance does not depend on the loss's scale
    (an absolute one cost torchdeq 0.1.0 four digits on a mean loss).
    """

    budget: int
    tol: float = 1e-4
    solver: Solver = field(default_factory=Picard)

    def solve(self, vjp: StepFunction, v: Tensor) -> Adjoined:
        """u to the tolerance, or the best within the budget."""
        scale = per_sample(norms(v), v)
        unit = v / scale.clamp_min(_SMALLEST_GRADIENT)
        found = solve(lambda u: unit + vjp(u), unit, solver=self.solver, budget=self.budget, tol=self.tol)
        return Adjoined(value=found.value * scale, terms=found.spent, residual=found.residual, result=found.worst)


def attach(f: Callable[[Tensor], Tensor], z: Tensor, *, adjoint: Adjoint) -> tuple[Tensor, AdjointReport]:
    """(f(z), report): one evaluation with a graph, whose backward is that of the fixed point.

    z (B, ...) needs no graph. The report is filled when backward runs; higher derivatives are refused.
    """
    report = AdjointReport()
    z = z.detach().requires_grad_()
    with torch.enable_grad():
        fz = f(z)
        out: Tensor = _FixedPoint.apply(fz, z, adjoint, report)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return out, report


class _FixedPoint(torch.autograd.Function):
    """Identity of f(z) forward; v -> u backward."""

    @staticmethod
    def forward(ctx: Any, fz: Tensor, z: Tensor, adjoint: Adjoint, report: AdjointReport) -> Tensor:
        # Attributes instead of save_for_backward: fz must keep its graph. No cycle, since neither refers to the output.
        ctx.fz, ctx.z, ctx.adjoint, ctx.report = fz, z, adjoint, report
        return fz.view_as(fz)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides the name of ctx
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, None, None, None]:
        def vjp(u: Tensor) -> Tensor:
            product: Tensor = torch.autograd.grad(ctx.fz, ctx.z, u, retain_graph=True)[0]
            return product

        found: Adjoined = ctx.adjoint.solve(vjp, gradients[0])
        ctx.report.terms, ctx.report.result = found.terms, found.result
        ctx.report.residual = float(found.residual.mean())
        return found.value, None, None, None

"""The whole model: stem, equilibrium, pooled linear head, over two flat parameter vectors."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedeq_edge.consensus.constraint import project
from fedeq_edge.deq.adjoints import Adjoint, AdjointReport, KTerm
from fedeq_edge.deq.cell import LinearisableCell, MonotoneCell, build_cell, build_stem
from fedeq_edge.deq.flat import FlatModule
from fedeq_edge.deq.layout import constraints, head_layout, theta_layout
from fedeq_edge.deq.method import Picard, Solver
from fedeq_edge.deq.penalty import jacobian_penalty
from fedeq_edge.deq.solution import Solution
from fedeq_edge.deq.solvers import StepFunction, iterate, solve
from fedeq_edge.deq.spec import ModelSpec


class Budget(Protocol):
    """Solver work per sample: forward evaluations K >= 1, adjoint terms k >= 0 (training/step.py has the value)."""

    @property
    def forward(self) -> int:
        """K."""
        ...

    @property
    def adjoint(self) -> int:
        """k."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Forward pass of a batch. logits (B, classes); features (B, spec.features), the head's input; state (B,
    *state_shape), the last evaluation, without graph; injection, as large; residual (B,) of the last evaluation;
    evaluations (B,) int64; report of the backward pass, None without gradient.
    """

    logits: Tensor
    features: Tensor
    state: Tensor
    injection: Tensor
    residual: Tensor
    evaluations: Tensor
    report: AdjointReport | None


class DEQ(FlatModule):
    """The model that `spec` describes, all parameters zero until `load`. theta: stem and cell."""

    def __init__(self, spec: ModelSpec, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec = spec
        self.stem = build_stem(spec).to(dtype)
        self.cell = build_cell(spec)
        self.head = nn.Linear(spec.features, spec.classes, device="meta")
        self.flatten(theta_layout(spec), head_layout(spec), dtype)
        self._constraints = constraints(spec)
        self._windows = spec.pool_windows
        self._linearise = self.cell.linearise if isinstance(self.cell, LinearisableCell) else None

    def __deepcopy__(self, memo: dict[int, object]) -> "DEQ":
        # torch copies parameter by parameter and would cut the copy's views.
        del memo
        twin = DEQ(self.spec, dtype=self.theta.dtype)
        for name in ("theta", "theta_grad", "head_vector", "head_grad"):
            getattr(twin, name).copy_(getattr(self, name))
        twin._follow_theta()
        return twin

    def project(self) -> None:
        """theta lies in the constraint set of the spec, moved by the least distance (CPU only)."""
        project(self.theta.numpy(), self._constraints)
        self._follow_theta()

    def inject(self, x: Tensor) -> Tensor:
        """Injection (B, *state_shape) of samples x (B, *input_shape)."""
        injection: Tensor = self.stem(x)
        return injection

    def features(self, z: Tensor) -> Tensor:
        """(B, spec.features): the state averaged over the pooling grid, flattened in C order."""
        if not self._windows:
            return z
        if self.spec.pool == 1:
            return z.flatten(2).mean(dim=2)
        kernels, strides = zip(*self._windows, strict=True)
        pool = functional.avg_pool1d if len(kernels) == 1 else functional.avg_pool2d
        pooled: Tensor = pool(z, kernels, strides)
        return pooled.flatten(1)

    def solve(self, x: Tensor, *, budget: int, tol: float | None = None, solver: Solver | None = None) -> Solution:
        """Equilibrium states of samples x (B, *input_shape), without graph. solver: Picard() if None."""
        with torch.no_grad():
            injection = self.inject(x)
            z = self.cell.start(injection)
            return solve(self._step(injection), z, solver=solver or Picard(), budget=budget, tol=tol)

    def forward(
        self,
        x: Tensor,
        *,
        budget: Budget,
        start: Tensor | None = None,
        tol: float | None = None,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
    ) -> Output:
        """Logits of samples x (B, *input_shape) with at most `budget.forward` evaluations per sample.

        With gradients enabled the last evaluation carries the graph (`adjoint` may keep more) and backward spends
        `budget.adjoint` terms, or what `adjoint` says; that path always spends the whole budget. Without gradients a
        sample stops at `tol`. solver: Picard() if None. start: z_0 (B, *state_shape), such as the state of an earlier
        pass; the cell's own if None.
        """
        injection = self.inject(x)
        f = self._step(injection)
        z = self.cell.start(injection) if start is None else start
        if not torch.is_grad_enabled():
            found = solve(f, z, solver=solver or Picard(), budget=budget.forward, tol=tol)
            return self._answer(found.value, injection, found.residual, found.evaluations, None)
        method = adjoint or KTerm(terms=budget.adjoint)
        graphed = method.graphed(budget.forward)
        if graphed < budget.forward:
            z = iterate(f, z, evaluations=budget.forward - graphed, solver=solver)
        attached = method.attach(f, z, evaluations=graphed, linearise=self._linearise)
        evaluations = torch.full((len(x),), budget.forward, dtype=torch.int64, device=x.device)
        return self._answer(attached.value, injection, attached.residual, evaluations, attached.report)

    def jacobian_penalty(self, output: Output, generator: torch.Generator) -> Tensor:
        """The penalty of `penalty.jacobian_penalty` at the state of a forward pass with graph, a scalar.

        To be added to the loss before `backward`; costs an evaluation with graph beyond the pass's budget.
        """
        return jacobian_penalty(self._step(output.injection), output.state, generator)

    def _follow_theta(self) -> None:
        if isinstance(self.cell, MonotoneCell):
            self.cell.choose_step()

    def _step(self, injection: Tensor) -> StepFunction:
        step = self.cell.step
        return lambda z: step(z, injection)

    def _answer(
        self,
        z: Tensor,
        injection: Tensor,
        residual: Tensor,
        evaluations: Tensor,
        report: AdjointReport | None,
    ) -> Output:
        features = self.features(z)
        return Output(
            logits=self.head(features),
            features=features,
            state=z.detach(),
            injection=injection,
            residual=residual,
            evaluations=evaluations,
            report=report,
        )

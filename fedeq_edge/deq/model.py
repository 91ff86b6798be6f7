"""The whole model: stem, equilibrium, pooled linear head, over two flat parameter vectors.

`DEQ` keeps theta (stem and cell) and head each in one flat tensor; its parameters are views of them and their gradients
are views of two flat gradient tensors. What travels is flat, so loading, projecting and stepping copy nothing twice.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedeq_edge.consensus.constraint import project
from fedeq_edge.deq.adjoints import Adjoint, AdjointReport, KTerm, attach
from fedeq_edge.deq.cell import build_cell, build_stem
from fedeq_edge.deq.layout import Layout, head_layout, row_bounds, size, theta_layout
from fedeq_edge.deq.solution import Solution
from fedeq_edge.deq.solvers import Solver, StepFunction, iterate, relative_residual, solve
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError


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
    """Forward pass of a batch. logits (B, classes); features (B, spec.features), the head's input;
    residual (B,) of the last evaluation; evaluations (B,) int64; report of the backward pass, None without gradient.
    """

    logits: Tensor
    features: Tensor
    residual: Tensor
    evaluations: Tensor
    report: AdjointReport | None


class DEQ(nn.Module):
    """The model that `spec` describes, all parameters zero until `load`.

    theta (p,), head_vector (h,): flat parameters; theta_grad, head_grad: flat gradients, zeroed by `zero_grad`, filled
    by `backward`. In-place changes of the flat tensors change the module. It lives on the CPU in the dtype that it was
    built with: `.to` would cut the views, so build another and load it.
    """

    def __init__(self, spec: ModelSpec, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.spec = spec
        self.stem = build_stem(spec).to(dtype)
        self.cell = build_cell(spec)
        self.head = nn.Linear(spec.features, spec.classes, device="meta")
        self.theta, self.theta_grad = _bind(self, theta_layout(spec), dtype)
        self.head_vector, self.head_grad = _bind(self, head_layout(spec), dtype)
        self._leaves = list(self.parameters())
        self._bounds = row_bounds(spec)
        self._windows = spec.pool_windows

    def __deepcopy__(self, memo: dict[int, object]) -> "DEQ":
        # torch copies parameter by parameter and would cut the copy's views.
        del memo
        twin = DEQ(self.spec, dtype=self.theta.dtype)
        for name in ("theta", "theta_grad", "head_vector", "head_grad"):
            getattr(twin, name).copy_(getattr(self, name))
        return twin

    def load(self, theta: NDArray[np.floating], head: NDArray[np.floating]) -> None:
        """The module computes with these parameters, copies of theta (p,) and head (h,); ConfigError on sizes."""
        for name, flat, vector in (("theta", self.theta, theta), ("head", self.head_vector, head)):
            if vector.shape != flat.shape:
                raise ConfigError(
                    f"model: {name} has shape {vector.shape}, this spec needs {tuple(flat.shape)}; "
                    "was it made for another model?"
                )
            flat.copy_(torch.from_numpy(np.ascontiguousarray(vector)))

    def project(self) -> None:
        """theta lies in the constraint set of the spec, moved by the least distance (CPU only)."""
        project(self.theta.numpy(), self._bounds)

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

    def solve(self, x: Tensor, *, budget: int, tol: float = 0.0, solver: Solver | None = None) -> Solution:
        """Equilibrium states of samples x (B, *input_shape), without graph."""
        with torch.no_grad():
            injection = self.inject(x)
            return solve(self._step(injection), self.cell.start(injection), solver=solver, budget=budget, tol=tol)

    def forward(
        self,
        x: Tensor,
        *,
        budget: Budget,
        tol: float = 0.0,
        solver: Solver | None = None,
        adjoint: Adjoint | None = None,
    ) -> Output:
        """Logits of samples x (B, *input_shape) with at most `budget.forward` evaluations per sample.

        With gradients enabled the last evaluation carries the graph and backward spends `budget.adjoint` terms, or
        what `adjoint` says; that path always spends the whole budget. Without gradients a sample stops at `tol`.
        """
        if not torch.is_grad_enabled():
            found = self.solve(x, budget=budget.forward, tol=tol, solver=solver)
            return self._answer(found.value, found.residual, found.evaluations, None)
        injection = self.inject(x)
        with torch.no_grad():
            z = iterate(
                self._step(injection), self.cell.start(injection), evaluations=budget.forward - 1, solver=solver
            )
        out, report = attach(self._step(injection), z, adjoint=adjoint or KTerm(terms=budget.adjoint))
        evaluations = torch.full((len(x),), budget.forward, dtype=torch.int64, device=x.device)
        return self._answer(out, relative_residual(z, out.detach()), evaluations, report)

    def backward(self, loss: Tensor) -> None:
        """The gradient of `loss` is added to theta_grad and head_grad; the input gets none."""
        torch.autograd.backward(loss, inputs=self._leaves)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Flat gradients are zero. They stay where they are: set_to_none, torch's default, would cut the views."""
        del set_to_none
        self.theta_grad.zero_()
        self.head_grad.zero_()

    def _step(self, injection: Tensor) -> StepFunction:
        step = self.cell.step
        return lambda z: step(z, injection)

    def _answer(self, z: Tensor, residual: Tensor, evaluations: Tensor, report: AdjointReport | None) -> Output:
        features = self.features(z)
        logits: Tensor = self.head(features)
        return Output(logits=logits, features=features, residual=residual, evaluations=evaluations, report=report)


def _bind(model: nn.Module, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(flat parameters, flat gradients), zero, with the named parameters of the model made views of them."""
    flat, gradient = torch.zeros(size(layout), dtype=dtype), torch.zeros(size(layout), dtype=dtype)
    for slot in layout:
        owner, _, name = slot.name.rpartition(".")
        parameter = nn.Parameter(flat[slot.offset : slot.end].view(slot.shape))
        parameter.grad = gradient[slot.offset : slot.end].view(slot.shape)
        setattr(model.get_submodule(owner), name, parameter)
    return flat, gradient

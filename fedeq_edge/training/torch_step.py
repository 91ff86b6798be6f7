"""The training step in torch: the backend that others are tested against.

Theory of operation. All parameters of a device are one vector w = [theta | head]. One SGD step on a batch is

    g        = clip(dloss/dw)                              the gradient of F_i, at a budget (K, k) drawn for the batch
    g[:s]   += nu + kappa (w[:s] - z)                      what ADMM adds, on the s numbers that are shared
    velocity = momentum velocity + g,   w -= rate velocity,   theta onto its constraint set

(algorithm.md section 4, step 3.) The loss's gradient is clipped before ADMM's part is added: a dual that had grown
could otherwise never be balanced by a clipped sum, and the fixed point would move. The velocity starts at zero in
every round, since it belongs to the gradient at another z.

Nothing here draws from a global generator. Results depend on the number of torch threads, which the process decides.
"""

import math
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from fedeq_edge.deq.adjoints import Adjoint, Unrolled
from fedeq_edge.deq.batch import relative_residual
from fedeq_edge.deq.description import Description, describe
from fedeq_edge.deq.model import DEQ, Output
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import SolverError
from fedeq_edge.training.backend import (
    DIVERGED_REMEDY,
    Labels,
    Matrix,
    Measured,
    Pull,
    Samples,
    micro_batches,
    sample_mean,
)
from fedeq_edge.training.step import Budget, Plan, Vector


class Model(Protocol):
    """What a descent moves: flat parameters theta and head_vector with flat gradients, as `DEQ` has them."""

    theta: Tensor
    theta_grad: Tensor
    head_vector: Tensor
    head_grad: Tensor

    def load(self, theta: Vector, head: Vector) -> None:
        """The model computes with copies of these."""
        ...

    def forward(self, x: Tensor, *, budget: Budget, adjoint: Adjoint | None = None) -> Output:
        """The pass whose loss `backward` takes."""
        ...

    def jacobian_penalty(self, output: Output, generator: torch.Generator) -> Tensor:
        """The penalty of that pass, a scalar."""
        ...

    def backward(self, loss: Tensor) -> None:
        """The gradient is added to the flat gradients."""
        ...

    def zero_grad(self) -> None:
        """The flat gradients are zero."""
        ...

    def project(self) -> None:
        """theta lies in its constraint set."""
        ...


ModelT = TypeVar("ModelT", bound=Model)


class Descent:
    """SGD with momentum on w = [theta | head] of `model`, from the parameters that it holds; velocity starts at 0.

    rate, pull, frozen_head, seed: as of `Backend.descent`; the seed is of the probes of the Jacobian penalty, where
    the plan has one.
    """

    def __init__(
        self, model: Model, plan: Plan, *, rate: float, pull: Pull | None, frozen_head: bool, seed: int = 0
    ) -> None:
        self._model, self._plan, self._rate, self._pull = model, plan, rate, pull
        self._frozen_head = frozen_head
        self._adjoint = Unrolled(steps=plan.unrolled) if plan.unrolled else None
        self._probes = torch.Generator().manual_seed(seed)
        self._w = torch.cat([model.theta, model.head_vector])
        self._velocity = torch.zeros_like(self._w)

    def step(self, x: Samples, y: Labels, budget: Budget) -> Measured:
        """The model has made one step on the batch x (B, *input_shape), y (B,).

        Raises SolverError, before the model has changed, when the loss or its gradient is not finite.
        """
        measured = self._differentiate(torch.from_numpy(x), torch.from_numpy(y), budget)
        gradient = self.direction()
        self._velocity.mul_(self._plan.momentum).add_(gradient)
        self._w.sub_(self._velocity, alpha=self._rate)
        self._store()
        return measured

    def direction(self) -> Tensor:
        """The gradient of the Lagrangian, (p + h,), from the loss's gradient that the model holds."""
        theta_size = len(self._model.theta)
        gradient = torch.cat([self._model.theta_grad, self._model.head_grad])
        if self._frozen_head:
            gradient[theta_size:] = 0.0
        norm = float(torch.linalg.vector_norm(gradient))
        if not math.isfinite(norm):
            raise SolverError(f"training: the gradient's norm is {norm}; {DIVERGED_REMEDY}")
        gradient *= min(1.0, self._plan.clip / max(norm, 1e-12))
        if self._plan.weight_decay:
            gradient += self._plan.weight_decay * self._w
        if self._pull is not None:
            self._pull.add_to(gradient.numpy(), self._w.numpy())
        return gradient

    def _differentiate(self, x: Tensor, y: Tensor, budget: Budget) -> Measured:
        """The model holds the gradient of the mean loss, added up over micro-batches."""
        self._model.zero_grad()
        parts = micro_batches(len(x), self._plan.microbatch)
        added = [(len(x[part]), self._add(x[part], y[part], budget, len(x))) for part in parts]
        return Measured(
            loss=sample_mean(added, lambda part: part.loss),
            residual=sample_mean(added, lambda part: part.residual),
            backward_residual=sample_mean(added, lambda part: part.backward_residual),
            budget=budget,
        )

    def _add(self, x: Tensor, y: Tensor, budget: Budget, batch: int) -> Measured:
        """The model holds what these samples of a batch of so many add to the gradient of its mean loss."""
        output = self._model.forward(x, budget=budget, adjoint=self._adjoint)
        loss = torch.nn.functional.cross_entropy(output.logits, y)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise SolverError(f"training: the loss is {value} at K = {budget.forward}; {DIVERGED_REMEDY}")
        if self._plan.jacobian_penalty:
            loss = loss + self._plan.jacobian_penalty * self._model.jacobian_penalty(output, self._probes)
        self._model.backward(loss if len(x) == batch else loss * (len(x) / batch))
        assert output.report is not None  # gradients were enabled
        return Measured(
            loss=value,
            residual=float(output.residual.mean()),
            backward_residual=output.report.residual,
            budget=budget,
        )

    def _store(self) -> None:
        theta_size = len(self._model.theta)
        self._model.theta.copy_(self._w[:theta_size])
        self._model.head_vector.copy_(self._w[theta_size:])
        self._model.project()
        self._w[:theta_size] = self._model.theta


class FlatBackend(Generic[ModelT]):
    """What the `Backend`s of torch have in common: a model over flat vectors, on the CPU."""

    solver = b""  # no graph has trained it

    def __init__(self, model: ModelT, description: Description, plan: Plan) -> None:
        self.description = description
        self._model = model
        self._plan = plan

    def load(self, theta: Vector, head: Vector) -> None:
        """The model computes with copies of these. Raises ConfigError for another size and for NaN or infinity."""
        self._model.load(theta, head)

    def parameters(self) -> tuple[Vector, Vector]:
        """Copies of theta (p,) and head (h,) as they are now."""
        return self._model.theta.numpy().copy(), self._model.head_vector.numpy().copy()

    def descent(self, *, rate: float, pull: Pull | None = None, frozen_head: bool = False, seed: int = 0) -> Descent:
        """Steps of one round at this step size, velocity 0."""
        return Descent(self._model, self._plan, rate=rate, pull=pull, frozen_head=frozen_head, seed=seed)


class TorchBackend(FlatBackend[DEQ]):
    """A model in torch on the CPU: a `Backend`."""

    def __init__(self, spec: ModelSpec, plan: Plan) -> None:
        super().__init__(DEQ(spec), describe(spec), plan)

    def solve(self, x: Samples, forward: int) -> tuple[Matrix, Vector]:
        """(features (B, f), relative residuals (B,)) of x (B, *input_shape) at K = `forward`."""
        found = self._model.solve(torch.from_numpy(x), budget=forward)
        return self._model.features(found.value).numpy(), found.residual.numpy()

    def solve_each(self, x: Samples, budgets: Sequence[int]) -> list[tuple[Matrix, Vector]]:
        """What `solve` gives at each of these K, in one walk: the price of the largest."""
        model, found = self._model, dict[int, tuple[Matrix, Vector]]()
        with torch.no_grad():
            injection = model.inject(torch.from_numpy(x))
            z = model.cell.start(injection)
            for K in range(1, max(budgets) + 1):
                fz = model.cell.step(z, injection)
                if K in budgets:
                    found[K] = model.features(fz).numpy(), relative_residual(z, fz).numpy()
                z = fz
        return [found[K] for K in budgets]

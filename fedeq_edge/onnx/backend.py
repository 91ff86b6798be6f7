"""The training step as an ONNX graph behind the learner: onnxruntime and numpy, no torch."""

import numpy as np

from fedeq_edge.deq.layout import checked, size
from fedeq_edge.onnx.accumulated import AccumulatedDescent
from fedeq_edge.onnx.trainer import GraphDescent, TrainingGraph
from fedeq_edge.training.backend import Labels, Matrix, Measured, Pull, Samples
from fedeq_edge.training.step import Budget, Plan, Vector


class OnnxBackend:
    """A model on a training graph (onnx/training.py), all parameters zero until `load`: a `Backend`.

    The model is the one that the graph describes. Raises ExportError where `graph` is none.
    """

    def __init__(self, graph: bytes, plan: Plan) -> None:
        self._graph = TrainingGraph(graph)
        self._plan = plan
        self.description = self._graph.description
        self._layouts = self.description.theta_layout, self.description.head_layout
        theta, head = (np.zeros(size(layout), np.float32) for layout in self._layouts)
        self._held = theta, head

    @property
    def solver(self) -> bytes:
        """The graph beside the training graph that solves the model."""
        return self._graph.solver.content

    def load(self, theta: Vector, head: Vector) -> None:
        """The model computes with copies of these. Raises ConfigError for another size and for NaN or infinity."""
        first, last = self._layouts
        checked("theta", theta, first)
        checked("head", head, last)
        self._held = theta.astype(np.float32), head.astype(np.float32)

    def parameters(self) -> tuple[Vector, Vector]:
        """Copies of theta (p,) and head (h,) as they are now."""
        theta, head = self._held
        return theta.copy(), head.copy()

    def descent(self, *, rate: float, pull: Pull | None = None, frozen_head: bool = False, seed: int = 0) -> "Descent":
        """Steps of one round at this step size, velocity 0; nothing is drawn, so the seed changes nothing."""
        del seed
        theta, head = self._held
        plan = self._plan
        if plan.microbatch:
            return Descent(
                self,
                AccumulatedDescent(self._graph, theta, head, plan, rate=rate, pull=pull, frozen_head=frozen_head),
            )
        steps = self._graph.descent(
            theta,
            head,
            rate=rate,
            momentum=plan.momentum,
            clip=plan.clip,
            weight_decay=plan.weight_decay,
            pull=pull,
            frozen_head=frozen_head,
        )
        return Descent(self, steps)

    def moved(self, steps: GraphDescent | AccumulatedDescent) -> None:
        """The parameters are those to which `steps` have come."""
        self._held = steps.theta, steps.head

    def solve(self, x: Samples, forward: int) -> tuple[Matrix, Vector]:
        """(features (B, f), relative residuals (B,)) of x (B, *input_shape) at K = `forward`."""
        theta, _ = self._held
        return self._graph.solver.solve(x, theta, forward=forward)


class Descent:
    """Steps of one round by the graph; the backend holds what they come to."""

    def __init__(self, backend: OnnxBackend, steps: GraphDescent | AccumulatedDescent) -> None:
        self._backend, self._steps = backend, steps

    def step(self, x: Samples, y: Labels, budget: Budget) -> Measured:
        """The backend holds the parameters after one step on the batch x (B, *input_shape), y (B,).

        Raises SolverError, before they have changed, when the loss or its gradient is not finite.
        """
        done = self._steps.step(x, y, forward=budget.forward, adjoint=budget.adjoint)
        self._backend.moved(self._steps)
        return Measured(loss=done.loss, residual=done.residual, backward_residual=done.backward_residual, budget=budget)

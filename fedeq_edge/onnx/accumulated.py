"""Steps of a training graph on batches of which it sees a few samples at a time: less memory, the same step.

Theory of operation. A training graph makes a whole step, and nothing in it is of a part of a batch. But what it
computes is velocity_next = momentum velocity + clip(g) + curvature w + offset, where all but g are inputs. With neither
clip nor pull, rate = 0 and momentum m_j = n_(j-1) / n_j it adds up: after the micro-batches of n_1 ... n_j samples the
velocity is sum_i n_i g_i / n_j. What makes a step of that sum is numpy's, and any graph of this schema will do.
"""

import numpy as np

from fedeq_edge.onnx.contract import SMALLEST_CLIPPED
from fedeq_edge.onnx.trainer import GraphDescent, GraphStep, TrainingGraph, Vector, pulled, refuse_non_finite
from fedeq_edge.training.backend import Labels, Pull, Samples, micro_batches, sample_mean
from fedeq_edge.training.step import Plan

_UNBOUNDED = float(np.finfo(np.float32).max)


class AccumulatedDescent:
    """SGD with momentum on w = [theta | head], from theta (p,) and head (h,); of a graph whose optimizer is "sgd".

    plan: `microbatch` of it is at least 1. rate, pull, frozen_head: as of `Backend.descent`.
    """

    def __init__(
        self,
        graph: TrainingGraph,
        theta: Vector,
        head: Vector,
        plan: Plan,
        *,
        rate: float,
        pull: Pull | None,
        frozen_head: bool,
    ) -> None:
        self._plan, self._rate = plan, np.float32(rate)
        w = graph.joined(theta, head)
        self._pull = pulled(w.size, plan.weight_decay, pull)
        self._velocity = np.zeros_like(w)
        self._kept = np.zeros((), np.float32)
        scalars = {"rate": 0.0, "clip": _UNBOUNDED, "train_head": float(not frozen_head)}
        constants = {name: np.array(number, np.float32) for name, number in scalars.items()}
        self._sum = GraphDescent(graph, w, {**constants, "momentum": self._kept, **pulled(w.size, 0.0, None)})

    @property
    def theta(self) -> Vector:
        """(p,), a copy; on the constraint set after every step."""
        return self._sum.theta

    @property
    def head(self) -> Vector:
        """(h,), a copy."""
        return self._sum.head

    def step(self, x: Samples, y: Labels, *, forward: int, adjoint: int) -> GraphStep:
        """One step on the batch x (B, *input_shape), y (B,) with K = forward >= 1 evaluations, k = adjoint >= 0 terms.

        Raises SolverError, before anything has changed, when the loss or its gradient is not finite.
        """
        parts, before = list[tuple[int, GraphStep]](), 0
        for part in micro_batches(len(x), self._plan.microbatch):
            count = len(x[part])
            self._kept[...] = before / count
            parts.append((count, self._sum.run(x[part], y[part], forward=forward, adjoint=adjoint)))
            before = count
        done = GraphStep(
            loss=sample_mean(parts, lambda part: part.loss),
            residual=sample_mean(parts, lambda part: part.residual),
            backward_residual=sample_mean(parts, lambda part: part.backward_residual),
        )
        self._move(self._sum.now["velocity"] * np.float32(before / len(x)), done.loss, forward)
        return done

    def _move(self, gradient: Vector, loss: float, forward: int) -> None:
        """w has made the step of the loss's gradient, (p + h,), which is overwritten."""
        plan, w = self._plan, self._sum.now["w"]
        norm = float(np.linalg.norm(gradient))
        refuse_non_finite(loss, norm, forward)
        gradient *= np.float32(min(1.0, plan.clip / max(norm, SMALLEST_CLIPPED)))
        gradient += w * self._pull["curvature"] + self._pull["offset"]
        self._velocity *= np.float32(plan.momentum)
        self._velocity += gradient
        w -= self._velocity * self._rate
        self._sum.settle()

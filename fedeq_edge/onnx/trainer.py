"""Train a model by its training graph: onnxruntime and numpy, no torch, no onnx package.

The graph (`training`) computes; what depends on the constraint set is numpy's, here as in `deq/model.DEQ`: theta is
projected after every step, and a monotone cell's step size is chosen for the W of the next one. Which sets these are,
as all else of the model, the graph itself describes: no kind of cell is known here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.consensus.constraint import project
from fedeq_edge.deq.layout import size
from fedeq_edge.errors import ConfigError, DataError, ExportError, SolverError
from fedeq_edge.onnx.contract import FOUND, MOMENTS
from fedeq_edge.onnx.reading import read_training
from fedeq_edge.onnx.session import open_session
from fedeq_edge.onnx.solver import Ends, SolverGraph, check_ends, samples
from fedeq_edge.training.backend import DIVERGED_REMEDY, Pull

Vector = NDArray[np.float32]
Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphStep:
    """One step: loss before it (no penalty in it), mean residuals of forward and backward solve."""

    loss: float
    residual: float
    backward_residual: float


class TrainingGraph:
    """A loaded training graph with its solver; `content` may come from anybody, once its digest is the announced one.

    description: of the model that it trains. optimizer: "sgd" or "adam". theta_size, head_size: p and h.
    Raises ExportError in one line as `reading.read_training`, and where onnxruntime refuses it.
    """

    def __init__(self, content: bytes, *, threads: int = 1) -> None:
        name = "training graph"
        facts = read_training(content, name)
        self.description, self.optimizer = facts.description, facts.optimizer
        self.theta_size, self.head_size = size(self.description.theta_layout), size(self.description.head_layout)
        self.session = open_session(content, threads, name)
        check_ends(self.session, self._ends(), name)
        self.solver = SolverGraph(facts.solver, threads=threads, name=f"{name}: its solver")
        if self.solver.description != self.description:
            raise ExportError(f"{name}: its solver is of another model; let the gateway build it anew")

    def descent(
        self,
        theta: Vector,
        head: Vector,
        *,
        rate: float,
        momentum: float,
        clip: float,
        weight_decay: float = 0.0,
        pull: Pull | None = None,
        frozen_head: bool = False,
    ) -> "GraphDescent":
        """Steps of one round from theta (p,) and head (h,), the optimiser remembering nothing yet.

        Raises ConfigError for vectors of another model.
        """
        w = self.joined(theta, head)
        scalars = {"rate": rate, "momentum": momentum, "clip": clip, "train_head": float(not frozen_head)}
        constants = {name: np.array(number, dtype=np.float32) for name, number in scalars.items()}
        return GraphDescent(self, w, constants | pulled(w.size, weight_decay, pull))

    def joined(self, theta: Vector, head: Vector) -> Vector:
        """w = [theta | head], (p + h,), a new vector. Raises ConfigError for vectors of another model."""
        for label, vector, length in (("theta", theta, self.theta_size), ("head", head, self.head_size)):
            if vector.shape != (length,):
                raise ConfigError(
                    f"model: {label} has shape {vector.shape}, this model needs ({length},); "
                    "was it made for another model?"
                )
        return np.concatenate([theta, head]).astype(np.float32, copy=False)

    def _ends(self) -> Ends:
        """Shapes of inputs and outputs that a step reads and writes."""
        total: list[int | str] = [self.theta_size + self.head_size]
        moments = MOMENTS[self.optimizer]
        vectors = ("w", *moments, "curvature", "offset", "w_next", *(f"{name}_next" for name in moments))
        return {
            "x": ["batch", *self.description.input_shape],
            **dict.fromkeys(vectors, total),
            **{name: [] for name in ("rate", "momentum", "clip", "train_head", "tol", *FOUND)},
        }


class GraphDescent:
    """SGD with momentum (or Adam) on w = [theta | head] by a training graph; made by `TrainingGraph.descent`.

    onnxruntime reads and writes our arrays in place. Parameters live twice: a step reads one set and writes the other,
    which becomes the present one once its loss has been found finite.
    """

    def __init__(self, graph: TrainingGraph, w: Vector, constants: Mapping[str, Array]) -> None:
        self._graph = graph
        self._constraints = graph.description.constraints
        moments = MOMENTS[graph.optimizer]
        self._now, self._next = ({"w": w.copy()} | {name: np.zeros_like(w) for name in moments} for _ in range(2))
        self._settings: dict[str, Array] = {
            "forward": np.zeros((), dtype=np.int64),
            "adjoint": np.zeros((), dtype=np.int64),
            "tol": np.zeros((), dtype=np.float32),
        }
        if graph.optimizer == "adam":
            self._settings["count"] = np.ones((), dtype=np.int64)
        self._settings |= graph.solver.step_size(w)
        self._found: dict[str, Array] = {name: np.zeros((), dtype=np.float32) for name in FOUND}
        self._constants = constants
        self._ahead, self._back = self._bound(self._now, self._next), self._bound(self._next, self._now)

    @property
    def now(self) -> Mapping[str, Vector]:
        """w and what the optimiser remembers, (p + h,) each: the graph's own memory, of which one may change w."""
        return self._now

    @property
    def theta(self) -> Vector:
        """(p,), a copy; on the constraint set after every step."""
        return self._now["w"][: self._graph.theta_size].copy()

    @property
    def head(self) -> Vector:
        """(h,), a copy."""
        return self._now["w"][self._graph.theta_size :].copy()

    def step(self, x: Array, y: NDArray[np.int64], *, forward: int, adjoint: int, tol: float = 0.0) -> GraphStep:
        """One step on the batch x (B, *input_shape), y (B,) with K = forward >= 1 evaluations, k = adjoint >= 0 terms.

        tol: above 0 the adjoint ends where its relative residual is at most that, `adjoint` being the most terms.
        Raises SolverError, before anything has changed, when the loss or its gradient is not finite.
        """
        done = self.run(x, y, forward=forward, adjoint=adjoint, tol=tol)
        self.settle()
        return done

    def run(self, x: Array, y: NDArray[np.int64], *, forward: int, adjoint: int, tol: float = 0.0) -> GraphStep:
        """What the graph makes of the batch is in w and what the optimiser remembers; theta may be off its set."""
        batch: dict[str, Array] = {
            "x": samples(x, self._graph.description),
            "y": np.ascontiguousarray(y, dtype=np.int64),
        }
        if y.shape != x.shape[:1]:
            raise DataError(f"training: {len(x)} samples with labels of shape {y.shape}; give one label per sample")
        for name, number in (("forward", forward), ("adjoint", adjoint), ("tol", tol)):
            self._settings[name][...] = number
        _bind(self._ahead.bind_input, batch)
        self._graph.session.run_with_iobinding(self._ahead)
        loss, norm, residual, backward = (float(self._found[name]) for name in FOUND)
        refuse_non_finite(loss, norm, forward)
        self._now, self._next, self._ahead, self._back = self._next, self._now, self._back, self._ahead
        return GraphStep(loss=loss, residual=residual, backward_residual=backward)

    def settle(self) -> None:
        """theta is on its set, and the next step that of its W."""
        project(self._now["w"][: self._graph.theta_size], self._constraints)
        for name, value in self._graph.solver.step_size(self._now["w"]).items():
            self._settings[name][...] = value
        if "count" in self._settings:
            self._settings["count"] += 1

    def _bound(self, now: Mapping[str, Array], following: Mapping[str, Array]) -> Any:  # onnxruntime ships no types
        binding = self._graph.session.io_binding()
        _bind(binding.bind_input, {**self._constants, **self._settings, **now})
        written: dict[str, Array] = {f"{name}_next": vector for name, vector in following.items()}
        _bind(binding.bind_output, written | self._found)
        return binding


def pulled(total: int, weight_decay: float, pull: Pull | None) -> dict[str, Vector]:
    """What weight decay and ADMM add to the gradient, curvature w + offset, over all of w, (total,)."""
    curvature, offset = np.full(total, weight_decay, dtype=np.float32), np.zeros(total, dtype=np.float32)
    if pull is not None:
        shared = len(pull.z)
        curvature[:shared] += np.float32(pull.kappa)
        offset[:shared] = pull.nu - np.float32(pull.kappa) * pull.z
    return {"curvature": curvature, "offset": offset}


def _bind(bind: Any, arrays: Mapping[str, Array]) -> None:
    """onnxruntime uses the memory of `arrays`, which must be contiguous and live as long as it does."""
    for name, array in arrays.items():
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def refuse_non_finite(loss: float, norm: float, forward: int) -> None:
    """Raises SolverError unless loss and norm of the gradient are finite; forward: the K that they came of."""
    if not isfinite(loss):
        raise SolverError(f"training: the loss is {loss} at K = {forward}; {DIVERGED_REMEDY}")
    if not isfinite(norm):
        raise SolverError(f"training: the gradient's norm is {norm}; {DIVERGED_REMEDY}")

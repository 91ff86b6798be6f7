"""A personal model behind the solver graph that it brings: onnxruntime and numpy, whatever its kind."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.deq.layout import size
from fedeq_edge.deq.numeric import Inference
from fedeq_edge.errors import ConfigError, ExportError
from fedeq_edge.modelfile import ModelFile
from fedeq_edge.onnx.solver import SolverGraph


class GraphEngine:
    """The model `found` of the file `path`; the same interface as `numeric.NumpyDEQ`. description: of its solver.

    Raises ExportError where no graph solves the model, or another's.
    """

    def __init__(self, path: Path, found: ModelFile) -> None:
        if not found.solver:
            raise ExportError(
                f'{path} is not for numpy and was trained without a graph (backend = "onnx"): run fedeq model export '
                f"{path} --out {path.with_suffix('.onnx')} on a host that knows the model"
            )
        self._graph = SolverGraph(found.solver, name=f"{path}: its solver")
        self.description = described = self._graph.description
        if (len(found.theta), len(found.head)) != (size(described.theta_layout), size(described.head_layout)):
            raise ExportError(
                f"{path}: its parameters are of another model than its solver; copy it from the device again"
            )
        self._theta = found.theta
        self._weight, self._bias = (slot.view(found.head) for slot in described.head_layout)

    def infer(self, x: NDArray[np.float32], *, budget: int, tol: float | None = None) -> Inference:
        """Answers for x (B, *input_shape) after `budget` evaluations of each sample.

        Raises ConfigError for a tolerance, DataError for another shape.
        """
        if tol is not None:
            raise ConfigError(f"tol {tol}: a solver graph spends the whole budget; leave tol out, or export the model")
        features, residual = self._graph.solve(x, self._theta, forward=budget)
        logits = features @ self._weight.T + self._bias
        return Inference(logits=logits, evaluations=np.full(len(x), budget), residual=residual)

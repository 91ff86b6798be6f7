"""Equilibrium features by a solver graph: onnxruntime and numpy, no torch, no onnx package.

A training graph has one beside it; a personal model that was trained by such a graph is answered by it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.deq.description import Description
from fedeq_edge.deq.layout import size
from fedeq_edge.deq.wellposed import step_size
from fedeq_edge.errors import DataError, ExportError
from fedeq_edge.onnx.contract import STEP_SIZE
from fedeq_edge.onnx.reading import read_solver
from fedeq_edge.onnx.session import open_session

Vector = NDArray[np.float32]
Matrix = NDArray[np.float32]
Ends = Mapping[str, list[int | str]]


class SolverGraph:
    """A loaded solver graph. content: as it came. description: of the model that it solves.

    Raises ExportError in one line as `reading.read_solver`, and where onnxruntime refuses it.
    """

    def __init__(self, content: bytes, *, threads: int = 1, name: str = "solver graph") -> None:
        self.content, self.description = content, read_solver(content, name)
        stepped = self.description.step_size
        self._stepped = self.description.slot(stepped) if stepped else None
        self._session = open_session(content, threads, name)
        check_ends(self._session, self._ends(), name)

    def solve(self, x: NDArray[np.float32], theta: Vector, *, forward: int) -> tuple[Matrix, Vector]:
        """(features (B, f), residual (B,)) of samples x (B, *input_shape) after `forward` >= 1 evaluations.

        Raises DataError where x does not fit the model.
        """
        feeds = {
            "x": samples(x, self.description),
            "theta": np.ascontiguousarray(theta, dtype=np.float32),
            "forward": np.array(forward),
            **self.step_size(theta),
        }
        features, residual = self._session.run(["features", "residual"], feeds)
        return features, residual

    def step_size(self, vector: Vector) -> dict[str, NDArray[np.float32]]:
        """The graph's input for a monotone cell's step size at the W in `vector`, which begins with theta."""
        if self._stepped is None:
            return {}
        return {STEP_SIZE: np.array(step_size(self._stepped.view(vector)), dtype=np.float32)}

    def _ends(self) -> Ends:
        described = self.description
        return {
            "x": ["batch", *described.input_shape],
            "theta": [size(described.theta_layout)],
            "features": ["batch", described.features],
            "residual": ["batch"],
        }


def samples(x: NDArray[np.float32], description: Description) -> NDArray[np.float32]:
    """x as a graph takes it. Raises DataError for a shape other than (batch, *input_shape)."""
    if x.shape[1:] != description.input_shape or not len(x):
        expected = ", ".join(map(str, description.input_shape))
        raise DataError(f"graph: samples have shape {x.shape}, the model takes (batch, {expected}), batch >= 1")
    return np.ascontiguousarray(x, dtype=np.float32)


def check_ends(session: Any, expected: Ends, name: str) -> None:
    """Inputs and outputs have the shapes and the type of the arrays that we give to onnxruntime.

    Raises ExportError naming the first that has not.
    """
    found = {value.name: (value.shape, value.type) for value in [*session.get_inputs(), *session.get_outputs()]}
    for end, shape in expected.items():
        if found.get(end) != (shape, "tensor(float)"):
            raise ExportError(f"{name}: {end} is {found.get(end)}, the model needs float32 {shape}; fetch it again")

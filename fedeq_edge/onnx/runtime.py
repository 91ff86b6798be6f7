"""Run an exported model: onnxruntime and numpy, no torch, no onnx package."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedeq_edge.errors import ConfigError, DataError, ExportError
from fedeq_edge.onnx.session import open_session

SCHEMA_VERSION = "1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Answers for B samples.

    logits (B, classes) float32. labels: the name of the largest logit per sample, "?" where logits are not finite.
    iterations (B,) int64 and residual (B,) float32: how far each solve came; a residual above the tolerance means that
    the budget was spent first, an infinite one that the sample holds NaN or infinity.
    """

    logits: NDArray[np.float32]
    labels: tuple[str, ...]
    iterations: NDArray[np.int64]
    residual: NDArray[np.float32]


class Predictor:
    """A loaded model; one thread by default, as equilibrium models of our size gain nothing from a second.

    model: file, or its bytes. Raises ExportError where it is missing, damaged, or not written by fedeq-edge.
    metadata: everything that the file says about itself. input_shape: of one sample. budget, tol: the defaults of
    `infer`.
    """

    def __init__(self, model: Path | bytes, *, threads: int = 1) -> None:
        self._session = open_session(model, threads)
        name = "the model" if isinstance(model, bytes) else str(model)
        self.metadata: Mapping[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        _check_schema(name, self.metadata)
        solver = json.loads(self.metadata["fedeq.solver"])
        self.budget = int(solver["max_iter"])
        self.tol = float(solver["tol"])
        self.labels: tuple[str, ...] = tuple(json.loads(self.metadata["fedeq.labels"]))
        self.input_shape: tuple[int, ...] = tuple(self._session.get_inputs()[0].shape[1:])

    def infer(self, x: ArrayLike, *, budget: int | None = None, tol: float | None = None) -> Prediction:
        """Answers for x, one sample of `input_shape` or a batch (B, *input_shape) with B >= 1.

        budget: most evaluations per sample, >= 1. tol: relative residual at which a sample stops, 0 never stops.
        Raises DataError naming the expected shape, ConfigError for a budget or tolerance out of range.
        """
        most = self.budget if budget is None else budget
        accuracy = self.tol if tol is None else tol
        if most < 1 or not accuracy >= 0.0:
            raise ConfigError(f"infer: budget {most} must be at least 1 and tol {accuracy} at least 0")
        feeds = {
            "x": self._batch(x),
            # Scalars must be arrays: onnxruntime refuses numpy's scalar types.
            "tol": np.array(accuracy, dtype=np.float32),
            "max_iter": np.array(most, dtype=np.int64),
        }
        logits, iterations, residual = self._session.run(["logits", "iterations", "residual"], feeds)
        names = tuple(self._name(row) for row in logits)
        return Prediction(logits=logits, labels=names, iterations=iterations, residual=residual)

    def _batch(self, x: ArrayLike) -> NDArray[np.float32]:
        try:
            samples = np.asarray(x, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise DataError(f"infer: x cannot be read as numbers ({error}); expected {self._expected()}") from error
        if samples.shape == self.input_shape:
            samples = samples[None]
        if samples.shape[1:] != self.input_shape or not len(samples):
            raise DataError(f"infer: x has shape {samples.shape}, expected {self._expected()}")
        return np.ascontiguousarray(samples)

    def _expected(self) -> str:
        sizes = ", ".join(map(str, self.input_shape))
        return f"float32 of shape (batch, {sizes})"

    def _name(self, logits: NDArray[np.float32]) -> str:
        return self.labels[int(logits.argmax())] if np.isfinite(logits).all() else "?"


def _check_schema(name: str, metadata: Mapping[str, str]) -> None:
    found = metadata.get("fedeq.schema_version")
    if found is None:
        raise ExportError(f"{name}: not written by fedeq-edge (no fedeq.schema_version); use fedeq model export")
    if found != SCHEMA_VERSION:
        raise ExportError(f"{name}: has schema version {found}, this program reads {SCHEMA_VERSION}; update fedeq-edge")

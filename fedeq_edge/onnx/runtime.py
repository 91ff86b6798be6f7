"""Run an exported model: onnxruntime and numpy, no torch, no onnx package."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedeq_edge.deq.budget import LARGEST_BUDGET
from fedeq_edge.deq.certificate import Certificate, Rate
from fedeq_edge.errors import ConfigError, DataError, ExportError
from fedeq_edge.onnx.contract import refuse_newer
from fedeq_edge.onnx.session import open_session

# Far above any residual of use, and its square far below float32's end, where a solve would stop before it begins.
LARGEST_TOL = 1e6


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Answers for B samples.

    logits (B, classes) float32. names: of the classes. iterations (B,) int64 and residual (B,) float32: how far each
    solve came; a residual above the tolerance means that the budget was spent first, an infinite one that the sample
    holds NaN or infinity.
    rate: what the file promises of its parameters, None where nothing is proven.
    """

    logits: NDArray[np.float32]
    names: tuple[str, ...]
    iterations: NDArray[np.int64]
    residual: NDArray[np.float32]
    rate: Rate | None = None

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The name of the largest logit per sample, "?" where logits are not finite."""
        finite = np.isfinite(self.logits).all(axis=1)
        best = np.where(finite, self.logits.argmax(axis=1), -1)
        return tuple(self.names[number] if number >= 0 else "?" for number in best.tolist())

    @cached_property
    def certificates(self) -> tuple[Certificate | None, ...]:
        """Per sample, what is proven of the state it got at its count of iterations; None where nothing is."""
        if self.rate is None:
            return (None,) * len(self.iterations)
        proven = {int(count): self.rate.certificate(int(count)) for count in np.unique(self.iterations)}
        usable = np.isfinite(self.residual)
        return tuple(proven[int(count)] if fine else None for count, fine in zip(self.iterations, usable, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What an ONNX file of ours is.

    kind: inference or training. size_bytes: of the file. inputs, outputs: shape by name, a string for a free size.
    metadata: everything that the file says about itself.
    """

    kind: str
    size_bytes: int
    inputs: Mapping[str, list[int | str]]
    outputs: Mapping[str, list[int | str]]
    metadata: Mapping[str, str]


class Predictor:
    """A loaded model; one thread by default, as equilibrium models of our size gain nothing from a second.

    model: file, or its bytes. Raises ExportError where it is missing, damaged, or no model of fedeq-edge that answers.
    metadata: everything that the file says about itself. input_shape: of one sample. budget, tol: the defaults of
    `infer`. unrolled: the file knows no other budget and no tolerance.
    """

    def __init__(self, model: Path | bytes, *, threads: int = 1) -> None:
        self._session = open_session(model, threads)
        name = _name_of(model)
        self.metadata: Mapping[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        kind = _kind(name, self.metadata)
        if kind != "inference":
            raise ExportError(f"{name}: is a {kind} graph, which does not answer; write one with fedeq model export")
        _check_ends(name, self._session)
        try:
            solver = json.loads(self.metadata["fedeq.solver"])
            self.budget, self.tol = int(solver["max_iter"]), float(solver["tol"])
            self.labels = _labels(self.metadata, self._session.get_outputs()[0].shape[1])
            self.rate = _rate(self.metadata)
        except (KeyError, TypeError, ValueError) as error:
            raise ExportError(f"{name}: its fedeq metadata is damaged ({error}); export the model again") from error
        self.input_shape: tuple[int, ...] = tuple(self._session.get_inputs()[0].shape[1:])
        self.unrolled = "max_iter" not in {value.name for value in self._session.get_inputs()}

    def infer(self, x: ArrayLike, *, budget: int | None = None, tol: float | None = None) -> Prediction:
        """Answers for x, one sample of `input_shape` or a batch (B, *input_shape) with B >= 1.

        budget: most evaluations per sample, >= 1. tol: relative residual at which a sample stops, 0 never stops.
        Raises DataError naming the expected shape, ConfigError for a budget or tolerance out of range, or any other
        than its own of an unrolled file.
        """
        settings = self._settings(self.budget if budget is None else budget, self.tol if tol is None else tol)
        logits, iterations, residual = self._session.run(
            ["logits", "iterations", "residual"], {"x": self._batch(x), **settings}
        )
        return Prediction(logits=logits, names=self.labels, iterations=iterations, residual=residual, rate=self.rate)

    def _settings(self, budget: int, tol: float) -> dict[str, NDArray[Any]]:
        if not 1 <= budget <= LARGEST_BUDGET or not 0.0 <= tol <= LARGEST_TOL:
            raise ConfigError(
                f"infer: budget {budget} must be at least 1 and at most {LARGEST_BUDGET}, tol {tol} at least 0 and at "
                f"most {LARGEST_TOL:.0e}"
            )
        if self.unrolled:
            if (budget, tol) != (self.budget, self.tol):
                raise ConfigError(
                    f"infer: the file is unrolled for {self.budget} evaluations and stops nowhere else; leave out "
                    "budget and tol, or export it with recipe onnxruntime"
                )
            return {}
        # Scalars must be arrays: onnxruntime refuses numpy's scalar types.
        return {"tol": np.array(tol, dtype=np.float32), "max_iter": np.array(budget, dtype=np.int64)}

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


def describe(path: Path) -> Description:
    """What the file is, of whatever kind. Raises ExportError as `Predictor` does, but for a training graph."""
    session = open_session(path, 1)
    metadata = dict(session.get_modelmeta().custom_metadata_map)
    return Description(
        kind=_kind(str(path), metadata),
        size_bytes=path.stat().st_size,
        inputs={value.name: list(value.shape) for value in session.get_inputs()},
        outputs={value.name: list(value.shape) for value in session.get_outputs()},
        metadata=metadata,
    )


def evaluate(model: bytes, feeds: Mapping[str, NDArray[Any]], name: str = "the model") -> dict[str, NDArray[Any]]:
    """All outputs of a graph by name, on one thread. Raises ExportError, `name` in front, where it does not run."""
    session = open_session(model, 1, name)
    names = [value.name for value in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))
    except Exception as error:  # onnxruntime's exceptions share no base class below Exception
        raise ExportError(f"{name}: onnxruntime cannot run it ({str(error).splitlines()[0]})") from error


def _name_of(model: Path | bytes) -> str:
    return "the model" if isinstance(model, bytes) else str(model)


def _check_ends(name: str, session: Any) -> None:
    """Raises ExportError where an answer could not be asked for, or read."""
    inputs, outputs = ([value.name for value in ends] for ends in (session.get_inputs(), session.get_outputs()))
    if inputs not in (["x"], ["x", "tol", "max_iter"]) or outputs[:3] != ["logits", "iterations", "residual"]:
        raise ExportError(f"{name}: has inputs {inputs} and outputs {outputs}, none of an answer; export it again")


def _kind(name: str, metadata: Mapping[str, str]) -> str:
    """inference or training. Raises ExportError for a file of another program or of a newer version."""
    found = metadata.get("fedeq.schema_version")
    if found is None:
        raise ExportError(f"{name}: not written by fedeq-edge (no fedeq.schema_version); use fedeq model export")
    refuse_newer(name, found)
    return metadata.get("fedeq.kind", "inference")


def _labels(metadata: Mapping[str, str], classes: int) -> tuple[str, ...]:
    """One name per class. Raises ValueError for anything else."""
    names = json.loads(metadata["fedeq.labels"])
    if not isinstance(names, list) or len(names) != classes or not all(isinstance(name, str) for name in names):
        raise ValueError(f"fedeq.labels are not {classes} names")
    return tuple(names)


def _rate(metadata: Mapping[str, str]) -> Rate | None:
    told = metadata.get("fedeq.rate")
    return None if told is None else Rate(**json.loads(told))

"""Questions to a model file: whose library answers depends on the file."""

import contextlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedeq_edge import modelfile
from fedeq_edge.data.npz import load_client
from fedeq_edge.deq.numeric import NumpyDEQ
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError
from fedeq_edge.modelform import form
from fedeq_edge.onnx.recipe import load_recipe
from fedeq_edge.training.curve import Engine, Samples


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says of B samples, whoever computed it; labels: "?" where logits are not finite."""

    logits: NDArray[np.floating]
    iterations: NDArray[np.int64]
    residual: NDArray[np.floating]
    labels: tuple[str, ...]


def test_part(path: Path, *, gaps: bool) -> tuple[Samples, NDArray[np.int64]]:
    """(x, y) of the test rows of a device's data file, with `gaps` as there. Raises ConfigError where it has none."""
    loaded = load_client(path, gaps=gaps)
    if not len(loaded.y_test):
        raise ConfigError(f"{path} has no test rows; mark some in an array named split")
    return loaded.x_test, loaded.y_test


def ask(path: Path, x: Samples, *, budget: int | None, tol: float | None) -> Answer:
    """Answers for x (B, *input_shape): of an ONNX file by onnxruntime, of a .fedeq file by numpy if dense, or torch.

    A .fedeq file that neither can answer here is by the solver graph that it brings, if it was trained by one.
    budget: most evaluations per sample, tol: residual at which one stops (0: never); None: the file's own.
    """
    return (_ask_exported if form(path) == "onnx" else _ask_personal)(path, x, budget, tol)


def torch_engine(found: modelfile.ModelFile) -> Engine:
    """The model behind torch, on one thread."""
    from fedeq_edge.deq.engine import TorchEngine  # noqa: PLC0415  # torch only where needed

    return TorchEngine(found.spec, found.theta, found.head)


def _ask_exported(path: Path, x: Samples, budget: int | None, tol: float | None) -> Answer:
    from fedeq_edge.onnx.runtime import Predictor  # noqa: PLC0415  # onnxruntime only where needed

    found = Predictor(path).infer(x, budget=budget, tol=tol)
    return Answer(found.logits, found.iterations, found.residual, found.labels)


def _ask_personal(path: Path, x: Samples, budget: int | None, tol: float | None) -> Answer:
    found = modelfile.read(path)
    engine, usual, classes = _engine(path, found)
    accuracy = usual if tol is None else tol
    answer = engine.infer(x, budget=found.budget.forward if budget is None else budget, tol=accuracy or None)
    names = found.labels or tuple(map(str, range(classes)))
    labels = tuple(names[int(row.argmax())] if np.isfinite(row).all() else "?" for row in answer.logits)
    return Answer(answer.logits, answer.evaluations, answer.residual, labels)


def _engine(path: Path, found: modelfile.ModelFile) -> tuple[Engine, float, int]:
    """(what answers, its tolerance if nobody names one, number of classes)."""
    spec = _known(found)
    if found.solver and (spec is None or (spec.spatial and importlib.util.find_spec("torch") is None)):
        from fedeq_edge.onnx.personal import GraphEngine  # noqa: PLC0415  # onnxruntime only where needed

        solved = GraphEngine(path, found)
        return solved, 0.0, solved.description.classes
    spec = found.spec
    own = torch_engine(found) if spec.spatial else NumpyDEQ(spec, found.theta, found.head)
    return own, load_recipe().tol, spec.classes


def _known(found: modelfile.ModelFile) -> ModelSpec | None:
    """None for a model of a kind that this version does not know."""
    with contextlib.suppress(ConfigError):
        return found.spec
    return None

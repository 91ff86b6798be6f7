"""The newest personal model of a state folder, and what it answers.

personal.fedeq is what the agent writes at the end of a federation: numpy answers dense ones of a kind known here, all
others the solver graph that one trained by a graph brings. personal.onnx is what `fedeq model export` makes of it:
onnxruntime answers. So do models that a release or an update has brought. The newest of all that can be answered here
answers; it is looked at with every request and loaded again when it has changed.
"""

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedeq_edge import modelfile
from fedeq_edge.deq.budget import LARGEST_BUDGET
from fedeq_edge.deq.certificate import Certificate, Rate
from fedeq_edge.deq.numeric import Inference, NumpyDEQ
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.deq.wellposed import proven, rate
from fedeq_edge.errors import ConfigError, DataError, ExportError, FedEqError, StateError
from fedeq_edge.onnx.recipe import load_recipe
from fedeq_edge.onnx.scan import scan
from fedeq_edge.storage import finite
from fedeq_edge.training.curve import ANSWERED_AT_ONCE, Engine, Samples

log = logging.getLogger(__name__)

NAMES: Final = ("personal.onnx", "personal.fedeq")
# A sensor asks for one, a day's backlog comes in parts: bounds how long one request holds a processor.
MOST_SAMPLES: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A loaded model: its engine, the defaults of a request, and what it tells of itself.

    certify: what is proven after so many evaluations, None where nothing is.
    """

    engine: Engine
    input_shape: tuple[int, ...]
    labels: tuple[str, ...]
    budget: int
    tol: float
    facts: Mapping[str, object]
    certify: Callable[[int], Certificate | None]

    def answer(self, x: Samples, *, budget: int | None, tol: float | None) -> dict[str, object]:
        """For JSON: one answer per sample of x, one sample of `input_shape` or a batch; what was asked; the model.

        Raises DataError for another shape or too many samples, ConfigError for a budget or tol out of range.
        """
        most = self.budget if budget is None else budget
        accuracy = self.tol if tol is None else tol
        if not 1 <= most <= LARGEST_BUDGET or not accuracy >= 0.0:
            raise ConfigError(f"budget {most} must be 1 to {LARGEST_BUDGET} and tol {accuracy} at least 0")
        batch = self._batch(x)
        parts = (batch[at : at + ANSWERED_AT_ONCE] for at in range(0, len(batch), ANSWERED_AT_ONCE))
        answers = [
            self._row(*row)
            for part in parts
            for row in _rows(self.engine.infer(part, budget=most, tol=accuracy or None))
        ]
        return {"answers": answers, "budget": most, "tol": accuracy, "model": self.facts}

    def _batch(self, x: Samples) -> Samples:
        batch = x[None] if x.shape == self.input_shape else x
        if batch.shape[1:] != self.input_shape:
            raise DataError(f"samples have shape {x.shape}, expected (batch, {', '.join(map(str, self.input_shape))})")
        if len(batch) > MOST_SAMPLES:
            raise DataError(f"{len(batch)} samples at once; send at most {MOST_SAMPLES}")
        return batch

    def _row(self, logits: NDArray[np.floating], evaluations: np.int64, residual: np.floating) -> object:
        known = bool(np.isfinite(logits).all())
        return finite(
            {
                "label": self.labels[int(logits.argmax())] if known else None,
                "logits": logits.tolist(),
                "evaluations": int(evaluations),
                "residual": float(residual),
                "certificate": msgspec.to_builtins(self.certify(int(evaluations))) if known else None,
            }
        )


class Newest:
    """Whatever is the newest model in the folder `state`, or in one of `others`, at the moment; threads may share it.

    others: folders where releases and updates put models, under any name, and training graphs as *.onnx.
    """

    def __init__(self, state: Path, others: Sequence[Path] = ()) -> None:
        self._folders = (state, *others)
        self._lock = threading.Lock()
        self._stamp: tuple[object, ...] = ()
        self._model: Model | None = None

    def model(self) -> Model:
        """The newest that can be answered. Raises StateError without any, or what keeps the newest from answering."""
        with self._lock:  # one loads, the others wait for it
            found = sorted(_found(*self._folders), reverse=True)
            stamp = tuple(found)
            if self._model is None or stamp != self._stamp:
                self._model, self._stamp = None, stamp  # the old one makes room first
                self._model = _first_that_loads([path for _, path, *_ in found], self._folders[0])
            return self._model


def _found(state: Path, *others: Path) -> Iterator[tuple[int, Path, int, int]]:
    """(time of the last change, path, inode, size) of the files there are that may be models."""
    brought = (path for folder in others for kind in ("*.onnx", "*.fedeq") for path in folder.glob(kind))
    for path in (*(state / name for name in NAMES), *brought):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        yield status.st_mtime_ns, path, status.st_ino, status.st_size


def _first_that_loads(paths: list[Path], state: Path) -> Model:
    errors: list[FedEqError] = []
    for path in paths:
        if _trains(path):
            continue
        try:
            model = _exported(path) if path.suffix == ".onnx" else _personal(path)
        except FedEqError as error:
            log.warning("cannot answer with this model", extra={"reason": str(error)})
            errors.append(error)
        else:
            log.info("answering", extra={"model": str(path)})
            return model
    if errors:
        raise errors[0]
    raise StateError(
        f"no personal model in {state} yet: the device makes one when its federation ends; "
        f"a {NAMES[0]} that is put there serves, too"
    )


def _trains(path: Path) -> bool:
    """Whether it is a training graph, which answers nobody."""
    if path.suffix != ".onnx":
        return False
    with contextlib.suppress(ExportError, OSError):
        return scan(path.read_bytes(), str(path)).metadata.get("fedeq.kind") == "training"
    return False  # damaged: whoever loads it says so


def _personal(path: Path) -> Model:
    found = modelfile.read(path)
    spec = _dense(found)
    return _by_graph(path, found) if spec is None else _by_numpy(path, found, spec)


def _dense(found: modelfile.ModelFile) -> ModelSpec | None:
    """What numpy can answer; None for a convolutional model, or for one of a kind that this version does not know."""
    with contextlib.suppress(ConfigError):
        return None if found.spec.spatial else found.spec
    return None


def _by_numpy(path: Path, found: modelfile.ModelFile, spec: ModelSpec) -> Model:
    return Model(
        engine=NumpyDEQ(spec, found.theta, found.head),
        input_shape=spec.input_shape,
        labels=found.labels or tuple(map(str, range(spec.classes))),
        budget=found.budget.forward,
        tol=load_recipe().tol,
        facts=_facts(path, found),
        certify=_certifier(rate(found.theta, spec)),
    )


def _by_graph(path: Path, found: modelfile.ModelFile) -> Model:
    from fedeq_edge.onnx.personal import GraphEngine  # noqa: PLC0415  # onnxruntime only where needed

    engine = GraphEngine(path, found)
    described = engine.description
    return Model(
        engine=engine,
        input_shape=described.input_shape,
        labels=found.labels or tuple(map(str, range(described.classes))),
        budget=found.budget.forward,
        tol=0.0,
        facts=_facts(path, found),
        certify=_certifier(proven(found.theta, described)),
    )


def _facts(path: Path, found: modelfile.ModelFile) -> Mapping[str, object]:
    return {"file": path.name, "run": found.run, "round": found.round, "device": found.device}


def _certifier(rate: Rate | None) -> Callable[[int], Certificate | None]:
    return lambda evaluations: None if rate is None else rate.certificate(evaluations)


def _exported(path: Path) -> Model:
    from fedeq_edge.onnx.runtime import Predictor  # noqa: PLC0415  # onnxruntime only where needed

    predictor = Predictor(path)
    told = predictor.metadata
    return Model(
        engine=_OnnxEngine(predictor),
        input_shape=predictor.input_shape,
        labels=predictor.labels,
        budget=predictor.budget,
        tol=predictor.tol,
        facts={"file": path.name, **_told(told, path)},
        certify=_stored_certificate(told),
    )


def _told(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    try:
        return {"round": int(metadata["fedeq.round"]), "weights_sha256": metadata["fedeq.weights_sha256"]}
    except (KeyError, ValueError) as error:
        raise ExportError(f"{path}: its metadata is damaged ({error}); export the model again") from error


def _stored_certificate(metadata: Mapping[str, str]) -> Callable[[int], Certificate | None]:
    """What the file says of its own count K0 of evaluations, for any other K.

    The bound is scale (gamma^(K + 1) + rounding), so gamma^(K - K0) times the one of K0 holds before K0, if not quite
    as tight, and the one of K0 from there on.
    """
    text = metadata.get("fedeq.certificate")
    if text is None:
        return lambda _: None
    own = msgspec.json.decode(text, type=Certificate)

    def proven(evaluations: int) -> Certificate:
        factor: float = own.gamma ** min(0, evaluations - own.evaluations)
        return dataclasses.replace(own, evaluations=evaluations, bound=own.bound * factor)

    return proven


class _OnnxEngine:
    """An exported model behind the interface of the others."""

    def __init__(self, predictor: Any) -> None:  # its class is known where onnxruntime is
        self._predictor = predictor

    def infer(self, x: Samples, *, budget: int, tol: float | None = None) -> Inference:
        found = self._predictor.infer(x, budget=budget, tol=tol or 0.0)
        return Inference(logits=found.logits, evaluations=found.iterations, residual=found.residual)


def _rows(found: Inference) -> Iterator[tuple[NDArray[np.floating], np.int64, np.floating]]:
    yield from zip(found.logits, found.evaluations, found.residual, strict=True)

"""A model on disk: what it is, its weights, and where they come from. Extension .fedeq, no torch needed."""

from pathlib import Path
from typing import Any

import msgspec

from fedeq_edge import storage
from fedeq_edge.deq.spec import ModelSpec, read_spec
from fedeq_edge.errors import ConfigError, StateError
from fedeq_edge.modelform import form
from fedeq_edge.training.step import Budget, Vector


class ModelFile(msgspec.Struct, frozen=True, kw_only=True):
    """A device's personal model. theta (p,), head (h,) float32; budget: the solver work it was chosen for.

    model: the fields of its ModelSpec, as the federation announced them. solver: the graph that solves it, of a model
    trained by a graph (onnx/solver.py), so that it can be asked where its kind is not known; else empty.
    run, round: the federation and how far it was. device: whose it is. labels: names of the classes, may be empty.
    """

    model: dict[str, Any]  # of whatever the kind has; object would go through the hook for vectors
    theta: Vector
    head: Vector
    budget: Budget
    run: str = ""
    round: int = 0
    device: str = ""
    labels: tuple[str, ...] = ()
    solver: bytes = b""

    @property
    def spec(self) -> ModelSpec:
        """What it is. Raises ConfigError where this version does not know such a model."""
        return read_spec(self.model)


def write(path: Path, model: ModelFile) -> None:
    """Write atomically, with a checksum."""
    storage.save(path, model)


def read(path: Path) -> ModelFile:
    """The model in `path`. Raises ConfigError where there is none or another file, StateError where it is damaged."""
    if form(path) == "onnx":
        raise ConfigError(
            f"{path} is an ONNX file, and this needs the personal.fedeq that it was exported from; fedeq model "
            "inspect, infer and bench take both"
        )
    try:
        model = storage.load(path, ModelFile)
    except StateError as error:
        if not isinstance(error.__cause__, msgspec.ValidationError):
            raise
        raise ConfigError(
            f"{path} is whole, but no personal model of this version ({error.__cause__}); name the personal.fedeq of a "
            "state folder"
        ) from error
    if model is None:
        raise ConfigError(f"model file {path} does not exist; a device writes it as personal.fedeq in its state folder")
    return model

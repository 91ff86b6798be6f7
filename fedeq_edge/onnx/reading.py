"""What a training graph says of itself, looked through and checked before onnxruntime sees a byte of it.

Neither onnxruntime nor the onnx package is needed.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from fedeq_edge.deq.description import Description
from fedeq_edge.errors import ConfigError, ExportError
from fedeq_edge.onnx.contract import DESCRIPTION, MOMENTS, SOLVER_GRAPH, refuse_newer
from fedeq_edge.onnx.scan import scan


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFacts:
    """description: of the model that it trains. optimizer: a key of `MOMENTS`. solver: the graph beside it."""

    description: Description
    optimizer: str
    solver: bytes


def read_training(content: bytes, name: str) -> TrainingFacts:
    """Facts of the training graph in `content`.

    Raises ExportError in one line, `name` in front, where it is damaged, is none, is of a newer format, or holds what
    no graph of ours does.
    """
    metadata = _checked(content, name, "training")
    optimizer = metadata.get("fedeq.optimizer", "")
    if optimizer not in MOMENTS:
        raise ExportError(f"{name}: optimiser {optimizer!r} is unknown here; update fedeq-edge")
    solver = _unpacked(metadata.get(SOLVER_GRAPH, ""), name)
    return TrainingFacts(description=_description(metadata, name), optimizer=optimizer, solver=solver)


def read_solver(content: bytes, name: str) -> Description:
    """Of the model that the solver graph in `content` solves. Raises ExportError as `read_training`."""
    return _description(_checked(content, name, "solver"), name)


def _checked(content: bytes, name: str, kind: str) -> Mapping[str, str]:
    """Metadata of the graph in `content`, which is of this kind and format."""
    metadata = scan(content, name).metadata
    found = metadata.get("fedeq.schema_version")
    if found is None or metadata.get("fedeq.kind") != kind:
        raise ExportError(f"{name}: an ONNX file, but no {kind} graph of fedeq-edge; let the gateway build it")
    refuse_newer(name, found)
    return metadata


def _description(metadata: Mapping[str, str], name: str) -> Description:
    if DESCRIPTION not in metadata:
        raise ExportError(f"{name}: does not describe its model; let the gateway build it anew")
    try:
        return msgspec.json.decode(metadata[DESCRIPTION], type=Description)
    except (msgspec.DecodeError, ConfigError) as error:
        raise ExportError(f"{name}: its model cannot be read: {error}; update fedeq-edge") from error


def _unpacked(packed: str, name: str) -> bytes:
    try:
        return base64.b64decode(packed, validate=True)
    except binascii.Error as error:
        raise ExportError(f"{name}: its solver is damaged; fetch it again") from error

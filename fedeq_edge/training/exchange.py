"""What passes between an agent's link process and its trainer process: length-prefixed msgpack on two pipes.

The trainer is a process of its own so that an out-of-memory or a crash in training never takes the link down, and
lives only while there is training to do, so that an idle device pays for no torch and no onnxruntime.
"""

import struct
from typing import Any, BinaryIO, Final

import msgspec

from fedeq_edge import structs
from fedeq_edge.consensus.methods import Method
from fedeq_edge.training.step import BackendName, LocalResult, LocalTask, Personal, Plan, Vector

_LENGTH: Final = struct.Struct("<I")
_LIMIT_BYTES: Final = 2**30


class Setup(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """First request: what to train on what. Answered by `Ready`.

    model: as the manifest has it. backend: what trains; graph: file with the training graph where that needs one, which
    then says what the model is, sha256: which it must have.
    cache: file that keeps the calibration of this model on this device. slowdown, shared: of an emulated board
    (hardware/clock.py). seed: of the federation's initial weights.
    """

    model: dict[str, Any]  # of whatever the kind has; object would go through the hook for vectors
    plan: Plan
    method: Method
    backend: BackendName
    graph: str
    graph_sha256: bytes
    data: str
    cache: str
    profile: str
    slowdown: float
    shared: bool
    seed: int


class Work(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Train one round. Answered by `Done` or `Failed`."""

    task: LocalTask


class Fit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Make the personal model. Answered by `Fitted` or `Failed`."""

    z: Vector
    head: Vector


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The trainer has its model, data and calibration."""

    samples: int
    rss_peak: int


class Done(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A round's result."""

    result: LocalResult
    rss_peak: int


class Fitted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The personal model. solver: the graph that solves it, of one trained by a graph; else empty."""

    personal: Personal
    solver: bytes
    rss_peak: int


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The work could not be done, in one line."""

    reason: str


Request = Setup | Work | Fit
Reply = Ready | Done | Fitted | Failed


def write(stream: BinaryIO, value: Request | Reply) -> None:
    """Send one value. Raises BrokenPipeError where the other side is gone."""
    content = structs.pack(value)
    stream.write(_LENGTH.pack(len(content)) + content)
    stream.flush()


def read_request(stream: BinaryIO) -> Request | None:
    """The next request, None when the link has closed the pipe."""
    content = _read(stream)
    return None if content is None else structs.unpack(content, Request)  # type: ignore[arg-type]  # a union type


def read_reply(stream: BinaryIO) -> Reply | None:
    """The next reply, None when the trainer has ended."""
    content = _read(stream)
    return None if content is None else structs.unpack(content, Reply)  # type: ignore[arg-type]  # a union type


def _read(stream: BinaryIO) -> bytes | None:
    prefix = stream.read(_LENGTH.size)
    if len(prefix) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(prefix)
    if length > _LIMIT_BYTES:
        return None  # not our protocol: something else wrote to the pipe
    content = stream.read(length)
    return content if len(content) == length else None

"""What the engine asks of a worker, and what comes back: plain values, msgpack on a pipe where that is another process.

The consensus that a job starts from is not part of it: it is sent once to each worker, whatever the number of clients,
and named by its digest.
"""

import struct
from typing import BinaryIO, Final, Literal

import msgspec

from fedeq_edge import structs
from fedeq_edge.protocol.state import NOTHING
from fedeq_edge.simulation.evaluation import Evaluation
from fedeq_edge.simulation.scenario import Setup
from fedeq_edge.training.step import LocalResult, Personal, Vector

Kind = Literal["train", "personalise", "evaluate"]
_LENGTH: Final = struct.Struct("<I")
_LIMIT_BYTES: Final = 2**30


class Job(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One client's work. number: of the job in its run. base: digest of the consensus that it starts from.

    round: how many rounds the federation has completed. nu, head: the client's, head empty for the initial one. pace:
    how many times slower than usual the device is. drift: as a learner's. budgets: values of K to be evaluated at.
    local: whether theta_i is evaluated as well, after another round. deliver: whether the personal model is trained for
    that a method may have, or only a head fitted.
    """

    number: int
    kind: Kind
    device: str
    round: int
    base: bytes
    nu: Vector = msgspec.field(default_factory=lambda: NOTHING)
    head: Vector = msgspec.field(default_factory=lambda: NOTHING)
    kappa: float = 1.0
    seed: int = 0
    pace: float = 1.0
    drift: float = 1.0
    budgets: tuple[int, ...] = ()
    local: bool = False
    deliver: bool = True

    @property
    def name(self) -> tuple[str, str, int]:
        """What an outcome must agree with."""
        return self.kind, self.device, self.round


class Outcome(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What has come of a job. seconds: of the device. failed: why nothing has, in one line.

    cost_s: seconds that it took here; nothing that is told of a run depends on it.
    """

    number: int
    name: tuple[str, str, int]
    result: LocalResult | None = None
    personal: Personal | None = None
    evaluation: Evaluation | None = None
    seconds: float = 0.0
    drift: float = 1.0
    failed: str = ""
    cost_s: float = 0.0


class Begin(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From here on jobs are of this run."""

    setup: Setup


class Consensus(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Jobs with this base start from z, (s,) float32; an earlier one is not needed any more."""

    base: bytes
    z: Vector


Request = Begin | Consensus | Job


def write(stream: BinaryIO, content: bytes) -> None:
    """Send packed content. Raises BrokenPipeError where the other side is gone."""
    stream.write(_LENGTH.pack(len(content)))
    stream.write(content)
    stream.flush()


def read(stream: BinaryIO) -> bytes | None:
    """What the other side has sent next, None when it has ended."""
    prefix = stream.read(_LENGTH.size)
    if len(prefix) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(prefix)
    content = stream.read(length) if length <= _LIMIT_BYTES else b""
    return content if len(content) == length else None


def request(content: bytes) -> Request:
    """The request in packed content."""
    return structs.unpack(content, Request)  # type: ignore[arg-type]  # a union type


def outcome(content: bytes | memoryview) -> Outcome:
    """The outcome in packed content."""
    return structs.unpack(content, Outcome)

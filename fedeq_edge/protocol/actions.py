"""What a state machine asks its shell to do. A shell carries actions out in the order given.

The order matters: `Save`, `Store` and `Snapshot` stand before the `Publish` that tells somebody about them, so that
nothing is ever acknowledged that a crash could lose.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedeq_edge.protocol.state import AggregatorState, ClientState, Pending
from fedeq_edge.training.step import LocalTask, Vector
from fedeq_edge.wire.messages import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """Send a payload."""

    topic: str
    payload: bytes
    retain: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One canonical log line: what happened and its facts."""

    event: str
    facts: Mapping[str, object]


# A client's


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """Write the client's whole state to disk, atomically."""

    state: ClientState


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """Write what has come of a round to disk, beside the state there: a contribution on its way, and the new head."""

    pending: Pending
    head: Vector


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """Note the verdict on the contribution on disk. It may be lost in a crash: it is said again to who asks again."""

    accepted: bool
    factor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepGraph:
    """Write this training graph to disk, in the place of the one before: what is to be trained comes after."""

    graph: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Configure:
    """The model, plan and seed to train with from here on, out of the manifest."""

    manifest: Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Train:
    """Run one round's local work; answer with `Client.trained` or `Client.failed`."""

    task: LocalTask
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Personalise:
    """Fit this device's own model to the consensus after the last of `rounds` rounds; answered like `Train`."""

    rounds: int
    z: Vector
    head: Vector
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The federation is over for us."""


ClientAction = Publish | Note | Save | Keep | Settle | KeepGraph | Configure | Train | Personalise | Finished


# An aggregator's


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    """Write an accepted contribution to disk before it is acknowledged; kappa and factor: with what it counts."""

    device: str
    round: int
    kappa: float
    factor: int
    blob: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Write the whole state; contributions stored earlier are part of it."""

    state: AggregatorState
    consensus: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Append one line to the history of rounds."""

    line: Mapping[str, object]


AggregatorAction = Publish | Note | Store | Snapshot | Record | Finished

"""What survives a crash, as plain values: of a client, and of an aggregator."""

import hashlib

import msgspec
import numpy as np

from fedeq_edge.training.step import Vector
from fedeq_edge.wire.coding import Codec
from fedeq_edge.wire.messages import Metrics, Status

NOTHING = np.zeros(0, np.float32)


def vector_digest(vector: Vector) -> bytes:
    """sha256 of a float32 vector's little-endian bytes; empty for an empty vector."""
    return hashlib.sha256(vector.astype("<f4").tobytes()).digest() if vector.size else b""


def dual_digest(nu: Vector) -> bytes:
    """Name of a dual: its vector_digest, empty where nu = 0 whether or not there is a vector yet."""
    return vector_digest(nu) if nu.any() else b""


class Pending(msgspec.Struct, frozen=True, kw_only=True):
    """A contribution on its way: kept until the aggregator's verdict. blob: the encoded message, sent as it is.

    body: the coded difference, which moves nu by kappa times what it decodes to once it is accepted.
    """

    round: int
    kappa: float
    codec: Codec
    body: bytes
    blob: bytes


class ClientState(msgspec.Struct, frozen=True, kw_only=True):
    """A device's memory of one federation. z: the consensus z_hat it holds, (s,); nu: its dual, (s,); head: w_i."""

    run: str = ""
    accepted_round: int = -1
    z: Vector = msgspec.field(default_factory=lambda: NOTHING)
    nu: Vector = msgspec.field(default_factory=lambda: NOTHING)
    head: Vector = msgspec.field(default_factory=lambda: NOTHING)
    pending: Pending | None = None


class MemberState(msgspec.Struct, kw_only=True):
    """What the aggregator remembers of a device beside its dual.

    accepted_round: no contribution up to this round is folded in again. duals: dual_digest of its nu.
    """

    accepted_round: int = -1
    duals: bytes = b""


class AggregatorState(msgspec.Struct, kw_only=True):
    """The aggregator's memory, beside the consensus.

    cohort: of the open round, empty between rounds. issued: kappa of each task by round and device, and bases: digest
    of z_hat by round, both for the rounds from which a late contribution is still taken. contributed, late: what the
    contributions since the last close said, in order of arrival: those to this round, and those to earlier ones.
    identity: digest of what is fixed for the life of the federation.
    """

    run: str
    status: Status
    round: int
    cohort: tuple[str, ...]
    members: dict[str, MemberState]
    issued: dict[int, dict[str, float]]
    bases: dict[int, bytes]
    contributed: dict[str, Metrics] = msgspec.field(default_factory=dict)
    late: dict[str, Metrics] = msgspec.field(default_factory=dict)
    identity: bytes = b""

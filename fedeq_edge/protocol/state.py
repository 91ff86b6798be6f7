"""What survives a crash, as plain values: of a client, and of an aggregator."""

import hashlib
import struct

import msgspec
import numpy as np

from fedeq_edge.consensus.fixed import WHOLE, FixedVector, fixed_penalty, fraction_bits, move_dual
from fedeq_edge.consensus.privacy import Draw
from fedeq_edge.training.step import Vector
from fedeq_edge.wire import coding, messages
from fedeq_edge.wire.messages import Metrics, Status

NOTHING = np.zeros(0, np.float32)
NO_DUAL = np.zeros(0, np.int64)


def vector_digest(vector: Vector) -> bytes:
    """sha256 of a float32 vector's little-endian bytes; empty for an empty vector."""
    return hashlib.sha256(np.ascontiguousarray(vector, "<f4").data).digest() if vector.size else b""


def dual_name(before: bytes, round_number: int, kappa: float, factor: int, contribution: bytes) -> bytes:
    """Name of a dual after one more contribution (its sha256) to the dual named `before`; empty is nu = 0.

    Two sides whose names agree have moved nu by the same numbers. Unlike a digest of nu it needs no nu, which the
    aggregator has on disk only.
    """
    moved = struct.pack("<QQI", round_number, fixed_penalty(kappa), factor)
    return hashlib.sha256(before + moved + contribution).digest()


class Pending(msgspec.Struct, frozen=True, kw_only=True):
    """A contribution on its way: kept until the aggregator's verdict. blob: the encoded message, sent as it is.

    transfer: sha256 of the blob. Once it is accepted nu moves by kappa times the difference in it.
    masked: the task asked for it in a masked sum. Then the blob itself never leaves the device: what does is made of
    it, and not kept (protocol/masked_device.py). revealed: we have helped to unmask a sum that may hold it.
    """

    round: int
    kappa: float
    blob: bytes
    transfer: bytes
    masked: bool = False
    revealed: bool = False


class ClientState(msgspec.Struct, frozen=True, kw_only=True):
    """A device's memory of one federation.

    z: the consensus z_hat it holds, (s,) float32, and its digest `base`; nu: its dual in fixed point, (s,) int64
    (consensus/fixed.py), and its name `dual`; head: w_i.
    """

    run: str = ""
    accepted_round: int = -1
    z: Vector = msgspec.field(default_factory=lambda: NOTHING)
    base: bytes = b""
    nu: FixedVector = msgspec.field(default_factory=lambda: NO_DUAL)
    dual: bytes = b""
    head: Vector = msgspec.field(default_factory=lambda: NOTHING)
    pending: Pending | None = None


def settled(state: ClientState, *, accepted: bool, factor: int) -> ClientState:
    """The state after the verdict on its pending contribution: nu has moved as the aggregator's did, if it counts."""
    pending = state.pending
    if pending is None or not accepted:
        return msgspec.structs.replace(state, pending=None)
    received = messages.decode(pending.blob)
    message = messages.contribution(received)
    difference = coding.decode(message.codec, received.body, message.length)
    nu = state.nu.copy() if state.nu.size else np.zeros(difference.size, np.int64)
    move_dual(nu, difference, pending.kappa, fraction_bits(np.float32), factor)
    return counted(msgspec.structs.replace(state, nu=nu), pending, factor)


def counted(state: ClientState, pending: Pending, factor: int) -> ClientState:
    """The state once `pending` counts, with its dual renamed; nu itself is as it was given."""
    return msgspec.structs.replace(
        state,
        pending=None,
        dual=dual_name(state.dual, pending.round, pending.kappa, factor, pending.transfer),
        accepted_round=max(pending.round, state.accepted_round),
    )


class MemberState(msgspec.Struct, kw_only=True):
    """What the aggregator remembers of a device beside its dual.

    accepted_round: no contribution up to this round is folded in again. dual: name of its nu. transfer: sha256 of the
    last contribution that counted, and factor: with what it counted, for one who offers it again.
    """

    accepted_round: int = -1
    dual: bytes = b""
    transfer: bytes = b""
    factor: int = WHOLE


class Revealing(msgspec.Struct, frozen=True, kw_only=True):
    """A masked sum whose survivors have been told (protocol/masked_rounds.py): from there on no other may be made.

    server: as `MaskingServer.snapshot` gave it. attempt: how many sums the round had begun. weights: omega_i and
    kappa_i 2^32 of each survivor. transfers: sha256 of what it sent.
    """

    session: bytes
    attempt: int
    server: bytes
    weights: dict[str, tuple[int, int]]
    transfers: dict[str, bytes]


class AggregatorState(msgspec.Struct, kw_only=True):
    """The aggregator's memory, beside the consensus.

    open: whether a round is. cohort: of the open round. denied: devices that nothing is taken from. issued: kappa of
    each task by round and device, and bases: digest of z_hat by round, both for the rounds from which a late
    contribution is still taken. contributed, late: what the contributions since the last close said, in order of
    arrival: those to this round, and those to earlier ones.
    accepted: (device, round, weight) of each of them. started: (device, how many of them it had made by then) where a
    dual has begun at zero since.
    draw: how the cohort of the open round was drawn, and spent: sampling rate -> rounds whose sum was let out; both for
    a private federation alone.
    identity: digest of what is fixed for the life of the federation.
    revealing: the masked sum of the open round, once it is closed but for its masks.
    Of a worker: handed: the share that its root has not answered, as a blob, empty without one. root_run, root_round:
    run of that root, and the last round of its that z_hat holds.
    """

    run: str
    status: Status
    round: int = 0
    open: bool = False
    cohort: tuple[str, ...] = ()
    denied: set[str] = msgspec.field(default_factory=set)
    members: dict[str, MemberState] = msgspec.field(default_factory=dict)
    issued: dict[int, dict[str, float]] = msgspec.field(default_factory=dict)
    bases: dict[int, bytes] = msgspec.field(default_factory=dict)
    contributed: dict[str, Metrics] = msgspec.field(default_factory=dict)
    late: dict[str, Metrics] = msgspec.field(default_factory=dict)
    accepted: list[tuple[str, int, int]] = msgspec.field(default_factory=list)
    started: list[tuple[str, int]] = msgspec.field(default_factory=list)
    draw: Draw | None = None
    spent: dict[float, int] = msgspec.field(default_factory=dict)
    identity: bytes = b""
    revealing: Revealing | None = None
    handed: bytes = b""
    root_run: str = ""
    root_round: int = 0

"""One federation on several aggregators: workers, each the aggregator of its own devices, and a root that adds up.

Theory of operation
-------------------
A worker runs the whole protocol with its devices, under a federation name of its own. Where an aggregator would close
a round, it hands over: its `Share` goes to the root, and it opens no further round before the root has answered. The
root closes once it has the share of every worker, with the arithmetic of one aggregator over all devices; sums of
integers are exact, so z is the same bit for bit. Its answer is the step of the consensus.

A share says what the devices *hold* (H and R) beside what they have contributed, so the root keeps no sums from one
round to the next: a worker may join, or lose its disk and begin anew, and the next z is right for the devices there
are. Between rounds a root is its consensus and a number.

Either side may be killed at any time. A worker says its share again until it is answered, and the share is on its disk
before it is sent. A root stores its consensus before it answers, and answers a share of a round that it has closed
(which it recognises by its number) with the consensus in force, never by adding it again. A worker that comes back
holds up the round until it has: what its devices contributed is on its disk. One that has nothing to give says so
after its deadline, and is passed over.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import numpy as np

from fedeq_edge.consensus import records
from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.errors import ContributionError, RemoteWireError, WireError
from fedeq_edge.protocol.actions import AggregatorAction, Finished, Note, Publish, Record, Snapshot
from fedeq_edge.protocol.federation import Federation
from fedeq_edge.protocol.publication import Publication
from fedeq_edge.protocol.state import AggregatorState
from fedeq_edge.wire import chunks, coding, messages
from fedeq_edge.wire.frame import FRAME_BYTES, HEADER_LIMIT_BYTES
from fedeq_edge.wire.topics import Topics

SHARE_RETRY_S: Final = 5.0  # a share or step is a few seconds of a slow uplink; said again it costs that once more
_RUN_BYTES: Final = chunks.PACKET_LIMIT_BYTES // chunks.BLOCK_BYTES * chunks.BLOCK_BYTES - chunks.BLOCK_BYTES


def pieces(blob: bytes) -> list[bytes]:
    """A blob as payloads that every broker takes, in order; whoever joins them needs no more than these."""
    name, size = chunks.digest(blob), len(blob)
    starts = range(0, size, _RUN_BYTES)
    headers = [messages.Chunk(transfer=name, index=start // chunks.BLOCK_BYTES, size=size) for start in starts]
    return [
        messages.encode(header, blob[start : start + _RUN_BYTES]) for header, start in zip(headers, starts, strict=True)
    ]


@dataclass(slots=True)
class Parcel:
    """A blob that comes in pieces; limit_bytes bounds it before memory is taken for it."""

    limit_bytes: int
    _incoming: chunks.Incoming | None = None

    def add(self, chunk: messages.Chunk, body: memoryview) -> bytes | None:
        """The blob, once its last piece is there. Raises RemoteWireError on a piece that does not fit."""
        if chunk.size > self.limit_bytes:
            raise RemoteWireError(f"blob of {chunk.size} bytes, expected at most {self.limit_bytes}")
        if self._incoming is None or (self._incoming.name, self._incoming.size) != (chunk.transfer, chunk.size):
            self._incoming = chunks.Incoming(chunk.transfer, chunk.size)
        self._incoming.add(chunk.index, body)
        if not self._incoming.complete:
            return None
        incoming, self._incoming = self._incoming, None
        return incoming.blob()


def share_blob(share: records.Share, *, round_number: int, base: bytes, federation: Federation) -> bytes:
    """A worker's share as it travels."""
    message = messages.Share(
        round=round_number,
        base=base,
        federation=federation.digest,
        length=share.steps.size,
        weight=str(share.weight),
        squares=str(share.squares),
        penalties=str(share.penalties),
    )
    vectors = (share.steps, share.duals) if federation.method.server == "fresh" else (share.steps,)
    return messages.encode(message, np.concatenate(vectors).astype("<i8").tobytes())


def share_of(message: messages.Share, body: memoryview, federation: Federation) -> records.Share:
    """The share in a message. Raises RemoteWireError where its body has another length than it says."""
    vectors = 2 if federation.method.server == "fresh" else 1
    if len(body) != 8 * vectors * message.length:
        raise RemoteWireError(f"share of {message.length} values with {len(body)} bytes")
    both = np.frombuffer(body, "<i8").astype(np.int64).reshape(vectors, message.length)
    return records.Share(
        steps=both[0],
        weight=int(message.weight),
        squares=int(message.squares),
        duals=both[1] if vectors > 1 else np.zeros(message.length, np.int64),
        penalties=int(message.penalties),
    )


@dataclass(slots=True)
class Upstream:
    """A worker's end of the way to its root. root: topics of the root's federation.

    state: the worker's; what of a share must survive a crash is there. up, down: topics of the two directions.
    """

    federation: Federation
    root: Topics
    state: AggregatorState
    published: Publication
    up: str = field(init=False)
    down: str = field(init=False)
    _parcel: Parcel = field(init=False)
    _said_at: float = float("-inf")

    def __post_init__(self) -> None:
        name = self.federation.topics.federation
        self.up, self.down = self.root.worker_up(name), self.root.worker_down(name)
        size = self.published.z_hat.size
        body = max(coding.largest_bytes(codec, size) for codec in ("f32", self.federation.down))
        self._parcel = Parcel(FRAME_BYTES + HEADER_LIMIT_BYTES + body)

    @property
    def waiting(self) -> bool:
        """Whether the root has a share of ours to answer, so that no round may open."""
        return bool(self.state.handed)

    def blob(self, share: records.Share) -> bytes:
        """The share for the round after the last one that we know of."""
        return share_blob(
            share, round_number=self.state.root_round + 1, base=self.published.base, federation=self.federation
        )

    def say(self, blob: bytes, now: float) -> list[AggregatorAction]:
        """Send a share, unless one was sent within the last `SHARE_RETRY_S`."""
        if now - self._said_at < SHARE_RETRY_S:
            return []
        self._said_at = now
        return [Publish(topic=self.up, payload=piece) for piece in pieces(blob)]

    def say_at_once(self) -> None:
        """What is said next is not held back: it is new, or the connection is."""
        self._said_at = float("-inf")

    def heard(self, payload: bytes) -> tuple[messages.Model, memoryview] | None:
        """A consensus of the root, once its last piece has come. Raises RemoteWireError where it is not for us."""
        received = messages.decode(payload)
        if not isinstance(received.message, messages.Chunk):
            raise RemoteWireError(f"a root does not send a {type(received.message).__name__.lower()} message")
        blob = self._parcel.add(received.message, received.body)
        return None if blob is None else self._checked(messages.decode(blob))

    def acknowledgement(self) -> AggregatorAction:
        """What tells the root that the consensus with our digest is stored here."""
        ack = messages.ChunkAck(transfer=self.published.base, bitmap=b"")
        return Publish(topic=self.up, payload=messages.encode(ack))

    def _checked(self, received: messages.Received) -> tuple[messages.Model, memoryview]:
        model, state = received.message, self.state
        if not isinstance(model, messages.Model):
            raise RemoteWireError(f"a root does not send a {type(model).__name__.lower()} message")
        if state.root_run and model.run != state.root_run:
            raise RemoteWireError(
                f"the root runs {model.run!r} and this worker belongs to {state.root_run!r}; was its state lost? "
                "restore it, or begin anew with empty state folders everywhere"
            )
        return model, received.body


@dataclass(slots=True)
class Root:
    """The machine of a root. Every method takes the time in seconds of a monotonic clock and returns actions in order.

    consensus: one without members. workers: all whose share a round needs.
    """

    federation: Federation
    consensus: Consensus
    state: AggregatorState
    workers: tuple[str, ...]
    boot: str
    refusals: Counter[str] = field(default_factory=Counter)
    _shares: dict[str, records.Share] = field(default_factory=dict)
    _parcels: dict[str, Parcel] = field(default_factory=dict)
    _acknowledged: set[str] = field(default_factory=set)
    _opened_at: float = 0.0
    _final_at: float = 0.0
    _published: Publication = field(init=False)
    _actions: list[AggregatorAction] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._published = Publication(self.state.run, self.consensus.z_hat, self.state.round)

    # Events

    def connected(self, now: float, _packet_limit: int | None = None) -> list[AggregatorAction]:
        """Say that we are here; workers say their shares by themselves."""
        self._opened_at = self._opened_at or now
        birth = messages.encode(messages.AggregatorState(boot=self.boot))
        self._actions.append(Publish(topic=self.federation.topics.aggregator, payload=birth, retain=True))
        if self.state.status == "finishing":
            for worker in sorted(set(self.workers) - self._acknowledged):
                self._answer(worker, b"")
        return self._flush()

    def tick(self, now: float) -> list[AggregatorAction]:
        """The end does not wait for ever for a worker that is gone."""
        if self.state.status == "finishing":
            self._final_at = self._final_at or now + self.federation.schedule.final_s
            if now >= self._final_at:
                self._finish()
        return self._flush()

    def arrived(self, topic: str, payload: bytes, now: float) -> list[AggregatorAction]:
        """A payload came; what does not follow the protocol is counted, noted and dropped."""
        worker = self.federation.topics.worker_of(topic)
        if worker is None:
            return []
        try:
            self._hear(worker, messages.decode(payload), now)
        except (WireError, ContributionError) as error:
            code = error.code if isinstance(error, ContributionError) else "malformed"
            self.refusals[code] += 1
            self._note("refused", worker=worker, round=self.state.round + 1, code=code, reason=str(error))
        return self._flush()

    def offline(self) -> bytes:
        """Payload of our farewell and last will."""
        return messages.encode(messages.Offline(boot=self.boot))

    def status(self) -> dict[str, Any]:
        """Where the federation stands, for status.json."""
        return {
            "run": self.state.run,
            "status": self.state.status,
            "round": self.state.round,
            "rounds": self.federation.rounds,
            "workers": list(self.workers),
            "contributed": sorted(self._shares),
            "refusals": dict(self.refusals),
        }

    # Shares

    def _hear(self, worker: str, received: messages.Received, now: float) -> None:
        message = received.message
        if worker not in self.workers:
            raise ContributionError("not_a_worker", f"{worker} is no worker of this root; name it in `workers`")
        if isinstance(message, messages.ChunkAck):
            self._on_ack(worker, message)
        elif isinstance(message, messages.Chunk):
            parcel = self._parcels.setdefault(worker, Parcel(self._limit_bytes))
            blob = parcel.add(message, received.body)
            if blob is not None:
                self._on_share(worker, messages.decode(blob), now)
        else:
            raise RemoteWireError(f"a worker does not send a {type(message).__name__.lower()} message")

    @property
    def _limit_bytes(self) -> int:
        return FRAME_BYTES + HEADER_LIMIT_BYTES + 16 * self._published.z_hat.size

    def _on_share(self, worker: str, received: messages.Received, now: float) -> None:
        message = received.message
        if not isinstance(message, messages.Share):
            raise RemoteWireError(f"upload holds a {type(message).__name__.lower()} message, expected a share")
        if (message.federation, message.length) != (self.federation.digest, self._published.z_hat.size):
            raise ContributionError(
                "federation", f"worker {worker} trains another model, method or seed; give it the settings of its root"
            )
        if message.round > self.state.round + 1:
            raise ContributionError(
                "rollback",
                f"worker {worker} knows round {message.round - 1}, this root has come to {self.state.round}; "
                "was an old backup restored?",
            )
        if message.round <= self.state.round or self.state.status in ("finishing", "finished"):
            self._answer(worker, message.base)
            return
        if message.base != self._published.base:
            raise ContributionError("digest", f"worker {worker}: share starts from another consensus than ours")
        self._shares[worker] = share_of(message, received.body, self.federation)
        if set(self._shares) >= set(self.workers) and any(share.weight for share in self._shares.values()):
            self._close(now)

    def _close(self, now: float) -> None:
        self.consensus.gather(self._shares)
        before, number = self._published.base, self.state.round + 1
        report = self.consensus.close_round(
            lambda difference: self._published.advance(difference, self.federation.down, number)
        )
        self.state.round = number
        last = number >= self.federation.rounds
        self.state.status = "finishing" if last else "running"
        self._snapshot()
        self._actions.append(Record(line=self._line(report, now)))
        self._shares, self._opened_at = {}, now
        for worker in self.workers:
            self._answer(worker, before)

    def _answer(self, worker: str, held: bytes) -> None:
        """The consensus in force for a worker that holds another one."""
        blob = self._published.step_from(held, self._published.base) or self._published.whole()
        topic = self.federation.topics.worker_down(worker)
        self._actions.extend(Publish(topic=topic, payload=piece) for piece in pieces(blob))

    def _on_ack(self, worker: str, ack: messages.ChunkAck) -> None:
        """The last consensus has come to this worker; with that of all, nothing is left to do."""
        if self.state.status == "finishing" and ack.transfer == self._published.base:
            self._acknowledged.add(worker)
            if self._acknowledged >= set(self.workers):
                self._finish()

    def _finish(self) -> None:
        self.state.status = "finished"
        self._snapshot()
        self._actions.append(Finished())

    def _line(self, report: records.RoundReport, now: float) -> Mapping[str, object]:
        return {
            "kind": "round",
            "round": self.state.round,
            "contributed": list(report.contributors),
            "seconds": now - self._opened_at,
            "primal_residual": report.primal_residual,
            "step": report.step,
            "correction": report.correction,
            "z": self._published.base.hex(),
        }

    # Bookkeeping

    def _snapshot(self) -> None:
        copied = msgspec.convert(msgspec.to_builtins(self.state, builtin_types=(bytes,)), AggregatorState)
        self._actions.append(Snapshot(state=copied, consensus=self.consensus.snapshot()))

    def _note(self, event: str, **facts: object) -> None:
        self._actions.append(Note(event=event, facts=facts))

    def _flush(self) -> list[AggregatorAction]:
        actions, self._actions = self._actions, []
        return actions

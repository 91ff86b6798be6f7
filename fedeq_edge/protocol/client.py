"""A device's side of the protocol.

Theory of operation
-------------------
Rule 1: one thing at a time. The machine is fetching a consensus, training, waiting for the verdict on a contribution,
or idle; the newest task waits until the present work is done, and an older one is forgotten.
Rule 2: the dual moves when the aggregator has accepted, never before (`_settle`). Until then the contribution lies in
the state on disk and is sent again after every reconnect; the aggregator knows a repeated one by (device, round).
Rule 3: nothing is remembered of a connection. After `connected` the machine says again who it is and what it owes.
Rule 4: what a code leaves out stays in the problem: the dual moves by the *decoded* difference, as on the server.
In a masked round nothing is sent that tells of it alone (masked_device.py), and the verdict comes with the whole sum;
where that is missed, the next task says what has counted.
Rule 5: no training with a dual that the aggregator does not hold: its task names the one that counts (`_agrees`).
"""

import hashlib
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from fedeq_edge.consensus.fixed import WHOLE, dual_value
from fedeq_edge.errors import ContributionError, LocalWireError, RemoteWireError, WireError
from fedeq_edge.protocol.actions import (
    ClientAction,
    Configure,
    Finished,
    Keep,
    Note,
    Personalise,
    Publish,
    Save,
    Settle,
    Train,
)
from fedeq_edge.protocol.masked import FEATURE
from fedeq_edge.protocol.state import ClientState, Pending, settled, vector_digest
from fedeq_edge.training.step import LocalResult, LocalTask, Personal
from fedeq_edge.wire import chunks, coding, messages
from fedeq_edge.wire.topics import Topics

if TYPE_CHECKING:
    from fedeq_edge.protocol.masked_device import Answer, Part

RETRY_S: Final = 10.0  # an aggregator that answers at all does so within a second; slow links need a few per chunk
# Contributions that a start decodes to have nu again; and the whole state is written once in as many rounds.
SETTLED_A_SAVE: Final = 16
MODEL_LIMIT_BYTES: Final = 64 * 2**20  # largest consensus a device takes: 16 million float32 parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a device says of itself at birth. boot: new at every start of the agent."""

    device: str
    boot: str
    samples: int
    profile: str = ""
    emulated: bool = False
    data_age_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Resources of the agent's processes so far, bytes; battery: percent, None on mains or without one."""

    wire_up: int = 0
    wire_down: int = 0
    rss_idle: int = 0
    rss_peak: int = 0
    battery: float | None = None


@dataclass(slots=True)
class Client:
    """The machine. Every method takes the time in seconds of a monotonic clock and returns actions in order."""

    identity: Identity
    topics: Topics
    state: ClientState
    codecs: tuple[str, ...] = coding.CODECS
    _manifest: messages.Manifest | None = None
    _task: messages.Task | None = None
    _working: messages.Task | None = None  # what the trainer has in hand; a newer task may be waiting
    link: chunks.Link = field(default_factory=chunks.Link)
    refusals: Counter[str] = field(default_factory=Counter)
    last_refusal: str = ""
    _outgoing: chunks.Outgoing | None = None
    _incoming: chunks.Incoming | None = None
    _fetching: bytes = b""  # digest of the consensus on its way to us
    _wants_whole: bool = False  # a difference did not decode to the consensus that was asked for
    _part: "Part | None" = None  # in the masked sum of the newest task
    _report: messages.Report | None = None
    _progress_at: float = 0.0
    _battery: float | None = None
    _unfolded: int = 0  # verdicts since the state was written whole
    _actions: list[ClientAction] = field(default_factory=list)

    # Events

    def connected(
        self, now: float, packet_limit: int | None = None, battery: float | None = None
    ) -> list[ClientAction]:
        """Say who we are and go on with whatever was under way. packet_limit: of the broker, bytes, if it told one."""
        self.link.packet_limit = packet_limit
        self._battery = battery
        if self._outgoing is not None:
            self._outgoing.restart()
        self._publish_birth()
        self._resend(now)
        return self._flush()

    def arrived(self, topic: str, payload: bytes, now: float) -> list[ClientAction]:
        """A payload came; one that does not follow the protocol is noted and dropped."""
        try:
            self._dispatch(topic, messages.decode(payload), now)
        except WireError as error:
            self.refusals["malformed"] += 1
            self._note("refused a message", topic=topic, reason=str(error))
        return self._flush()

    def trained(self, result: LocalResult, usage: Usage, now: float) -> list[ClientAction]:
        """The trainer has done its round: keep the contribution and send it."""
        task, self._working = self._working, None
        if task is not None and task.run == self.state.run:
            try:
                pending = self._contribution(task, result, usage)
                self.state = msgspec.structs.replace(self.state, pending=pending, head=result.head)
                self._actions.append(Keep(pending=pending, head=result.head))
            except LocalWireError as error:
                self._decline(task, str(error))
        self._advance(now)
        return self._flush()

    def personalised(self, personal: Personal, usage: Usage, now: float) -> list[ClientAction]:
        """The trainer has fitted our own model: report its numbers."""
        task, self._working = self._working, None
        if task is not None and task.run == self.state.run:
            self._keep(head=personal.head)
            if self._manifest is not None and self._manifest.status != "finished":
                self._report = _report(task, personal, usage)
                self._send_report(now)
        self._advance(now)
        return self._flush()

    def failed(self, reason: str, now: float) -> list[ClientAction]:
        """The trainer could not do its work: tell the aggregator, stay in the fleet, go on with a newer task."""
        task, self._working = self._working, None
        if task is not None and task.run == self.state.run:
            self._decline(task, reason)
        self._advance(now)
        return self._flush()

    def tick(self, now: float) -> list[ClientAction]:
        """Say again what was not answered for `RETRY_S`."""
        waits = self._outgoing is not None or self._fetching or self._report is not None
        if waits and now - self._progress_at >= RETRY_S:
            if self._outgoing is not None:
                self._outgoing.restart()
            self._resend(now)
        return self._flush()

    def offline(self) -> bytes:
        """Payload of our farewell and last will."""
        return messages.encode(messages.Offline(boot=self.identity.boot))

    def status(self) -> dict[str, Any]:
        """How we stand with the aggregator, for status.json."""
        task = self._working or self._task
        return {
            "run": self.state.run,
            "federation": self._manifest.status if self._manifest else "unknown",
            "doing": self._doing(),
            "round": task.round if task else None,
            "accepted_round": self.state.accepted_round,
            "pending_bytes": len(self.state.pending.blob) if self.state.pending else 0,
            "refusals": dict(self.refusals),
            "last_refusal": self.last_refusal,
            "repeated_bytes": self.link.repeated_bytes,
        }

    def _doing(self) -> str:
        if self._working is not None:
            return "personalising" if self._working.final else "training"
        if self._outgoing is not None:
            return "sending"
        return "fetching" if self._fetching else "waiting"

    # Messages

    def _dispatch(self, topic: str, received: messages.Received, now: float) -> None:
        message = received.message
        if isinstance(message, messages.AggregatorState):
            self._publish_birth()  # a new aggregator, or a new broker, may not have the retained one
            if self._outgoing is not None:
                self._outgoing.restart()
            self._resend(now)
        elif isinstance(message, messages.Manifest):
            self._on_manifest(message, now)
        elif isinstance(message, messages.Model) and topic == self.topics.model:
            self._on_step(message, received.body, now)
        elif topic == self.topics.down(self.identity.device):
            self._on_own(message, received.body, now)

    def _on_own(self, message: messages.Message, body: memoryview, now: float) -> None:
        """A message to us alone."""
        if isinstance(message, messages.Task):
            self._on_task(message, now)
        elif isinstance(message, messages.MaskingStep):
            self._on_masking(message, body, now)
        elif isinstance(message, messages.Chunk):
            self._on_chunk(message, body, now)
        elif isinstance(message, messages.ChunkAck):
            self._on_ack(message, now)
        elif isinstance(message, messages.Verdict):
            self._on_verdict(message, now)

    def _on_manifest(self, manifest: messages.Manifest, now: float) -> None:
        known = self._manifest
        self._manifest = manifest
        if manifest.run != self.state.run:
            self._begin(manifest.run)
        if known is None or _setup(known) != _setup(manifest):
            self._actions.append(Configure(manifest=manifest))
        if manifest.status == "finished":
            self._let_go()
            self._actions.append(Finished())
        self._advance(now)

    def _let_go(self) -> None:
        """The federation is over: nobody waits for what we still owed it."""
        self._task = self._report = self._outgoing = None
        self._stop_fetching()
        if self.state.pending is not None:
            self._settled(accepted=False)

    def _begin(self, run: str) -> None:
        """Another federation than the one we remember: start it with nothing."""
        if self.state.run:
            self._note("joins another federation", run=run, instead_of=self.state.run)
        self._outgoing = self._report = self._part = None
        if self._task is not None and self._task.run != run:
            self._task = None
        self._stop_fetching()
        self.state = ClientState(run=run)
        self._actions.append(Save(state=self.state))

    def _on_task(self, task: messages.Task, now: float) -> None:
        if not (0.0 < task.kappa < math.inf and 0.0 < task.deadline_s < math.inf):
            raise RemoteWireError(f"task has penalty {task.kappa} and deadline {task.deadline_s} s: both are above 0")
        if self._task is None or task.run != self._task.run or task.round >= self._task.round:
            self._task = task
            if self._part is not None and task.masking is not None and task.masking.session == self._part.session:
                self._send(*self._part.keys())  # it is asked again: they may have been lost
        self._advance(now)

    def _on_masking(self, step: messages.MaskingStep, body: memoryview, now: float) -> None:
        if self._part is None or step.session != self._part.session:
            return  # of a sum that was given up, or that we have dropped out of by a restart
        answer = self._part.hear(step, body)
        if answer is not None:
            self._note_reveal(answer)
            self._send(*answer)
        self._advance(now)

    def _note_reveal(self, answer: "Answer") -> None:
        """A reveal makes a sum known. Two over different devices tell their difference, so that we are in no other."""
        pending = self.state.pending
        if answer[0].step == "reveal" and pending is not None and not pending.revealed:
            pending = msgspec.structs.replace(pending, revealed=True)
            self.state = msgspec.structs.replace(self.state, pending=pending)
            self._actions.append(Keep(pending=pending, head=self.state.head))

    def _on_step(self, model: messages.Model, body: memoryview, now: float) -> None:
        """The consensus has made a step, told to everybody at once; who stands elsewhere asks when it has a task."""
        if model.run == self.state.run and model.base and model.base == self.state.base:
            self._take_model(model, body)
            if model.model == self._fetching:
                self._stop_fetching()
            self._advance(now)

    def _on_chunk(self, chunk: messages.Chunk, body: memoryview, now: float) -> None:
        if not self._fetching:
            return
        if chunk.size > MODEL_LIMIT_BYTES:
            raise RemoteWireError(f"consensus of {chunk.size} bytes is over the limit of {MODEL_LIMIT_BYTES}")
        if self._incoming is None or self._incoming.name != chunk.transfer or self._incoming.size != chunk.size:
            self._incoming = chunks.Incoming(chunk.transfer, chunk.size)
        self._incoming.add(chunk.index, body)
        self._progress_at = now
        self._send(messages.ChunkAck(transfer=chunk.transfer, bitmap=self._incoming.bitmap))
        if self._incoming.complete:
            incoming, self._incoming = self._incoming, None
            self._on_model(incoming.blob(), now)

    def _on_model(self, blob: bytes, now: float) -> None:
        """What we have fetched: the consensus that our task names, or a step on the way there."""
        received = messages.decode(blob)
        model = received.message
        if not isinstance(model, messages.Model):
            raise RemoteWireError(f"transfer holds a {type(model).__name__.lower()} message, not a consensus")
        if model.model != self._fetching and (not model.base or model.base != self.state.base):
            return  # the rest of an older transfer, repeated by the broker
        self._take_model(model, received.body)
        self._stop_fetching()
        self._advance(now)

    def _take_model(self, model: messages.Model, body: memoryview) -> None:
        """Hold the consensus that `model` leads to. Raises RemoteWireError where it does not lead to what it says."""
        z = coding.decode(model.codec, body, model.length)
        if model.base:
            if model.base != self.state.base or z.size != self.state.z.size:
                raise RemoteWireError("consensus is coded against a base that we do not hold")
            with np.errstate(over="ignore"):  # an overflow shows in the digest
                z = self.state.z + z
        if vector_digest(z) != model.model:
            self._wants_whole = True  # a step does not lead us there; ask for the value itself
            raise RemoteWireError("decoded consensus has another digest than its message names")
        self._wants_whole = False
        nu = self.state.nu if self.state.nu.size == z.size else np.zeros(z.size, np.int64)
        # Not saved: after a crash we ask for it again, which costs less than writing it in every round.
        self.state = msgspec.structs.replace(self.state, z=z, base=model.model, nu=nu)

    def _on_ack(self, ack: messages.ChunkAck, now: float) -> None:
        if self._outgoing is not None and ack.transfer == self._outgoing.name:
            self._outgoing.acknowledge(ack.bitmap, now)
            self._progress_at = now
            self._send_chunks(now)

    def _on_verdict(self, verdict: messages.Verdict, now: float) -> None:
        if verdict.run != self.state.run:
            return
        pending = self.state.pending
        if verdict.subject == "report" and self._report is not None:
            self._report = self._task = None
        elif verdict.subject == "contribution" and pending is not None and verdict.round == pending.round:
            self._settle(pending, verdict, now)
        self._advance(now)

    def _settle(self, pending: Pending, verdict: messages.Verdict, now: float) -> None:
        """Move the dual if the contribution counts; forget it either way."""
        if self._outgoing is not None:
            self._outgoing.acknowledge(b"\xff" * len(self._outgoing.bitmap), now)  # the verdict says that it is whole
            self._outgoing = None
        if not verdict.accepted:
            self.refusals[verdict.code] += 1
            self.last_refusal = verdict.reason
            self._note("contribution refused", round=pending.round, code=verdict.code, reason=verdict.reason)
            self._settled(accepted=False)
            if self._task is not None and self._task.round == pending.round:
                self._decline(self._task, verdict.reason)  # the same work would be refused again
            return
        self._settled(accepted=True, factor=verdict.factor)

    # Work

    def _advance(self, now: float) -> None:
        """Do the next thing that the newest task asks for."""
        if self._manifest is None or self._manifest.run != self.state.run:
            return
        self._take_part()
        if self.state.pending is not None:
            if self._outgoing is None:
                self._send_pending(now)
            return
        task = self._task
        if task is None or task.run != self.state.run or self._working is not None or self._report is not None:
            return
        if not task.final and (task.round <= self.state.accepted_round or not self._agrees(task)):
            self._task = None
        elif self.state.base != task.model:
            self._fetch(task, now)
        else:
            self._work(task)

    def _take_part(self) -> None:
        """Be in the masked sum of the newest task, if it wants one."""
        task, pending = self._task, self.state.pending
        if task is None or task.run != self.state.run:
            return
        if pending is not None and pending.masked and (task.final or task.round > pending.round):
            self._settled(accepted=task.after >= pending.round)  # the sum is made, and its verdict was lost
            pending = self._outgoing = None
        terms, part = task.masking, self._part
        if terms is None or task.round <= self.state.accepted_round or (part and part.session == terms.session):
            return
        if FEATURE not in self.codecs:
            self._decline(task, "its rounds are masked: pip install 'fedeq-edge[masking]' on this device")
        elif pending is not None and pending.round == task.round and pending.revealed:
            self._decline(task, "its contribution may be in a sum already, and must not be in two")
        else:
            from fedeq_edge.protocol.masked_device import Part  # noqa: PLC0415  # cryptography, where it is needed

            self._part, self._outgoing = Part(self.identity.device, task.round, terms), None
            self._send(*self._part.keys())

    def _agrees(self, task: messages.Task) -> bool:
        """Whether our dual is the one that the task counts with, if need be by starting at zero again.

        A task without a dual that was written before our last contribution was counted is an old one: it does not mean
        that the aggregator has forgotten us.
        """
        if task.duals is None or task.duals == self.state.dual:
            return True
        if task.duals or task.after < self.state.accepted_round:
            after = self.state.accepted_round
            self._send(messages.Differs(run=task.run, round=task.round, expected=task.duals, after=after))
            return False
        self._note("the aggregator counts us as new: the dual starts at zero again", round=task.round)
        self._keep(nu=np.zeros_like(self.state.nu), dual=b"")
        return True

    def _fetch(self, task: messages.Task, now: float) -> None:
        if self._fetching != task.model:
            self._stop_fetching()
            self._fetching = task.model
            self._progress_at = now
            base = b"" if self._wants_whole else self.state.base
            self._send(messages.Fetch(run=task.run, model=task.model, base=base))

    def _stop_fetching(self) -> None:
        """What has come of the blob is kept: it goes on where it was if we ask for the same again."""
        self._fetching = b""

    def _work(self, task: messages.Task) -> None:
        self._working = task
        if task.final:
            self._actions.append(
                Personalise(rounds=task.round - 1, z=self.state.z, head=self.state.head, deadline_s=task.deadline_s)
            )
            return
        local = LocalTask(
            round=task.round - 1,
            z=self.state.z,
            nu=dual_value(self.state.nu, np.float32),
            kappa=task.kappa,
            head=self.state.head,
            seed=self._seed(task.round),
        )
        self._actions.append(Train(task=local, deadline_s=task.deadline_s))

    def _contribution(self, task: messages.Task, result: LocalResult, usage: Usage) -> Pending:
        """The coded contribution. Raises LocalWireError where training left NaN behind."""
        codec = task.codec
        body = coding.encode(codec, result.difference, random.Random(self._seed(task.round)))
        message = messages.Contribution(
            run=task.run,
            round=task.round,
            boot=self.identity.boot,
            base=task.model,
            samples=self.identity.samples,
            codec=codec,
            length=result.difference.size,
            metrics=_metrics(result, usage, self.link.repeated_bytes),
        )
        blob = messages.encode(message, body)
        masked = task.masking is not None
        return Pending(round=task.round, kappa=task.kappa, blob=blob, transfer=chunks.digest(blob), masked=masked)

    def _seed(self, round_number: int) -> int:
        """The same for a repeated round, another for every device, round and federation."""
        name = f"{self.state.run}/{self.identity.device}/{round_number}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")

    # Sending

    def _publish_birth(self) -> None:
        birth = messages.Birth(
            boot=self.identity.boot,
            samples=self.identity.samples,
            profile=self.identity.profile,
            emulated=self.identity.emulated,
            codecs=self.codecs,
            data_age_s=self.identity.data_age_s,
            battery=self._battery,
        )
        topic = self.topics.state(self.identity.device)
        self._actions.append(Publish(topic=topic, payload=messages.encode(birth), retain=True))

    def _resend(self, now: float) -> None:
        """Say again what nobody has answered, on a new connection or after a silence."""
        if self._outgoing is not None:
            self._offer(now)
        if self._fetching and self._task is not None:
            self._stop_fetching()
        if self._report is not None:
            self._send_report(now)
        self._advance(now)

    def _send_pending(self, now: float) -> None:
        pending = self.state.pending
        assert pending is not None
        if not pending.masked:
            self._outgoing = chunks.Outgoing(pending.blob, self.link, pending.transfer)
            self._offer(now)
        elif self._part is not None and self._part.ready and self._part.round == pending.round:
            self._send_masked(self._part, pending, now)

    def _send_masked(self, part: "Part", pending: Pending, now: float) -> None:
        try:
            self._outgoing = chunks.Outgoing(part.mask(pending), self.link)
            self._offer(now)
        except (WireError, ContributionError) as error:
            self._settled(accepted=False)
            if self._task is not None:
                self._decline(self._task, str(error))

    def _offer(self, now: float) -> None:
        """Ask to send the contribution, and from where; one that fits a block needs no asking."""
        assert self._outgoing is not None
        self._progress_at = now
        size = len(self._outgoing.blob)
        if size > chunks.BLOCK_BYTES:
            self._send(messages.Offer(transfer=self._outgoing.name, size=size))
        else:
            self._send_chunks(now)

    def _send_chunks(self, now: float) -> None:
        assert self._outgoing is not None
        size = len(self._outgoing.blob)
        for index, piece in self._outgoing.due(now):
            self._send(messages.Chunk(transfer=self._outgoing.name, index=index, size=size), piece)

    def _send_report(self, now: float) -> None:
        assert self._report is not None
        self._progress_at = now
        self._send(self._report)

    def _decline(self, task: messages.Task, reason: str) -> None:
        self._note("declines a round", round=task.round, reason=reason)
        self._send(messages.Decline(run=task.run, round=task.round, reason=reason[:512]))
        if self._task is task:
            self._task = None

    def _send(self, message: messages.Message, body: bytes = b"") -> None:
        topic = self.topics.up(self.identity.device)
        self._actions.append(Publish(topic=topic, payload=messages.encode(message, body)))

    def _settled(self, *, accepted: bool, factor: int = WHOLE) -> None:
        """The pending contribution is, on the disk by a word; now and then the whole state is written instead."""
        if self._part is not None and self.state.pending is not None and self._part.round == self.state.pending.round:
            self._part = None  # the secrets of a sum that is made, or that we are not in
        self.state = settled(self.state, accepted=accepted, factor=factor)
        self._unfolded += 1
        if self._unfolded >= SETTLED_A_SAVE:
            self._keep()
        else:
            self._actions.append(Settle(accepted=accepted, factor=factor))

    def _keep(self, **changes: object) -> None:
        self._unfolded = 0
        self.state = msgspec.structs.replace(self.state, **changes)
        self._actions.append(Save(state=self.state))

    def _note(self, event: str, **facts: object) -> None:
        self._actions.append(Note(event=event, facts=facts))

    def _flush(self) -> list[ClientAction]:
        actions, self._actions = self._actions, []
        return actions


def _setup(manifest: messages.Manifest) -> tuple[object, ...]:
    """What a trainer is set up with: when it changes, the trainer starts anew."""
    return manifest.run, manifest.model, manifest.plan, manifest.method, manifest.seed


def _metrics(result: LocalResult, usage: Usage, repeated_bytes: int) -> messages.Metrics:
    return messages.Metrics(
        loss=result.loss,
        residual=result.residual,
        backward_residual=result.backward_residual,
        forward=result.budget.forward,
        adjoint=result.budget.adjoint,
        seconds=result.seconds,
        accuracy=result.accuracy_consensus,
        reduced=result.reduced,
        wire_up=usage.wire_up,
        wire_down=usage.wire_down,
        repeated_bytes=repeated_bytes,
        battery=usage.battery,
    )


def _report(task: messages.Task, personal: Personal, usage: Usage) -> messages.Report:
    return messages.Report(
        run=task.run,
        round=task.round,
        forward=personal.budget.forward,
        adjoint=personal.budget.adjoint,
        residual=personal.residual,
        certificate=personal.certificate,
        accuracy_personal=personal.accuracy_personal,
        accuracy_consensus=personal.accuracy_consensus,
        local_only=personal.local_only,
        rss_idle_bytes=usage.rss_idle,
        rss_peak_bytes=usage.rss_peak,
        wire_up=usage.wire_up,
        wire_down=usage.wire_down,
    )

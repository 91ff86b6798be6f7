"""The aggregator's side of the protocol.

    waiting ── enough devices ──> running ── last round closed ──> finishing ── reports in ──> finished
                                    │  ^
                                    └──┘ a round: Snapshot, tasks out, contributions in, close

Theory of operation
-------------------
Rule 1: a contribution is folded into the consensus once, by (device, round), and `Store`d before its verdict is sent;
a repeated one gets the same verdict again.
Rule 2: `Snapshot` is taken when a round opens, after joins and before tasks. Snapshot plus the contributions stored
since, in order of storing, is the whole state: `replay` brings a killed aggregator back to where it was.
Rule 3: what a device says is checked before it is used; a refusal has a code, is counted, named and answered, and the
round goes on. The device is the one in the topic.
Rule 4: a device's dual is known here by digest. A device that comes back with another one has lost its state and joins
anew with nu = 0 (algorithm.md section 4); its next task tells it so.
"""

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from fedeq_edge.consensus import quality
from fedeq_edge.consensus.admm import Consensus, DualStore, RoundReport
from fedeq_edge.consensus.methods import Method
from fedeq_edge.errors import ContributionError, RemoteWireError, WireError
from fedeq_edge.protocol.actions import AggregatorAction, Finished, Note, Publish, Record, Snapshot, Store
from fedeq_edge.protocol.schedule import Progress, Schedule
from fedeq_edge.protocol.state import AggregatorState, MemberState, vector_digest
from fedeq_edge.training.step import Vector
from fedeq_edge.wire import chunks, coding, messages
from fedeq_edge.wire.frame import FRAME_BYTES, HEADER_LIMIT_BYTES
from fedeq_edge.wire.topics import Topics

Subject = Literal["contribution", "report"]
RETRY_S: Final = 10.0  # a transfer without an acknowledgement for so long is begun again


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """What is fixed for the life of a federation. model, plan and seed travel in the manifest as they are."""

    topics: Topics
    model: Mapping[str, object]
    plan: Mapping[str, object]
    seed: int
    rounds: int
    method: Method
    schedule: Schedule
    codec: coding.Codec


@dataclass(slots=True)
class _Download:
    outgoing: chunks.Outgoing
    progress_at: float


@dataclass(slots=True)
class _Round:
    """The open round."""

    cohort: list[str]
    deadline_at: float
    opened_at: float
    contributed: list[str] = field(default_factory=list)
    declined: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, messages.Metrics] = field(default_factory=dict)
    extensions: int = 0


@dataclass(slots=True)
class Aggregator:
    """The machine. Every method takes the time in seconds of a monotonic clock and returns actions in order."""

    federation: Federation
    consensus: Consensus
    duals: DualStore
    boot: str
    state: AggregatorState
    refusals: Counter[str] = field(default_factory=Counter)
    reports: dict[str, messages.Report] = field(default_factory=dict)
    _online: dict[str, messages.Birth] = field(default_factory=dict)
    _open: _Round | None = None
    _final_at: float | None = None
    _base: bytes = b""  # digest of the consensus in force
    _model_blob: bytes = b""  # that consensus as a whole, made when first asked for
    _step_blob: bytes = b""  # the consensus as a difference to the one before it
    _step_base: bytes = b""
    _uploads: dict[str, chunks.Incoming] = field(default_factory=dict)
    _downloads: dict[str, _Download] = field(default_factory=dict)
    _actions: list[AggregatorAction] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._base = vector_digest(self.consensus.z_hat)

    # Coming back after a crash

    def replay(self, device: str, blob: bytes) -> None:
        """Fold in a contribution that was stored after the snapshot; without actions."""
        self._take(device, blob)
        self._actions.clear()

    def resume(self, now: float) -> list[AggregatorAction]:
        """Go on with the round that was open when the snapshot was taken. Call before the first `replay`."""
        if self.state.status == "running" and self.state.cohort:
            deadline = now + self.federation.schedule.deadline_s
            self._open = _Round(cohort=list(self.state.cohort), deadline_at=deadline, opened_at=now)
            self._note("resumes a round", round=self.state.round, cohort=len(self.state.cohort))
        return self._flush()

    # Events

    def connected(self, now: float) -> list[AggregatorAction]:
        """Say who we are and what we train; the retained births of the devices come in by themselves."""
        birth = messages.encode(messages.AggregatorState(boot=self.boot))
        self._actions.append(Publish(topic=self.federation.topics.aggregator, payload=birth, retain=True))
        self._publish_manifest()
        self._downloads.clear()
        for device in self._online:
            self._send_task(device)
        self._check(now)
        return self._flush()

    def arrived(self, topic: str, payload: bytes, now: float) -> list[AggregatorAction]:
        """A payload came; what does not follow the protocol is counted, noted and dropped."""
        source = self.federation.topics.device_of(topic)
        if source is None:
            return []
        device, branch = source
        try:
            self._dispatch(device, branch, messages.decode(payload), now)
        except WireError as error:
            self._uploads.pop(device, None)
            self._refuse("malformed", device, str(error))
        self._check(now)
        return self._flush()

    def tick(self, now: float) -> list[AggregatorAction]:
        """Close what is due, say again what was not acknowledged."""
        for device, download in self._downloads.items():
            if now - download.progress_at >= RETRY_S:
                download.outgoing.restart()
                download.progress_at = now
                self._send_chunks(device, download.outgoing)
        self._check(now)
        return self._flush()

    def retire(self, device: str, now: float) -> list[AggregatorAction]:
        """The operator says that this device never comes back: its share leaves the sums."""
        self.consensus.retire(device)
        self.state.members.pop(device, None)
        self._online.pop(device, None)
        if self._open is not None and device in self._open.cohort:
            self._open.cohort.remove(device)
        self._note("retired", device=device)
        self._check(now)
        return self._flush()

    def offline(self) -> bytes:
        """Payload of our farewell and last will."""
        return messages.encode(messages.Offline(boot=self.boot))

    # What an operator sees

    def status(self) -> dict[str, Any]:
        """Where the federation stands, for status.json."""
        opened = self._open
        return {
            "run": self.state.run,
            "status": self.state.status,
            "round": self.state.round,
            "rounds": self.federation.rounds,
            "online": sorted(self._online),
            "members": len(self.consensus.members),
            "cohort": list(opened.cohort) if opened else [],
            "contributed": list(opened.contributed) if opened else [],
            "declined": dict(opened.declined) if opened else {},
            "extensions": opened.extensions if opened else 0,
            "refusals": dict(self.refusals),
            "reported": sorted(self.reports),
        }

    # Messages

    def _dispatch(self, device: str, branch: str, received: messages.Received, now: float) -> None:
        message = received.message
        if branch == "state":
            self._on_state(device, message)
        elif isinstance(message, messages.Fetch):
            self._on_fetch(device, message, now)
        elif isinstance(message, messages.Chunk):
            self._on_chunk(device, message, received.body)
        elif isinstance(message, messages.ChunkAck):
            self._on_ack(device, message, now)
        elif isinstance(message, messages.Report):
            self._on_report(device, message)
        elif isinstance(message, messages.Decline):
            self._on_decline(device, message)

    def _on_state(self, device: str, message: messages.Message) -> None:
        if isinstance(message, messages.Offline):
            known = self._online.get(device)
            if known is not None and known.boot == message.boot:
                del self._online[device]
                self._downloads.pop(device, None)
                self._note("device left", device=device)
        elif isinstance(message, messages.Birth):
            self._on_birth(device, message)

    def _on_birth(self, device: str, birth: messages.Birth) -> None:
        if self.federation.codec not in birth.codecs:
            self._refuse("codec", device, f"it does not speak {self.federation.codec}; update its agent")
            return
        if device not in self._online:
            self._note("device is here", device=device, samples=birth.samples, profile=birth.profile)
        self._online[device] = birth
        if device in self.consensus.members and not self._same_duals(device, birth):
            self._note("device lost its state and joins anew", device=device)
            self._join(device, birth)
        self._send_task(device)

    def _same_duals(self, device: str, birth: messages.Birth) -> bool:
        """Whether the device holds the dual that we hold, or the one before a verdict that it has not heard."""
        member = self.state.members[device]
        if birth.run != self.state.run:
            return not member.duals
        expected = member.duals_before if birth.pending_round == member.accepted_round >= 0 else member.duals
        return birth.duals == expected

    def _on_fetch(self, device: str, fetch: messages.Fetch, now: float) -> None:
        if fetch.run != self.state.run or fetch.model != self._base:
            return  # it answers an older task; the newer one is on its way
        blob = self._step_blob if self._step_blob and fetch.base == self._step_base else self._whole()
        self._downloads[device] = _Download(chunks.Outgoing(blob), now)
        self._send_chunks(device, self._downloads[device].outgoing)

    def _on_ack(self, device: str, ack: messages.ChunkAck, now: float) -> None:
        download = self._downloads.get(device)
        if download is None or ack.transfer != download.outgoing.name:
            return
        download.outgoing.acknowledge(ack.bitmap)
        download.progress_at = now
        self._send_chunks(device, download.outgoing)
        if download.outgoing.done:
            del self._downloads[device]

    def _on_chunk(self, device: str, chunk: messages.Chunk, body: memoryview) -> None:
        if chunk.size > self._upload_limit():
            raise RemoteWireError(f"upload of {chunk.size} bytes, a contribution has at most {self._upload_limit()}")
        upload = self._uploads.get(device)
        if upload is None or upload.name != chunk.transfer or upload.size != chunk.size:
            upload = self._uploads[device] = chunks.Incoming(chunk.transfer, chunk.size)
        upload.add(chunk.index, bytes(body))
        self._send(device, messages.ChunkAck(transfer=chunk.transfer, bitmap=upload.bitmap))
        if upload.complete:
            del self._uploads[device]
            self._take(device, upload.blob())

    def _upload_limit(self) -> int:
        length = self.consensus.z_hat.size
        return FRAME_BYTES + HEADER_LIMIT_BYTES + coding.coded_bytes(self.federation.codec, length)

    def _on_report(self, device: str, report: messages.Report) -> None:
        if report.run != self.state.run:
            return
        self.reports[device] = report
        line = {"kind": "report", "device": device, **msgspec.to_builtins(report)}
        self._actions.append(Record(line=line))
        self._send_verdict(device, "report", report.round)

    def _on_decline(self, device: str, decline: messages.Decline) -> None:
        self._note("device declines", device=device, round=decline.round, reason=decline.reason)
        current = decline.run == self.state.run and decline.round == self.state.round
        if current and self._open is not None and device in self._open.cohort:
            self._open.declined[device] = decline.reason

    # Contributions

    def _take(self, device: str, blob: bytes) -> None:
        received = messages.decode(blob)
        if not isinstance(received.message, messages.Contribution):
            raise RemoteWireError("upload holds another message than a contribution")
        message = received.message
        try:
            if not self._repeated(device, message):
                self._fold_in(device, message, received.body, blob)
        except ContributionError as error:
            self._refuse(error.code, device, str(error))
            self._send_verdict(device, "contribution", message.round, error)
        else:
            self._send_verdict(device, "contribution", message.round)

    def _repeated(self, device: str, message: messages.Contribution) -> bool:
        member = self.state.members.get(device)
        return member is not None and message.run == self.state.run and message.round <= member.accepted_round

    def _fold_in(self, device: str, message: messages.Contribution, body: memoryview, blob: bytes) -> None:
        kappa = self._check_claims(device, message)
        try:
            difference = coding.decode(message.codec, body, message.length)
        except RemoteWireError as error:
            raise ContributionError("size_or_nan", f"device {device}: {error}") from error
        self.consensus.accept(device, difference, kappa)
        member = self.state.members[device]
        member.accepted_round, member.duals_before = message.round, member.duals
        member.duals = vector_digest(self.duals.get(device)) if self._keeps_duals() else b""
        self._actions.append(Store(device=device, round=message.round, blob=blob))
        if self._open is not None:
            self._open.contributed.append(device)
            self._open.metrics[device] = message.metrics

    def _check_claims(self, device: str, message: messages.Contribution) -> float:
        """kappa of the task that this contribution answers. Raises ContributionError naming what is wrong."""
        where = f"device {device}: contribution for round {message.round}"
        if self.state.status != "running" or message.run != self.state.run:
            raise ContributionError(
                "run", f"{where} of run {message.run!r}; run {self.state.run!r} does not take it now"
            )
        if message.round not in self.state.bases:
            oldest = min(self.state.bases, default=self.state.round)
            raise ContributionError("round", f"{where}; rounds {oldest} to {self.state.round} are taken now")
        kappa = self.state.issued.get(message.round, {}).get(device)
        if kappa is None:
            raise ContributionError("not_asked", f"{where}, which did not ask it")
        if message.base != self.state.bases[message.round]:
            raise ContributionError("digest", f"{where} starts from another consensus than that round's")
        if message.length != self.consensus.z_hat.size or message.codec != self.federation.codec:
            expected = f"{self.consensus.z_hat.size} values as {self.federation.codec}"
            raise ContributionError(
                "wrong_shape",
                f"{where} has {message.length} values as {message.codec}, expected {expected}; "
                "was it started with another model file?",
            )
        return kappa

    def _refuse(self, code: str, device: str, reason: str) -> None:
        self.refusals[code] += 1
        self._note("refused", device=device, code=code, reason=reason)

    # Rounds

    def _check(self, now: float) -> None:
        """Open, close and finish what is due."""
        if self.state.status == "finishing":
            self._check_reports(now)
        elif self.state.status == "finished":
            return
        elif self._open is None:
            self._open_if_possible(now)
        else:
            self._close_if_due(self._open, now)

    def _open_if_possible(self, now: float) -> None:
        waits_for = self.federation.schedule.min_devices if self.state.status == "waiting" else 1
        if len(self._online) >= waits_for:
            self._open_round(now)

    def _open_round(self, now: float) -> None:
        state = self.state
        for device, birth in self._online.items():
            if device not in self.consensus.members:
                self._join(device, birth)
        cohort = self.federation.schedule.cohort(sorted(self._online), state.round + 1)
        state.status, state.round, state.cohort = "running", state.round + 1, cohort
        self.consensus.open_round(cohort)
        state.bases[state.round] = self._base
        state.issued[state.round] = {device: self.consensus.penalty(device) for device in cohort}
        self._forget_old_rounds()
        self._open = _Round(cohort=list(cohort), opened_at=now, deadline_at=now + self.federation.schedule.deadline_s)
        self._snapshot()
        self._publish_manifest()
        for device in cohort:
            self._send_task(device)

    def _forget_old_rounds(self) -> None:
        oldest = self.state.round - self.federation.schedule.late_rounds
        for table in (self.state.bases, self.state.issued):
            for number in [number for number in table if number < oldest]:
                del table[number]

    def _close_if_due(self, opened: _Round, now: float) -> None:
        progress = Progress(
            cohort=opened.cohort,
            contributed=opened.contributed,
            declined=opened.declined,
            deadline_passed=now >= opened.deadline_at,
        )
        if progress.closes(self.federation.schedule.quorum):
            self._close_round(opened, now)
        elif progress.deadline_passed:
            self._extend(opened, now)

    def _extend(self, opened: _Round, now: float) -> None:
        """Too few have contributed: wait for another deadline and ask those who have come online meanwhile."""
        opened.extensions += 1
        opened.deadline_at = now + self.federation.schedule.deadline_s
        opened.declined.clear()
        newcomers = [device for device in self._online if device not in opened.cohort]
        for device in newcomers:
            if device not in self.consensus.members:
                self._join(device, self._online[device])
            opened.cohort.append(device)
            self.state.issued[self.state.round][device] = self.consensus.penalty(device)
        self.state.cohort = tuple(opened.cohort)
        self._snapshot()
        self._note("round lacks its quorum and goes on", round=self.state.round, contributed=len(opened.contributed))
        for device in opened.cohort:
            self._send_task(device)

    def _close_round(self, opened: _Round, now: float) -> None:
        report = self.consensus.close_round(self._transmit)
        self._move_quality(opened)
        self._record_round(opened, report, now)
        self._open = None
        self._base, self._model_blob = vector_digest(self.consensus.z_hat), b""
        if self.state.round >= self.federation.rounds:
            self._finish(now)
        else:
            self._open_if_possible(now)

    def _transmit(self, difference: Vector) -> Vector:
        """Code the step of z_hat; what comes out is what every client decodes (algorithm.md, coding)."""
        rng = random.Random(f"{self.state.run}/{self.state.round}")
        body = coding.encode(self.federation.codec, difference, rng)
        decoded = coding.decode(self.federation.codec, body, difference.size)
        before = self.consensus.z_hat
        self._step_base = vector_digest(before)
        self._step_blob = self._model(before + decoded, body, self.federation.codec, self._step_base)
        return decoded

    def _model(self, z_hat: Vector, body: bytes, codec: coding.Codec, base: bytes) -> bytes:
        message = messages.Model(
            run=self.state.run,
            round=self.state.round,
            model=vector_digest(z_hat),
            base=base,
            codec=codec,
            length=z_hat.size,
        )
        return messages.encode(message, body)

    def _whole(self) -> bytes:
        """The consensus as float32, for devices that do not hold the one before it."""
        if not self._model_blob:
            z_hat = self.consensus.z_hat
            self._model_blob = self._model(z_hat, coding.encode("f32", z_hat), "f32", b"")
        return self._model_blob

    def _move_quality(self, opened: _Round) -> None:
        method = self.federation.method
        if not method.quality_moves(self.state.round, self.federation.rounds):
            return
        scores = {
            device: quality.score(
                method.quality,
                residual=metrics.residual,
                backward_residual=metrics.backward_residual,
                forward=metrics.forward,
                r0=method.r0,
            )
            for device, metrics in opened.metrics.items()
            if device in self.consensus.members
        }
        self.consensus.set_quality(scores)

    def _record_round(self, opened: _Round, report: RoundReport, now: float) -> None:
        line: dict[str, object] = {
            "kind": "round",
            "round": self.state.round,
            "cohort": len(opened.cohort),
            "contributed": sorted(opened.contributed),
            "late": sorted(report.late),
            "declined": opened.declined,
            "extensions": opened.extensions,
            "seconds": now - opened.opened_at,
            "primal_residual": report.primal_residual,
            "dual_residual": report.dual_residual,
            "step": report.step,
            "correction": report.correction,
            "devices": {device: msgspec.to_builtins(metrics) for device, metrics in opened.metrics.items()},
        }
        self._actions.append(Record(line=line))

    # The end

    def _finish(self, now: float) -> None:
        self.state.status, self.state.cohort = "finishing", ()
        self._final_at = now + self.federation.schedule.final_s
        self._snapshot()
        self._publish_manifest()
        for device in self._online:
            self._send_task(device)

    def _check_reports(self, now: float) -> None:
        if self._final_at is None:  # we came back after a crash
            self._final_at = now + self.federation.schedule.final_s
        expected = [device for device in self._online if device in self.consensus.members]
        all_in = bool(expected) and all(device in self.reports for device in expected)
        if all_in or now >= self._final_at:
            self.state.status = "finished"
            self._snapshot()
            self._publish_manifest()
            self._actions.append(Finished())

    # Sending

    def _send_task(self, device: str) -> None:
        """What this device is to do now, if anything."""
        final = self.state.status == "finishing"
        if final and (device in self.reports or device not in self.consensus.members):
            return
        asked = self._open is not None and device in self._open.cohort and device not in self._open.contributed
        if not (final or asked):
            return
        issued = self.state.issued.get(self.state.round, {})
        task = messages.Task(
            run=self.state.run,
            round=self.state.round + (1 if final else 0),
            model=self._base,
            kappa=issued.get(device, self.federation.method.rho),
            deadline_s=self.federation.schedule.final_s if final else self.federation.schedule.deadline_s,
            duals=self.state.members[device].duals,
            final=final,
        )
        self._send(device, task)

    def _send_verdict(
        self, device: str, subject: Subject, round_number: int, refusal: ContributionError | None = None
    ) -> None:
        verdict = messages.Verdict(
            run=self.state.run,
            subject=subject,
            round=round_number,
            accepted=refusal is None,
            code="" if refusal is None else refusal.code,
            reason="" if refusal is None else str(refusal)[:512],
        )
        self._send(device, verdict)

    def _send_chunks(self, device: str, outgoing: chunks.Outgoing) -> None:
        for index, piece in outgoing.due():
            self._send(device, messages.Chunk(transfer=outgoing.name, index=index, size=len(outgoing.blob)), piece)

    def _send(self, device: str, message: messages.Message, body: bytes = b"") -> None:
        topic = self.federation.topics.down(device)
        self._actions.append(Publish(topic=topic, payload=messages.encode(message, body)))

    def _publish_manifest(self) -> None:
        manifest = messages.Manifest(
            run=self.state.run,
            status=self.state.status,
            round=self.state.round,
            model=dict(self.federation.model),
            plan=dict(self.federation.plan),
            method=msgspec.to_builtins(self.federation.method),
            seed=self.federation.seed,
            codec=self.federation.codec,
        )
        topic = self.federation.topics.manifest
        self._actions.append(Publish(topic=topic, payload=messages.encode(manifest), retain=True))

    # Bookkeeping

    def _join(self, device: str, birth: messages.Birth) -> None:
        self.consensus.join(device, birth.samples)
        self.state.members[device] = MemberState()

    def _keeps_duals(self) -> bool:
        return self.federation.method.server == "fresh"

    def _snapshot(self) -> None:
        copied = msgspec.convert(msgspec.to_builtins(self.state, builtin_types=(bytes,)), AggregatorState)
        self._actions.append(Snapshot(state=copied, consensus=self.consensus.snapshot()))

    def _note(self, event: str, **facts: object) -> None:
        self._actions.append(Note(event=event, facts=facts))

    def _flush(self) -> list[AggregatorAction]:
        actions, self._actions = self._actions, []
        return actions


def new_state(run: str) -> AggregatorState:
    """A federation before its first round."""
    return AggregatorState(run=run, status="waiting", round=0, cohort=(), members={}, issued={}, bases={})

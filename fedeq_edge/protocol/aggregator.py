"""The aggregator's side of the protocol.

    waiting ── enough devices ──> running ── last round closed ──> finishing ── reports in ──> finished
                                    │  ^
                                    └──┘ a round: Snapshot, tasks out, contributions in, close

Theory of operation
-------------------
Rule 1: a contribution is folded into the consensus once, by (device, round), and `Store`d before its verdict is sent;
a repeated one gets the same verdict again.
Rule 2: `Snapshot` is taken whenever anything but a contribution has changed the sums or the cohort: when a round opens
(after joins, before tasks), is extended, or a member joins anew, retires or changes its weight. Snapshot plus the
contributions stored since, in order of storing, is the whole state: `replay` brings a killed aggregator back to where
it was.
Rule 3: what a device says is checked before it is used; a refusal has a code, is counted, named and answered, and the
round goes on. The device is the one in the topic.
Rule 4: a task names the dual that counts here. A device that holds another one says so before it trains, has lost its
state, and joins anew with nu = 0 (algorithm.md section 4); its next task tells it so.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec
import numpy as np

from fedeq_edge.consensus import quality
from fedeq_edge.consensus.admm import Consensus, DualStore, RoundReport
from fedeq_edge.consensus.methods import Method
from fedeq_edge.errors import ContributionError, RemoteWireError, StateError, WireError
from fedeq_edge.protocol.actions import AggregatorAction, Finished, Note, Publish, Record, Snapshot, Store
from fedeq_edge.protocol.schedule import Progress, Schedule
from fedeq_edge.protocol.state import AggregatorState, MemberState, dual_digest
from fedeq_edge.protocol.transfers import RETRY_S, Downloads, Pieces, Publication, Uploads
from fedeq_edge.training.step import Vector
from fedeq_edge.wire import coding, messages
from fedeq_edge.wire.frame import FRAME_BYTES, HEADER_LIMIT_BYTES
from fedeq_edge.wire.topics import Topics

Subject = Literal["contribution", "report"]
GATHER_S: Final = 5.0  # after a connection births come in within a second, one after the other
LARGEST_STEP: Final = 1e6  # of one parameter: a training that diverged, and its sums would not fit float32
LARGEST_RESIDUAL: Final = 1e6  # relative, 1 is already no solve at all: its square must stay a number


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
class _Round:
    """The open round, beside what `AggregatorState` keeps of it."""

    cohort: list[str]
    deadline_at: float
    opened_at: float
    declined: dict[str, str] = field(default_factory=dict)
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
    _published: Publication = field(init=False)
    _uploads: Uploads = field(init=False)
    _downloads: Downloads = field(default_factory=Downloads)
    _unable: set[str] = field(default_factory=set)  # devices that could not make their personal model
    _connected_at: float = 0.0
    _asked: dict[str, float] = field(default_factory=dict)  # when a task went out that no device has reacted to
    _actions: list[AggregatorAction] = field(default_factory=list)

    def __post_init__(self) -> None:
        z_hat = self.consensus.z_hat
        self._published = Publication(self.state.run, z_hat, self.state.round)
        largest = coding.coded_bytes(self.federation.codec, z_hat.size)
        self._uploads = Uploads(FRAME_BYTES + HEADER_LIMIT_BYTES + largest)

    # Coming back after a crash

    def replay(self, device: str, blob: bytes) -> None:
        """Fold in a contribution that was stored after the snapshot; without actions.

        One that the snapshot holds already is left out. Raises StateError where the two do not fit.
        """
        refused = self.refusals.total()
        try:
            self._take(device, blob)
        except RemoteWireError as error:
            raise StateError(f"journal: stored contribution of device {device} is damaged ({error})") from error
        if self.refusals.total() != refused:
            raise StateError(f"journal: stored contribution of device {device} does not fit the snapshot beside it")
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
        self._connected_at = now
        birth = messages.encode(messages.AggregatorState(boot=self.boot))
        self._actions.append(Publish(topic=self.federation.topics.aggregator, payload=birth, retain=True))
        self._publish_manifest()
        self._downloads.clear()
        for device in self._online:
            self._send_task(device, now)
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
            self._refuse("malformed", device, str(error))
        self._check(now)
        return self._flush()

    def tick(self, now: float) -> list[AggregatorAction]:
        """Close what is due, say again what was not acknowledged."""
        for device, pieces in self._downloads.stalled(now):
            self._send_pieces(device, pieces)
        for device in [device for device, asked_at in self._asked.items() if now - asked_at >= RETRY_S]:
            self._send_task(device, now)
        self._uploads.forget_idle(now)
        self._check(now)
        return self._flush()

    def retire(self, device: str, now: float) -> list[AggregatorAction]:
        """The operator says that this device never comes back: its share leaves the sums."""
        self.consensus.retire(device)
        del self.state.members[device]
        self._leave(device)
        self._forget_tasks(device)
        if self._open is not None and device in self._open.cohort:
            self._open.cohort.remove(device)
            self.state.cohort = tuple(self._open.cohort)
        self._snapshot()
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
            "contributed": list(self.state.contributed) if opened else [],
            "declined": dict(opened.declined) if opened else {},
            "extensions": opened.extensions if opened else 0,
            "refusals": dict(self.refusals),
            "reported": sorted(self.reports),
        }

    # Messages

    def _dispatch(self, device: str, branch: str, received: messages.Received, now: float) -> None:
        message = received.message
        if branch == "state":
            self._on_state(device, message, now)
        elif isinstance(message, messages.Fetch):
            self._on_fetch(device, message, now)
        elif isinstance(message, messages.Chunk):
            self._on_chunk(device, message, received.body, now)
        elif isinstance(message, messages.ChunkAck):
            self._on_ack(device, message, now)
        elif isinstance(message, messages.Report):
            self._on_report(device, message)
        elif isinstance(message, messages.Decline):
            self._on_decline(device, message)
        elif isinstance(message, messages.Differs):
            self._on_differs(device, message, now)
        else:
            raise RemoteWireError(f"a device does not send a {type(message).__name__.lower()} message")

    def _on_state(self, device: str, message: messages.Message, now: float) -> None:
        if isinstance(message, messages.Offline):
            known = self._online.get(device)
            if known is not None and known.boot == message.boot:
                self._leave(device)
                self._note("device left", device=device)
        elif isinstance(message, messages.Birth):
            self._on_birth(device, message, now)
        else:
            raise RemoteWireError(f"a {type(message).__name__.lower()} message says nothing of a device's state")

    def _leave(self, device: str) -> None:
        self._online.pop(device, None)
        self._asked.pop(device, None)
        self._downloads.forget(device)
        self._uploads.forget(device)

    def _on_birth(self, device: str, birth: messages.Birth, now: float) -> None:
        limit = self.federation.schedule.samples_limit
        if self.federation.codec not in birth.codecs:
            self._leave(device)
            self._refuse("codec", device, f"it does not speak {self.federation.codec}; update its agent")
            return
        if birth.samples > limit:
            self._leave(device)
            self._refuse(
                "samples", device, f"it claims {birth.samples} samples; raise schedule.samples_limit ({limit})"
            )
            return
        if device not in self._online:
            self._note("device is here", device=device, samples=birth.samples, profile=birth.profile)
        self._online[device] = birth
        member = self.consensus.members.get(device)
        if member is not None and member.samples != birth.samples:
            self.consensus.set_samples(device, birth.samples)
            self._snapshot()
        self._send_task(device, now)

    def _on_differs(self, device: str, differs: messages.Differs, now: float) -> None:
        """A device holds another dual than its task named: it joins anew, unless the task was an old one."""
        member, birth = self.state.members.get(device), self._online.get(device)
        if differs.run != self.state.run or member is None or birth is None:
            return
        if differs.after > self.state.round:
            self._asked.pop(device, None)
            self._refuse(
                "rollback",
                device,
                f"it has contributed to round {differs.after}, this aggregator has come to {self.state.round}; "
                "was an old backup restored? begin anew in another state folder",
            )
            return
        if differs.expected == member.duals:
            self._note("device lost its state and joins anew", device=device)
            self._join(device, birth, counted_until=max(member.accepted_round, differs.after))
            self._snapshot()
        self._send_task(device, now)

    def _on_fetch(self, device: str, fetch: messages.Fetch, now: float) -> None:
        if fetch.run != self.state.run or fetch.model != self._published.base:
            return  # it answers an older task; the newer one is on its way
        self._asked.pop(device, None)
        blob = self._published.blob_for(fetch.base)
        self._send_pieces(device, self._downloads.begin(device, blob, now))

    def _on_ack(self, device: str, ack: messages.ChunkAck, now: float) -> None:
        self._send_pieces(device, self._downloads.acknowledged(device, ack, now))

    def _on_chunk(self, device: str, chunk: messages.Chunk, body: memoryview, now: float) -> None:
        bitmap, incoming = self._uploads.add(device, chunk, body, now)
        self._send(device, messages.ChunkAck(transfer=chunk.transfer, bitmap=bitmap))
        if incoming.complete:
            self._take(device, incoming.blob())

    def _on_report(self, device: str, report: messages.Report) -> None:
        if report.run != self.state.run or self.state.status not in ("finishing", "finished"):
            return
        self._asked.pop(device, None)
        if device not in self.reports:
            self.reports[device] = report
            line = {"kind": "report", "device": device, **msgspec.to_builtins(report)}
            self._actions.append(Record(line=line))
        self._send_verdict(device, "report", report.round)

    def _on_decline(self, device: str, decline: messages.Decline) -> None:
        self._note("device declines", device=device, round=decline.round, reason=decline.reason)
        current = decline.run == self.state.run and decline.round == self.state.round
        if self.state.status == "finishing" and decline.run == self.state.run:
            self._asked.pop(device, None)
            self._unable.add(device)
        elif current and self._open is not None and device in self._open.cohort:
            self._asked.pop(device, None)
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
        _check_step(device, difference)
        self.consensus.accept(device, difference, kappa)
        member = self.state.members[device]
        member.accepted_round = message.round
        if self._keeps_duals():
            member.duals = dual_digest(self.duals.get(device))
        self._asked.pop(device, None)
        self._actions.append(Store(device=device, round=message.round, blob=blob))
        current = self._open is not None and message.round == self.state.round
        (self.state.contributed if current else self.state.late)[device] = message.metrics

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
        if not self._enough_are_here(now):
            return
        self._join_newcomers()
        if self.state.round >= self.federation.rounds:  # a method without exchange has no rounds
            self._finish(now)
        else:
            self._open_round(now)

    def _enough_are_here(self, now: float) -> bool:
        """Whether a round may open; one that follows a restart is not for the first device alone that is heard."""
        if self.state.status == "waiting":
            return len(self._online) >= self.federation.schedule.min_devices
        complete = self._online.keys() >= self.consensus.members.keys()
        return bool(self._online) and (complete or now - self._connected_at >= GATHER_S)

    def _join_newcomers(self) -> None:
        for device, birth in self._online.items():
            if device not in self.consensus.members:
                self._join(device, birth, counted_until=-1)

    def _open_round(self, now: float) -> None:
        state = self.state
        cohort = self.federation.schedule.cohort(sorted(self._online), state.round + 1)
        state.status, state.round, state.cohort = "running", state.round + 1, cohort
        self.consensus.open_round(cohort)
        state.bases[state.round] = self._published.base
        state.issued[state.round] = {device: self.consensus.penalty(device) for device in cohort}
        self._forget_old_rounds()
        self._open = _Round(cohort=list(cohort), opened_at=now, deadline_at=now + self.federation.schedule.deadline_s)
        self._snapshot()
        self._publish_manifest()
        for device in cohort:
            self._send_task(device, now)

    def _forget_old_rounds(self) -> None:
        oldest = self.state.round - self.federation.schedule.late_rounds
        for table in (self.state.bases, self.state.issued):
            for number in [number for number in table if number < oldest]:
                del table[number]

    def _close_if_due(self, opened: _Round, now: float) -> None:
        progress = Progress(
            cohort=opened.cohort,
            contributed=self.state.contributed,
            declined=opened.declined,
            deadline_passed=now >= opened.deadline_at,
        )
        if progress.closes(self.federation.schedule.quorum):
            self._close_round(opened, now)
        elif progress.deadline_passed:
            self._extend(opened, now)

    def _extend(self, opened: _Round, now: float) -> None:
        """Too few have contributed: wait for another deadline and ask everybody who is online."""
        opened.extensions += 1
        opened.deadline_at = now + self.federation.schedule.deadline_s
        opened.declined.clear()
        self._join_newcomers()
        for device in [device for device in self._online if device not in opened.cohort]:
            opened.cohort.append(device)
            self.state.issued[self.state.round][device] = self.consensus.penalty(device)
        self.state.cohort = tuple(opened.cohort)
        self._snapshot()
        self._note(
            "round lacks its quorum and goes on", round=self.state.round, contributed=len(self.state.contributed)
        )
        self._publish_manifest()  # a device that has missed it cannot work
        for device in self._online:
            self._send_task(device, now)

    def _close_round(self, opened: _Round, now: float) -> None:
        report = self.consensus.close_round(self._transmit)
        self._move_quality()
        self._record_round(opened, report, now)
        self._open, self.state.cohort = None, ()
        self.state.contributed, self.state.late = {}, {}
        if self.state.round >= self.federation.rounds:
            self._finish(now)
        else:
            self._open_if_possible(now)

    def _transmit(self, difference: Vector) -> Vector:
        return self._published.advance(difference, self.federation.codec, self.state.round)

    def _arrived(self) -> dict[str, messages.Metrics]:
        """What each device said last with a contribution since the last close."""
        return {**self.state.late, **self.state.contributed}

    def _move_quality(self) -> None:
        method = self.federation.method
        if not method.quality_moves(self.state.round, self.federation.rounds):
            return
        scores = {
            device: quality.score(
                method.quality,
                residual=_bounded(metrics.residual),
                backward_residual=_bounded(metrics.backward_residual),
                forward=metrics.forward,
                r0=method.r0,
            )
            for device, metrics in self._arrived().items()
            if device in self.consensus.members
        }
        self.consensus.set_quality(scores)

    def _record_round(self, opened: _Round, report: RoundReport, now: float) -> None:
        line: dict[str, object] = {
            "kind": "round",
            "round": self.state.round,
            "cohort": len(opened.cohort),
            "contributed": sorted(self._arrived()),
            "late": sorted(self.state.late),
            "declined": opened.declined,
            "extensions": opened.extensions,
            "seconds": now - opened.opened_at,
            "primal_residual": report.primal_residual,
            "dual_residual": report.dual_residual,
            "step": report.step,
            "correction": report.correction,
            "devices": {device: msgspec.to_builtins(metrics) for device, metrics in self._arrived().items()},
        }
        self._actions.append(Record(line=line))

    # The end

    def _finish(self, now: float) -> None:
        self.state.status = "finishing"
        self._final_at = now + self.federation.schedule.final_s
        self._snapshot()
        self._publish_manifest()
        for device in self._online:
            self._send_task(device, now)

    def _check_reports(self, now: float) -> None:
        if self._final_at is None:  # we came back after a crash
            self._final_at = now + self.federation.schedule.final_s
        all_in = all(device in self.reports or device in self._unable for device in self.consensus.members)
        if all_in or now >= self._final_at:
            self.state.status = "finished"
            self._snapshot()
            self._publish_manifest()
            self._actions.append(Finished())

    # Sending

    def _owes(self, device: str) -> bool:
        """Whether this device has something to do now."""
        if self.state.status == "finishing":
            asked = device in self.consensus.members and device not in self._unable
            return asked and device not in self.reports
        return self._open is not None and device in self._open.cohort and device not in self.state.contributed

    def _send_task(self, device: str, now: float) -> None:
        """What this device is to do now, if anything."""
        self._asked.pop(device, None)
        if device not in self._online or not self._owes(device):
            return
        self._asked[device] = now
        final, member = self.state.status == "finishing", self.state.members[device]
        issued = self.state.issued.get(self.state.round, {})
        task = messages.Task(
            run=self.state.run,
            round=self.state.round + (1 if final else 0),
            model=self._published.base,
            kappa=issued.get(device, self.federation.method.rho),
            deadline_s=self.federation.schedule.final_s if final else self.federation.schedule.deadline_s,
            after=member.accepted_round,
            duals=member.duals if self._keeps_duals() else None,
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

    def _send_pieces(self, device: str, pieces: Pieces) -> None:
        for chunk, piece in pieces:
            self._send(device, chunk, piece)

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

    def _join(self, device: str, birth: messages.Birth, *, counted_until: int) -> None:
        """The device is a member with nu = 0. What it computed before with another dual cannot count any more."""
        self.consensus.join(device, birth.samples)
        self.state.members[device] = MemberState(accepted_round=counted_until)
        self._forget_tasks(device)
        if self._open is not None and device in self._open.cohort:
            self.state.issued[self.state.round][device] = self.consensus.penalty(device)

    def _forget_tasks(self, device: str) -> None:
        for issued in self.state.issued.values():
            issued.pop(device, None)

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


def _check_step(device: str, difference: Vector) -> None:
    largest = float(np.abs(difference).max())
    if largest > LARGEST_STEP:
        raise ContributionError(
            "too_large", f"device {device}: a parameter moved by {largest:.3g}, at most {LARGEST_STEP:.0g} is taken"
        )


def _bounded(residual: float) -> float:
    return residual if math.isnan(residual) else min(abs(residual), LARGEST_RESIDUAL)

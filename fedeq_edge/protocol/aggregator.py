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
In a private federation one more `Snapshot` stands between the close of a round and the first word of what it made:
a sum that is out is spent, and must not be made again with a contribution more.
Rule 3: what a device says is checked before it is used; a refusal has a code, is counted, named and answered, and the
round goes on. The device is the one in the topic.
Rule 4: a task names the dual that counts here. A device that holds another one says so before it trains, has lost its
state, and joins anew with nu = 0 (algorithm.md section 4); its next task tells it so.

In a masked round no contribution is stored: what is known of a single one is noise. It counts when the sum is unmasked,
closed and in a `Snapshot`, and its verdict comes then (masked_rounds.py).
Rule 5: a worker does not close its rounds but hands them over, and opens none before its root has answered (tree.py).

Who is here: roster.py. What counts: intake.py. The rounds: rounds.py. Blobs on their way: transfers.py. What goes out:
outlet.py. This module takes events and lets those decide.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec

from fedeq_edge.consensus.admm import Consensus, DualStore
from fedeq_edge.consensus.privacy import Accountant
from fedeq_edge.errors import ContributionError, MaskingError, RemoteWireError, StateError, WireError
from fedeq_edge.protocol.actions import AggregatorAction, Finished, Record, Store
from fedeq_edge.protocol.federation import Federation
from fedeq_edge.protocol.intake import FindBlob, Intake
from fedeq_edge.protocol.masked import FEATURE
from fedeq_edge.protocol.outlet import Counters, Outlet
from fedeq_edge.protocol.publication import Publication
from fedeq_edge.protocol.roster import Roster
from fedeq_edge.protocol.rounds import Rounds
from fedeq_edge.protocol.state import AggregatorState
from fedeq_edge.protocol.transfers import RETRY_S, Downloads, Uploads
from fedeq_edge.protocol.tree import Upstream
from fedeq_edge.wire import chunks, coding, messages

if TYPE_CHECKING:
    from fedeq_edge.protocol.masked_rounds import MaskedRounds

# A device that is refused again and again is counted, but fills no log and gets no more answers until the next round.
PATIENCE: Final = 20


@dataclass(slots=True)
class Aggregator:
    """The machine. Every method takes the time in seconds of a monotonic clock and returns actions in order."""

    federation: Federation
    consensus: Consensus
    duals: DualStore
    boot: str
    state: AggregatorState
    find_blob: FindBlob = lambda _device, _round: None
    key: bytes = field(default=b"", repr=False)  # 32 secret bytes, of a private federation
    refusals: Counter[str] = field(default_factory=Counter)
    counters: Counters = field(default_factory=Counters)
    reports: dict[str, messages.Report] = field(default_factory=dict)
    _roster: Roster = field(init=False)
    _intake: Intake = field(init=False)
    _rounds: Rounds = field(init=False)
    _published: Publication = field(init=False)
    _uploads: Uploads = field(init=False)
    _out: Outlet = field(init=False)
    _upstream: Upstream | None = None
    _masked: "MaskedRounds | None" = None
    _downloads: Downloads = field(default_factory=Downloads)
    _final_at: float | None = None
    _idle_since: float | None = None  # a worker has no devices for a round since then
    _unable: set[str] = field(default_factory=set)  # devices that could not make their personal model
    _asked: dict[str, float] = field(default_factory=dict)  # when a task went out that no device has reacted to
    _troubles: Counter[str] = field(default_factory=Counter)  # refusals of each device in this round

    def __post_init__(self) -> None:
        state, consensus = self.state, self.consensus
        schedule = self.federation.schedule
        steps = schedule.late_rounds if schedule.mode == "async" else 1
        self._published = Publication(state.run, consensus.z_hat, state.round, steps_kept=steps)
        self._roster = Roster(self.federation.schedule, state.denied)
        self._rounds = Rounds(self.federation, consensus, state, self._roster, self._published, self.key)
        self._intake = Intake(self.federation, consensus, state)
        self._uploads = Uploads(self._intake.limit_bytes)
        self._out = Outlet(self.federation, consensus, state, self._published, self.counters)
        if self.federation.root is not None:
            self._upstream = Upstream(self.federation, self.federation.root, state, self._published)
        if self.federation.masking is not None:
            from fedeq_edge.protocol.masked_rounds import MaskedRounds  # noqa: PLC0415  # cryptography, where asked for

            self._masked = MaskedRounds(self.federation.masking, self._rounds, state, self.boot)

    # Coming back after a crash

    def replay(self, device: str, blob: bytes) -> None:
        """Fold in a contribution that was stored after the snapshot; without actions.

        One that the snapshot holds already is left out. Raises StateError where the two do not fit.
        """
        try:
            self._intake.take(device, messages.decode(blob), chunks.digest(blob))
        except RemoteWireError as error:
            raise StateError(f"journal: stored contribution of device {device} is damaged ({error})") from error
        except ContributionError as error:
            raise StateError(
                f"journal: stored contribution of device {device} does not fit the snapshot beside it ({error})"
            ) from error

    def resume(self, now: float) -> list[AggregatorAction]:
        """Go on with the round that was open when the snapshot was taken. Call before the first `replay`."""
        if self.state.status == "running" and self.state.open:
            self._rounds.resume(now)
            if self._masked is not None:
                self._masked.resume(now)
            self._out.note("resumes a round", round=self.state.round, cohort=len(self.state.cohort))
        return self._out.flush()

    # Events

    def connected(self, now: float, packet_limit: int | None = None) -> list[AggregatorAction]:
        """Say who we are and what we train; the retained births of the devices come in by themselves.

        packet_limit: largest packet of the broker, bytes; None where it has told none.
        """
        self._out.packet_limit, self._rounds.connected_at = packet_limit, now
        birth = messages.encode(messages.AggregatorState(boot=self.boot))
        self._out.publish(self.federation.topics.aggregator, birth, retain=True)
        self._out.manifest()
        self._out.step()
        self._downloads.clear(packet_limit)
        if self._upstream is not None:
            self._upstream.say_at_once()
        for device in self._roster.online:
            self._remind(device, now)
        self._check(now)
        return self._out.flush()

    def arrived(self, topic: str, payload: bytes, now: float) -> list[AggregatorAction]:
        """A payload came; what does not follow the protocol is counted, noted and dropped."""
        if self._upstream is not None and topic == self._upstream.down:
            return self._root_says(self._upstream, payload, now)
        source = self.federation.topics.device_of(topic)
        if source is None:
            return []
        device, branch = source
        self.counters.bytes_in += len(payload)
        if device in self.state.denied:
            self._refuse("denied", device, "it is on the deny list; `fedeq aggregator allow` takes it off")
            return self._out.flush()
        try:
            self._dispatch(device, branch, messages.decode(payload), now)
        except WireError as error:
            self._refuse("malformed", device, str(error))
        self._check(now)
        return self._out.flush()

    def tick(self, now: float) -> list[AggregatorAction]:
        """Close what is due, say again what was not acknowledged."""
        for device, pieces in self._downloads.stalled(now):
            self._out.pieces(device, pieces)
        for device in [device for device, asked_at in self._asked.items() if now - asked_at >= RETRY_S]:
            self._send_task(device, now)
        for device in self._masked.silent(now) if self._masked is not None else ():
            self._remind(device, now)
        self._uploads.forget_idle(now)
        self._send_grants(now)
        for device, pieces in self._downloads.grants(now):
            self._out.pieces(device, pieces)
        self._check(now)
        return self._out.flush()

    # What an operator orders

    def retire(self, device: str, now: float) -> list[AggregatorAction]:
        """The operator says that this device never comes back: its share leaves the sums."""
        if device in self.consensus.members:
            self._drop_member(device)
            self._out.snapshot()
            self._out.note("retired", device=device)
        self._leave(device)
        self._uploads.forget(device)
        self._add_up_without(device, now)
        self._check(now)
        return self._out.flush()

    def deny(self, device: str, now: float) -> list[AggregatorAction]:
        """Nothing is taken from this device any more, from now on.

        What it contributed since the last close is taken out of the consensus, and its dual out of the sums. Steps
        that the consensus has made stand.
        """
        self.state.denied.add(device)
        self._take_back(device)
        if device in self.consensus.members:
            self._drop_member(device)
        self._leave(device)
        self._uploads.forget(device)
        self._out.snapshot()
        self._out.note("denied", device=device)
        self._add_up_without(device, now)
        self._check(now)
        return self._out.flush()

    def allow(self, device: str, now: float) -> list[AggregatorAction]:
        """A denied device may take part again; it joins anew when it says that it is here."""
        if device in self.state.denied:
            self.state.denied.discard(device)
            self._out.snapshot()
            self._out.note("allowed", device=device)
        self._check(now)
        return self._out.flush()

    def offline(self) -> bytes:
        """Payload of our farewell and last will."""
        return messages.encode(messages.Offline(boot=self.boot))

    # What an operator sees

    def status(self) -> dict[str, Any]:
        """Where the federation stands, for status.json."""
        state, is_open = self.state, self.state.open
        return {
            "run": state.run,
            "status": state.status,
            "round": state.round,
            "rounds": self.federation.rounds,
            "online": self._roster.online,
            "members": len(self.consensus.members),
            "cohort": list(state.cohort) if is_open else [],
            "contributed": list(state.contributed) if is_open else [],
            "declined": dict(self._rounds.declined) if is_open else {},
            "extensions": self._rounds.extensions if is_open else 0,
            "refusals": dict(self.refusals),
            "denied": sorted(state.denied),
            "privacy": self._privacy(),
            "masking": None if self._masked is None else self._masked.status(),
            "counters": {
                **{name: getattr(self.counters, name) for name in Counters.__slots__},
                "repeated_bytes": self._downloads.repeated_bytes,
            },
            "uploads": {"granted": len(self._uploads), "waiting": self._uploads.waiting},
            "downloads": {"granted": len(self._downloads), "waiting": self._downloads.waiting},
            "reported": sorted(self.reports),
            "handed_over": bool(state.handed),
        }

    def _privacy(self) -> dict[str, float] | None:
        """Epsilon of what is out, and of all rounds if none is extended; None where nothing is promised."""
        privacy, schedule = self.federation.privacy, self.federation.schedule
        if privacy is None:
            return None
        accountant = Accountant(privacy, self.state.spent)
        rate = 1.0 if schedule.selects else schedule.fraction
        left = max(self.federation.rounds - sum(self.state.spent.values()), 0)
        return {
            "epsilon": accountant.epsilon(),
            "planned": accountant.epsilon(planned=left, rate=rate),
            "delta": privacy.delta,
        }

    # Messages

    def _dispatch(self, device: str, branch: str, received: messages.Received, now: float) -> None:
        message = received.message
        if branch == "state":
            self._on_state(device, message, now)
        elif isinstance(message, messages.Fetch):
            self._on_fetch(device, message, now)
        elif isinstance(message, messages.Offer):
            self._on_offer(device, message, now)
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
        elif isinstance(message, messages.MaskingStep):
            self._on_masking(device, message, received.body)
        else:
            raise RemoteWireError(f"a device does not send a {type(message).__name__.lower()} message")

    def _on_state(self, device: str, message: messages.Message, now: float) -> None:
        if isinstance(message, messages.Offline):
            known = self._roster.birth(device)
            if known is not None and known.boot == message.boot:
                self._leave(device)
                self._out.note("device left", device=device)
        elif isinstance(message, messages.Birth):
            self._on_birth(device, message, now)
        else:
            raise RemoteWireError(f"a {type(message).__name__.lower()} message says nothing of a device's state")

    def _leave(self, device: str) -> None:
        self._roster.leave(device)
        self._asked.pop(device, None)
        self._downloads.forget(device)

    def _on_birth(self, device: str, birth: messages.Birth, now: float) -> None:
        limit = self.federation.schedule.samples_limit
        if self._intake.codec_for(birth) is None:
            self._leave(device)
            wanted = " or ".join(self.federation.up)
            self._refuse("codec", device, f"it does not speak {wanted}; update its agent")
            return
        if self._masked is not None and FEATURE not in birth.codecs:
            self._leave(device)
            self._refuse("codec", device, "it cannot mask: pip install 'fedeq-edge[masking]' on it")
            return
        if birth.samples > limit:
            self._leave(device)
            self._refuse(
                "samples", device, f"it claims {birth.samples} samples; raise schedule.samples_limit ({limit})"
            )
            return
        if device not in self._roster:
            self._out.note("device is here", device=device, samples=birth.samples, profile=birth.profile)
        started = self._roster.welcome(device, birth)
        member = self.consensus.members.get(device)
        if member is not None and member.samples != birth.samples:
            self.consensus.set_samples(device, birth.samples)
            self._out.snapshot()
        if started and self.federation.schedule.mode == "async":
            self._invite(device)
        self._remind(device, now)

    def _invite(self, device: str) -> None:
        """In "async" mode a newcomer, or a device whose work was lost with its program, starts at once."""
        if self.state.open and device in self._roster.askable():
            self._rounds.join_newcomers()
            self._rounds.invite(device)
            self._out.snapshot()

    def _on_differs(self, device: str, differs: messages.Differs, now: float) -> None:
        """A device holds another dual than its task named: it joins anew, unless the task was an old one."""
        member = self.state.members.get(device)
        if differs.run != self.state.run or member is None or device not in self._roster:
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
        if differs.expected == member.dual:
            self._out.note("device lost its state and joins anew", device=device)
            self.counters.resyncs += 1
            self._rounds.join(device, counted_until=max(member.accepted_round, differs.after))
            self._out.snapshot()
        self._send_task(device, now)

    def _on_fetch(self, device: str, fetch: messages.Fetch, now: float) -> None:
        if fetch.run != self.state.run:
            return
        birth = self._roster.birth(device)
        speaks = birth is not None and coding.choose((self.federation.down,), birth.codecs) is not None
        blob = self._published.step_from(fetch.base, fetch.model) if speaks else None
        if blob is None and fetch.model != self._published.base and not self._reassigned(device, now):
            return  # it answers an older task; the newer one is on its way
        self._asked.pop(device, None)
        self.counters.resyncs += blob is None and bool(fetch.base)
        self._out.pieces(device, self._downloads.begin(device, blob or self._published.whole(), now))

    def _reassigned(self, device: str, now: float) -> bool:
        """In "async" mode the consensus may have moved on since a device's task: it gets one for what it is now.

        The consensus goes with it unasked, or it might have moved on again; a question that crosses it is passed over.
        """
        asynchronous = self.federation.schedule.mode == "async" and self.state.open
        if not asynchronous or device in self._downloads or device not in self.state.members:
            return False
        self._rounds.forget_tasks(device)
        self._rounds.invite(device)
        self._out.snapshot()
        self._send_task(device, now)
        return True

    def _on_ack(self, device: str, ack: messages.ChunkAck, now: float) -> None:
        self._out.pieces(device, self._downloads.acknowledged(device, ack, now))
        for waiting, pieces in self._downloads.grants(now):
            self._out.pieces(waiting, pieces)

    def _on_offer(self, device: str, offer: messages.Offer, now: float) -> None:
        member = self.state.members.get(device)
        if member is not None and offer.transfer == member.transfer:
            self.counters.duplicates += 1
            self._out.verdict(device, "contribution", member.accepted_round, factor=member.factor)
            return
        if self._masked is not None and self._masked.holds(offer.transfer):
            self.counters.duplicates += 1
            self._out.send(device, messages.ChunkAck(transfer=offer.transfer, bitmap=chunks.whole(offer.size)))
            return
        bitmap = self._uploads.offer(device, offer.transfer, offer.size, now)
        if bitmap is not None:
            self._out.send(device, messages.ChunkAck(transfer=offer.transfer, bitmap=bitmap))

    def _on_chunk(self, device: str, chunk: messages.Chunk, body: memoryview, now: float) -> None:
        bitmap, blob = self._uploads.add(device, chunk.transfer, chunk.size, chunk.index, body, now)
        if blob is None:
            self._out.send(device, messages.ChunkAck(transfer=chunk.transfer, bitmap=bitmap))
        else:
            self._take(device, blob, chunk.transfer)
            self._send_grants(now)

    def _send_grants(self, now: float) -> None:
        for device, transfer, bitmap in self._uploads.grants(now):
            self._out.send(device, messages.ChunkAck(transfer=transfer, bitmap=bitmap))

    def _on_report(self, device: str, report: messages.Report) -> None:
        if report.run != self.state.run or self.state.status not in ("finishing", "finished"):
            return
        self._asked.pop(device, None)
        if device not in self.reports:
            self.reports[device] = report
            line = {"kind": "report", "device": device, **msgspec.to_builtins(report)}
            self._out.append(Record(line=line))
        self._out.verdict(device, "report", report.round)

    def _on_decline(self, device: str, decline: messages.Decline) -> None:
        self._out.note("device declines", device=device, round=decline.round, reason=decline.reason)
        current = decline.run == self.state.run and decline.round == self.state.round
        if self.state.status == "finishing" and decline.run == self.state.run:
            self._asked.pop(device, None)
            self._unable.add(device)
        elif current and self.state.open and device in self.state.cohort:
            self._asked.pop(device, None)
            self._rounds.decline(device, decline.reason)

    # Contributions

    def _take(self, device: str, blob: bytes, transfer: bytes) -> None:
        if self._masked is not None:
            self._take_masked(self._masked, device, blob, transfer)
            return
        received = messages.decode(blob)
        number = messages.contribution(received).round
        try:
            taken = self._intake.take(device, received, transfer)
        except ContributionError as error:
            if self._refuse(error.code, device, str(error)):
                self._out.verdict(device, "contribution", number, error)
            return
        if taken.kappa is None:
            self.counters.duplicates += 1
        else:
            self.counters.accepted += 1
            self._asked.pop(device, None)
            self._roster.heard(device, taken.message.metrics)
            self._out.append(Store(device=device, round=number, kappa=taken.kappa, factor=taken.factor, blob=blob))
        self._out.verdict(device, "contribution", number, factor=taken.factor)

    def _take_masked(self, masked: "MaskedRounds", device: str, blob: bytes, transfer: bytes) -> None:
        """Into the sum, or refused; its verdict comes with that of the sum."""
        received = messages.decode(blob)
        message = messages.contribution(received)
        number, member = message.round, self.state.members.get(device)
        if member is not None and message.run == self.state.run and number <= member.accepted_round:
            self.counters.duplicates += 1
            self._out.verdict(device, "contribution", number)
            return
        try:
            if masked.holds(transfer):
                self.counters.duplicates += 1
            else:
                self._intake.check(device, message)
                masked.take(device, received, transfer)
                self._asked.pop(device, None)
                self._roster.heard(device, message.metrics)
        except ContributionError as error:
            if self._refuse(error.code, device, str(error)) and error.code != "session":
                self._out.verdict(device, "contribution", number, error)
            return
        self._out.send(device, messages.ChunkAck(transfer=transfer, bitmap=chunks.whole(len(blob))))

    def _on_masking(self, device: str, step: messages.MaskingStep, body: memoryview) -> None:
        if self._masked is None:
            raise RemoteWireError("this federation adds up in the open")
        try:
            self._masked.hear(device, step, body)
        except ContributionError as error:
            self._refuse(error.code, device, str(error))

    def _take_back(self, device: str) -> None:
        """What this device contributed since the last close does not count; the sums are exact, so no trace is left."""
        for _, number, _ in [entry for entry in self.state.accepted if entry[0] == device]:
            blob = self._blob_of(device, number)
            if blob is not None:
                self._intake.take_back(device, blob)

    def _blob_of(self, device: str, number: int) -> bytes | None:
        """A contribution that counts in the open round, also where it is on its way to the disk."""
        return self._out.stored(device, number) or self.find_blob(device, number)

    def _drop_member(self, device: str) -> None:
        self.consensus.retire(device)
        del self.state.members[device]
        self._rounds.leave(device)

    def _refuse(self, code: str, device: str, reason: str) -> bool:
        """Count it; whether it is also worth a line and an answer."""
        self.refusals[code] += 1
        self._troubles[device] += 1
        if self._troubles[device] > PATIENCE:
            return False
        last = "; further ones are counted only" if self._troubles[device] == PATIENCE else ""
        self._out.note("refused", device=device, round=self.state.round, code=code, reason=reason + last)
        return True

    # Rounds

    def _check(self, now: float) -> None:
        """Open, close and finish what is due."""
        if self.state.status == "finishing":
            self._check_reports(now)
        elif self.state.status == "finished":
            return
        elif self._upstream is not None and self._upstream.waiting:
            self._out.extend(self._upstream.say(self.state.handed, now))
        elif not self.state.open:
            self._open_if_possible(now)
        elif self._masked is not None:
            self._check_masked(self._masked, now)
        else:
            due = self._rounds.due(now)
            if due == "close":
                self._close_round(now)
            elif due == "extend":
                self._extend_round(now)

    def _open_if_possible(self, now: float) -> None:
        if not self._rounds.may_open(now):
            if self._upstream is not None:
                self._pass_round(self._upstream, now)
            return
        self._idle_since = None
        self._rounds.join_newcomers()
        if self._rounds_done >= self.federation.rounds:  # a method without exchange has no rounds
            self._finish(now)
        else:
            self._open_round(now)

    def _open_round(self, now: float) -> None:
        first = self.state.status == "waiting"
        self._rounds.open(now)
        self._troubles.clear()
        if self._masked is not None:
            self._masked.begin(now)
        self._out.snapshot()
        if first:
            self._out.manifest()
        for device in self.state.cohort:
            self._send_task(device, now)

    def _extend_round(self, now: float) -> None:
        contributed, trouble = len(self.state.contributed), ""
        self._rounds.extend(now)
        if self._masked is not None:
            trouble = self._masked.trouble
            self._masked.begin(now)
        self._out.snapshot()
        self._out.note(
            "round lacks its quorum and goes on", round=self.state.round, contributed=contributed, trouble=trouble
        )
        self._out.manifest()  # a device that has missed it cannot work
        for device in self._roster.online:
            self._send_task(device, now)

    def _close_round(self, now: float) -> None:
        if self._upstream is not None:
            self._hand_over(self._upstream, now)
            return
        line = self._rounds.close(now, lambda: self._intake.differences(self._blob_of))
        self._out.append(Record(line=line))
        if self.federation.privacy is not None:
            self._out.snapshot()
        self._go_on(now)

    def _go_on(self, now: float) -> None:
        """After a close."""
        self._out.step()
        if self.state.round >= self.federation.rounds:
            self._finish(now)
        else:
            self._open_if_possible(now)

    # Masked rounds

    def _check_masked(self, masked: "MaskedRounds", now: float) -> None:
        """Go on with the sum of the open round."""
        if masked.complete:
            self._unmask(masked, now)
        elif masked.revealing:
            if masked.overdue(now, self.federation.schedule.deadline_s):
                self._give_up(masked, "too few of its devices stayed to the end of their masked sum", now)
        else:
            for device in masked.advance(now):
                self._prompt(device, now)
            due = self._rounds.due(now)
            if due == "close" and masked.close(now):
                self._out.snapshot()
                for device in self.state.contributed:
                    self._prompt(device, now)
            elif due is not None and self._rounds.overdue(now):
                self._extend_round(now)

    def _unmask(self, masked: "MaskedRounds", now: float) -> None:
        try:
            partial, transfers, wrong = masked.unmask()
            self.consensus.accept_sum(partial)
        except (MaskingError, ContributionError) as error:
            self._give_up(masked, str(error), now)
            return
        for trouble in wrong:
            self._out.note("masked sum", round=self.state.round, trouble=trouble)
        for device, transfer in transfers.items():
            self._intake.settle(device, self.state.round, transfer)
        self.counters.accepted += len(transfers)
        self._end_sum(masked, now, transfers, None)

    def _give_up(self, masked: "MaskedRounds", why: str, now: float) -> None:
        """The round has no sum: its devices have revealed too much to make another, and the consensus stays."""
        devices, self.state.contributed = list(self.state.contributed), {}
        refusal = ContributionError("unmasked", f"round {self.state.round} has failed: {why}")
        self.refusals[refusal.code] += len(devices)
        self._out.note("round failed", round=self.state.round, devices=len(devices), reason=why)
        self._end_sum(masked, now, devices, refusal)

    def _end_sum(
        self, masked: "MaskedRounds", now: float, devices: Iterable[str], refusal: ContributionError | None
    ) -> None:
        """Close the round; its devices hear what has become of their contributions once that is on the disk."""
        number = self.state.round
        masked.end()
        line = {**self._rounds.close(now, lambda: ()), "failed": None if refusal is None else str(refusal)}
        self._out.append(Record(line=line))
        self._out.snapshot()
        for device in devices:
            self._out.verdict(device, "contribution", number, refusal)
        self._go_on(now)

    def _add_up_without(self, device: str, now: float) -> None:
        """A device that has left for good is in no sum from here on."""
        if self._masked is None or not self._masked.concerns(device):
            return
        if self._masked.revealing:
            self._give_up(self._masked, f"device {device} was taken out after its sum was closed", now)
        else:
            self._masked.begin(now)
            for other in self.state.cohort:
                self._send_task(other, now)

    def _remind(self, device: str, now: float) -> None:
        """What this device is to do now, if anything: its task, and its part in a masked sum."""
        self._send_task(device, now)
        self._prompt(device, now)

    def _prompt(self, device: str, now: float) -> None:
        prompt = self._masked.prompt(device, now) if self._masked is not None and device in self._roster else None
        if prompt is not None:
            self._out.send(device, *prompt)

    # A worker's rounds

    @property
    def _rounds_done(self) -> int:
        return self.state.round if self._upstream is None else self.state.root_round

    def _hand_over(self, upstream: Upstream, now: float) -> None:
        """The root gets what came, if anything did; with nothing, this round goes on without our devices."""
        share, line = self._rounds.hand_over(now)
        blob = upstream.blob(share)
        if share.weight:
            self.state.handed = blob
            self._out.append(Record(line=line))
            self._out.snapshot()
            upstream.say_at_once()
        self._out.extend(upstream.say(blob, now))

    def _pass_round(self, upstream: Upstream, now: float) -> None:
        """A worker without devices for a round lets the others go on after its deadline."""
        self._idle_since = now if self._idle_since is None else self._idle_since
        if now - self._idle_since >= self.federation.schedule.deadline_s:
            self._hand_over(upstream, now)

    def _root_says(self, upstream: Upstream, payload: bytes, now: float) -> list[AggregatorAction]:
        try:
            heard = upstream.heard(payload)
            if heard is not None:
                self._follow(*heard, now=now)
                self._out.append(upstream.acknowledgement())
        except WireError as error:
            self._refuse("malformed", "root", str(error))
        self._check(now)
        return self._out.flush()

    def _follow(self, model: messages.Model, body: memoryview, *, now: float) -> None:
        """The root's consensus is ours, unless it was before."""
        state = self.state
        if model.round <= state.root_round:
            return
        self._published.follow(model, body)
        self.consensus.follow(self._published.z_hat)
        if state.open:
            self._rounds.abandon()
        state.root_run, state.root_round, state.handed = model.run, model.round, b""
        state.round, self._idle_since = max(state.round, model.round), None
        self._out.step()
        if model.round >= self.federation.rounds:
            self._finish(now)
        else:
            self._out.snapshot()

    # The end

    def _finish(self, now: float) -> None:
        self.state.status = "finishing"
        self._final_at = now + self.federation.schedule.final_s
        self._out.snapshot()
        self._out.manifest()
        for device in self._roster.online:
            self._send_task(device, now)

    def _check_reports(self, now: float) -> None:
        if self._final_at is None:  # we came back after a crash
            self._final_at = now + self.federation.schedule.final_s
        all_in = all(device in self.reports or device in self._unable for device in self.consensus.members)
        if all_in or now >= self._final_at:
            self.state.status = "finished"
            self._out.snapshot()
            self._out.manifest()
            self._out.append(Finished())

    # Sending

    def _owes(self, device: str) -> bool:
        """Whether this device has something to do now."""
        if self.state.status == "finishing":
            asked = device in self.consensus.members and device not in self._unable
            return asked and device not in self.reports
        if self._masked is not None and self._masked.revealing:
            return False  # nothing can come to this sum any more
        return self._rounds.owes(device)

    def _send_task(self, device: str, now: float) -> None:
        """What this device is to do now, if anything."""
        self._asked.pop(device, None)
        birth = self._roster.birth(device)
        if birth is None or not self._owes(device):
            return
        self._asked[device] = now
        final, member = self.state.status == "finishing", self.state.members[device]
        schedule = self.federation.schedule
        task = messages.Task(
            run=self.state.run,
            round=self.state.round + (1 if final else 0),
            model=self._published.base,
            kappa=self._rounds.kappa(device),
            deadline_s=schedule.final_s if final else schedule.deadline_s,
            codec=self._intake.codec_for(birth) or self.federation.up[-1],
            after=member.accepted_round,
            duals=member.dual if self.federation.method.server == "fresh" else None,
            final=final,
            masking=None if final or self._masked is None else self._masked.terms(device),
        )
        self._out.send(device, task)


def new_state(run: str) -> AggregatorState:
    """A federation before its first round."""
    return AggregatorState(run=run, status="waiting")

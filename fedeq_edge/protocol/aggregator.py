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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.consensus.duals import DualStore
from fedeq_edge.consensus.privacy import Accountant
from fedeq_edge.errors import ContributionError, RemoteWireError, StateError, WireError
from fedeq_edge.protocol.actions import AggregatorAction, Record, Store
from fedeq_edge.protocol.course import Course
from fedeq_edge.protocol.federation import Federation
from fedeq_edge.protocol.graphs import packed
from fedeq_edge.protocol.intake import FindBlob, Intake
from fedeq_edge.protocol.masked import FEATURE
from fedeq_edge.protocol.outlet import Counters, Outlet
from fedeq_edge.protocol.publication import Publication
from fedeq_edge.protocol.refusals import Refusals
from fedeq_edge.protocol.roster import Roster
from fedeq_edge.protocol.rounds import Rounds
from fedeq_edge.protocol.state import AggregatorState
from fedeq_edge.protocol.transfers import Downloads, Uploads
from fedeq_edge.protocol.tree import Upstream
from fedeq_edge.wire import chunks, coding, messages

if TYPE_CHECKING:
    from fedeq_edge.protocol.masked_rounds import MaskedRounds


@dataclass(slots=True)
class Aggregator:
    """The machine. Every method takes the time in seconds of a monotonic clock and returns actions in order.

    graph: what devices without torch train by (onnx/training.py), empty where there is none.
    """

    federation: Federation
    consensus: Consensus
    duals: DualStore
    boot: str
    state: AggregatorState
    find_blob: FindBlob = lambda _device, _round: None
    key: bytes = field(default=b"", repr=False)  # 32 secret bytes, of a private federation
    graph: bytes = field(default=b"", repr=False)
    refusals: Counter[str] = field(default_factory=Counter)
    counters: Counters = field(default_factory=Counters)
    reports: dict[str, messages.Report] = field(default_factory=dict)
    _roster: Roster = field(init=False)
    _intake: Intake = field(init=False)
    _rounds: Rounds = field(init=False)
    _published: Publication = field(init=False)
    _uploads: Uploads = field(init=False)
    _out: Outlet = field(init=False)
    _refusals: Refusals = field(init=False)
    _course: Course = field(init=False)
    _graph: bytes = field(init=False, repr=False)  # as it travels
    _masked: "MaskedRounds | None" = None
    _downloads: Downloads = field(default_factory=Downloads)

    def __post_init__(self) -> None:
        state, consensus = self.state, self.consensus
        schedule = self.federation.schedule
        steps = schedule.late_rounds if schedule.mode == "async" else 1
        self._published = Publication(state.run, consensus.z_hat, state.round, steps_kept=steps)
        self._roster = Roster(self.federation.schedule, state.denied)
        self._rounds = Rounds(self.federation, consensus, state, self._roster, self._published, self.key)
        self._intake = Intake(self.federation, consensus, state)
        self._uploads = Uploads(self._intake.limit_bytes)
        name, self._graph = packed(self.graph)
        self._out = Outlet(self.federation, consensus, state, self._published, self.counters, graph=name)
        self._refusals = Refusals(state, self._out, self.refusals)
        if self.federation.masking is not None:
            from fedeq_edge.protocol.masked_rounds import MaskedRounds  # noqa: PLC0415  # cryptography, where asked for

            self._masked = MaskedRounds(self.federation.masking, self._rounds, state, self.boot)
        root = self.federation.root
        self._course = Course(
            federation=self.federation,
            consensus=consensus,
            state=state,
            roster=self._roster,
            intake=self._intake,
            rounds=self._rounds,
            published=self._published,
            out=self._out,
            refusals=self._refusals,
            reports=self.reports,
            blob_of=self._blob_of,
            masked=self._masked,
            upstream=None if root is None else Upstream(self.federation, root, state, self._published),
        )

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
        self._course.resume(now)
        return self._out.flush()

    # Events

    def connected(self, now: float, packet_limit: int | None = None) -> list[AggregatorAction]:
        """Say who we are and what we train; the retained births of the devices come in by themselves.

        packet_limit: largest packet of the broker, bytes; None where it has told none.
        """
        self._out.packet_limit = packet_limit
        birth = messages.encode(messages.AggregatorState(boot=self.boot))
        self._out.publish(self.federation.topics.aggregator, birth, retain=True)
        self._out.manifest()
        self._out.step()
        self._downloads.clear(packet_limit)
        self._course.connected(now)
        self._course.check(now)
        return self._out.flush()

    def arrived(self, topic: str, payload: bytes, now: float) -> list[AggregatorAction]:
        """A payload came; what does not follow the protocol is counted, noted and dropped."""
        if topic == self._course.root_topic:
            return self._root_says(payload, now)
        source = self.federation.topics.device_of(topic)
        if source is None:
            return []
        device, branch = source
        self.counters.bytes_in += len(payload)
        if device in self.state.denied:
            self._refusals.refuse("denied", device, "it is on the deny list; `fedeq aggregator allow` takes it off")
            return self._out.flush()
        try:
            self._dispatch(device, branch, messages.decode(payload), now)
        except WireError as error:
            self._refusals.refuse("malformed", device, str(error))
        self._course.check(now)
        return self._out.flush()

    def _root_says(self, payload: bytes, now: float) -> list[AggregatorAction]:
        try:
            self._course.root_says(payload, now)
        except WireError as error:
            self._refusals.refuse("malformed", "root", str(error))
        self._course.check(now)
        return self._out.flush()

    def tick(self, now: float) -> list[AggregatorAction]:
        """Close what is due, say again what was not acknowledged."""
        for device, pieces in self._downloads.stalled(now):
            self._out.pieces(device, pieces)
        self._course.repeat(now)
        self._uploads.forget_idle(now)
        self._send_grants(now)
        for device, pieces in self._downloads.grants(now):
            self._out.pieces(device, pieces)
        self._course.check(now)
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
        self._course.add_up_without(device, now)
        self._course.check(now)
        return self._out.flush()

    def deny(self, device: str, now: float) -> list[AggregatorAction]:
        """Nothing is taken from this device any more, from now on.

        What it contributed since the last close is taken out of the consensus, and its dual out of the sums. Steps
        that the consensus has made stand, and so does a masked sum whose survivors have been told (course.py).
        """
        self.state.denied.add(device)
        self._take_back(device)
        if device in self.consensus.members:
            self._drop_member(device)
        self._leave(device)
        self._uploads.forget(device)
        self._out.snapshot()
        self._out.note("denied", device=device)
        self._course.add_up_without(device, now)
        self._course.check(now)
        return self._out.flush()

    def allow(self, device: str, now: float) -> list[AggregatorAction]:
        """A denied device may take part again; it joins anew when it says that it is here."""
        if device in self.state.denied:
            self.state.denied.discard(device)
            self._out.snapshot()
            self._out.note("allowed", device=device)
        self._course.check(now)
        return self._out.flush()

    def offline(self) -> bytes:
        """Payload of our farewell and last will."""
        return messages.encode(messages.Offline(boot=self.boot))

    # What an operator sees

    @property
    def extensions(self) -> int:
        """How often the open round has been given another deadline."""
        return self._rounds.extensions

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
        self._course.heard(device)
        self._downloads.forget(device)

    def _on_birth(self, device: str, birth: messages.Birth, now: float) -> None:
        limit = self.federation.schedule.samples_limit
        if self._intake.codec_for(birth) is None:
            self._leave(device)
            wanted = " or ".join(self.federation.up)
            self._refusals.refuse("codec", device, f"it does not speak {wanted}; update its agent")
            return
        if self._masked is not None and FEATURE not in birth.codecs:
            self._leave(device)
            self._refusals.refuse("codec", device, "it cannot mask: pip install 'fedeq-edge[masking]' on it")
            return
        if birth.samples > limit:
            self._leave(device)
            self._refusals.refuse(
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
        self._course.remind(device, now)

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
            self._course.heard(device)
            self._refusals.refuse(
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
        self._course.ask(device, now)

    def _on_fetch(self, device: str, fetch: messages.Fetch, now: float) -> None:
        if fetch.run != self.state.run:
            return
        if self._out.graph is not None and fetch.model == self._out.graph.transfer:
            self._course.heard(device)
            self._out.pieces(device, self._downloads.begin(device, self._graph, now))
            return
        birth = self._roster.birth(device)
        speaks = birth is not None and coding.choose((self.federation.down,), birth.codecs) is not None
        blob = self._published.step_from(fetch.base, fetch.model) if speaks else None
        if blob is None and fetch.model != self._published.base and not self._reassigned(device, now):
            return  # it answers an older task; the newer one is on its way
        self._course.heard(device)
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
        self._course.ask(device, now)
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
        self._course.heard(device)
        if device not in self.reports:
            self.reports[device] = report
            line = {"kind": "report", "device": device, **msgspec.to_builtins(report)}
            self._out.append(Record(line=line))
        self._out.verdict(device, "report", report.round)

    def _on_decline(self, device: str, decline: messages.Decline) -> None:
        self._out.note("device declines", device=device, round=decline.round, reason=decline.reason)
        current = decline.run == self.state.run and decline.round == self.state.round
        if self.state.status == "finishing" and decline.run == self.state.run:
            self._course.cannot_finish(device)
        elif current and self.state.open and device in self.state.cohort:
            self._course.heard(device)
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
            if self._refusals.refuse(error.code, device, str(error)):
                self._out.verdict(device, "contribution", number, error)
            return
        if taken.kappa is None:
            self.counters.duplicates += 1
        else:
            self.counters.accepted += 1
            self._course.heard(device)
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
                self._course.heard(device)
                self._roster.heard(device, message.metrics)
        except ContributionError as error:
            if self._refusals.refuse(error.code, device, str(error)) and error.code != "session":
                self._out.verdict(device, "contribution", number, error)
            return
        self._out.send(device, messages.ChunkAck(transfer=transfer, bitmap=chunks.whole(len(blob))))

    def _on_masking(self, device: str, step: messages.MaskingStep, body: memoryview) -> None:
        if self._masked is None:
            raise RemoteWireError("this federation adds up in the open")
        try:
            self._masked.hear(device, step, body)
        except ContributionError as error:
            self._refusals.refuse(error.code, device, str(error))

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


def new_state(run: str) -> AggregatorState:
    """A federation before its first round."""
    return AggregatorState(run=run, status="waiting")

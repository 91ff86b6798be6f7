"""What the aggregator says and asks for: actions in order, until its shell takes them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.consensus.fixed import WHOLE
from fedeq_edge.errors import ContributionError
from fedeq_edge.protocol.actions import AggregatorAction, Note, Publish, Snapshot, Store
from fedeq_edge.protocol.federation import Federation
from fedeq_edge.protocol.publication import Publication
from fedeq_edge.protocol.state import AggregatorState
from fedeq_edge.protocol.transfers import Pieces
from fedeq_edge.wire import messages
from fedeq_edge.wire.chunks import ENVELOPE_BYTES, PACKET_LIMIT_BYTES

Subject = Literal["contribution", "report"]
# The step of the consensus is one retained message for all where at least half the fleet works in every round.
_BROADCAST_FRACTION: Final = 0.5


@dataclass(slots=True)
class Counters:
    """Since the start of this process. bytes: payloads as they came and went."""

    accepted: int = 0
    duplicates: int = 0
    resyncs: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass(slots=True)
class Outlet:
    """Actions of one aggregator. packet_limit: largest packet of the broker, bytes; None where it has told none.

    graph: the training graph that devices may ask for, None without one.
    """

    federation: Federation
    consensus: Consensus
    state: AggregatorState
    published: Publication
    counters: Counters
    graph: messages.GraphName | None = None
    packet_limit: int | None = None
    _actions: list[AggregatorAction] = field(default_factory=list)

    # To devices

    def send(self, device: str, message: messages.Message, body: bytes = b"") -> None:
        """This message, to one device."""
        self.publish(self.federation.topics.down(device), messages.encode(message, body))

    def pieces(self, device: str, pieces: Pieces) -> None:
        """Parts of a blob, to one device."""
        for chunk, piece in pieces:
            self.send(device, chunk, piece)

    def verdict(
        self,
        device: str,
        subject: Subject,
        round_number: int,
        refusal: ContributionError | None = None,
        factor: int = WHOLE,
    ) -> None:
        """What has become of what this device sent."""
        verdict = messages.Verdict(
            run=self.state.run,
            subject=subject,
            round=round_number,
            accepted=refusal is None,
            code="" if refusal is None else refusal.code,
            reason="" if refusal is None else str(refusal)[:512],
            factor=factor,
        )
        self.send(device, verdict)

    # To all

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """This payload, to whoever listens there."""
        self.counters.bytes_out += len(payload)
        self._actions.append(Publish(topic=topic, payload=payload, retain=retain))

    def manifest(self) -> None:
        """What the federation trains, to all."""
        manifest = messages.Manifest(
            run=self.state.run,
            status=self.state.status,
            model=dict(self.federation.model),
            plan=dict(self.federation.plan),
            method=msgspec.to_builtins(self.federation.method),
            seed=self.federation.seed,
            graph=self.graph,
        )
        self.publish(self.federation.topics.manifest, messages.encode(manifest), retain=True)

    def step(self) -> None:
        """The last step of the consensus for everybody at once, where most of them need it and it fits a packet."""
        step, schedule = self.published.step, self.federation.schedule
        limit = PACKET_LIMIT_BYTES if self.packet_limit is None else self.packet_limit
        fits = len(step) + ENVELOPE_BYTES <= limit
        if step and fits and schedule.mode == "rounds" and schedule.fraction >= _BROADCAST_FRACTION:
            self.publish(self.federation.topics.model, step, retain=True)

    # To the shell

    def snapshot(self) -> None:
        """All that is known goes on the disk."""
        copied = msgspec.convert(msgspec.to_builtins(self.state, builtin_types=(bytes,)), AggregatorState)
        self._actions.append(Snapshot(state=copied, consensus=self.consensus.snapshot()))

    def note(self, event: str, **facts: object) -> None:
        """A line in the log."""
        self._actions.append(Note(event=event, facts=facts))

    def append(self, action: AggregatorAction) -> None:
        """One more."""
        self._actions.append(action)

    def extend(self, actions: Iterable[AggregatorAction]) -> None:
        """These, after those that are waiting."""
        self._actions.extend(actions)

    def stored(self, device: str, number: int) -> bytes | None:
        """The contribution of (device, round) if it is on its way to the disk."""
        for action in self._actions:
            if isinstance(action, Store) and (action.device, action.round) == (device, number):
                return action.blob
        return None

    def flush(self) -> list[AggregatorAction]:
        """All that came since the last flush, in order."""
        actions, self._actions = self._actions, []
        return actions

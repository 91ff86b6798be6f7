"""One simulated client: its machine, its board and its link; it holds no vector unless it is at work."""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fedeq_edge.protocol.actions import ClientAction, Personalise, Publish, Train
from fedeq_edge.protocol.client import Client, Identity, Usage
from fedeq_edge.protocol.state import ClientState
from fedeq_edge.simulation.evaluation import Evaluation
from fedeq_edge.simulation.jobs import Outcome
from fedeq_edge.simulation.scenario import Board
from fedeq_edge.transport.base import Arrived, Connected, Event, Will
from fedeq_edge.wire import coding
from fedeq_edge.wire.frame import FRAME_BYTES

if TYPE_CHECKING:
    from fedeq_edge.simulation.engine import Simulation

_ACK_BYTES: Final = 4  # PUBACK
_HEADER_BYTES: Final = 512  # of a contribution, about
_MEGABIT: Final = 1e6 / 8.0  # bytes


@dataclass(frozen=True, slots=True)
class Order:
    """What a client is to do. base: digest of the consensus that it starts from. pace: how slow its device is now."""

    device: "Device"
    action: Train | Personalise
    base: bytes
    pace: float


class Device:
    """One client in a `Simulation`, connected from its making.

    up, down: bytes so far, with MQTT's headers and acknowledgements. accepted: contributions that it was asked for and
    made. forward: the largest K that a batch used. seconds: of its device, in training. drift: as its learner's.
    evaluation: of its personal model, None before it has one.
    """

    def __init__(self, simulation: "Simulation", name: str, board: Board, samples: int) -> None:
        self.name, self.board = name, board
        self.up = self.down = 0
        self.accepted = self.forward = 0
        self.seconds = 0.0
        self.drift = 1.0
        self.evaluation: Evaluation | None = None
        self._simulation = simulation
        self._asked = 0
        self._away = False
        self._told = 0  # bytes that had come down before the present work
        topics = simulation.federation.topics
        identity = Identity(
            device=name, boot=f"boot-{name}", samples=samples, profile=board.group.profile, emulated=True
        )
        self.client = Client(identity, topics, ClientState(), shared=simulation.shared)
        will = Will(topic=topics.state(name), payload=self.client.offline())
        subscriptions = (topics.manifest, topics.model, topics.aggregator, topics.down(name))
        self.transport = simulation.broker.transport(subscriptions, will)
        self.transport.start(self._on_event)

    def transfer_s(self, outcome: Outcome) -> float:
        """Seconds on the link: what has come down for this work, and what goes up after it."""
        group = self.board.group
        down, self._told = self.down - self._told, self.down
        seconds = 2.0 * group.latency_ms / 1000.0
        if group.down_mbit:
            seconds += down / (group.down_mbit * _MEGABIT)
        if group.up_mbit and outcome.result is not None:
            codec = self._simulation.federation.up[0]
            body = coding.largest_bytes(codec, outcome.result.difference.size)
            seconds += (FRAME_BYTES + _HEADER_BYTES + body) / (group.up_mbit * _MEGABIT)
        return seconds

    def done(self, outcome: Outcome) -> None:
        """The trainer has ended: its result is on its way, or the round is declined."""
        now = self._simulation.now
        self.seconds += outcome.seconds
        if outcome.result is not None:
            self.drift = outcome.drift
            self.accepted += 1
            self.forward = max(self.forward, outcome.result.budget.forward)
            self._simulation.heads.put(self.name, outcome.result.head)
            self._carry_out(self.client.trained(outcome.result, self._usage(), now))
        elif outcome.personal is not None:
            self.evaluation = outcome.evaluation
            self._carry_out(self.client.personalised(outcome.personal, self._usage(), now))
        else:
            self._carry_out(self.client.failed(outcome.failed, now))

    def _on_event(self, event: Event) -> None:
        now = self._simulation.now
        if isinstance(event, Connected):
            self._carry_out(self.client.connected(now, event.packet_limit))
        elif isinstance(event, Arrived):
            self.down += packet_bytes(event.topic, event.payload)
            self.up += _ACK_BYTES
            self._carry_out(self.client.arrived(event.topic, event.payload, now))

    def _carry_out(self, actions: list[ClientAction]) -> None:
        """Messages and work; what a board would write to its disk needs no disk here (journal.py)."""
        for action in actions:
            if isinstance(action, Publish) and not self._away:
                self.up += packet_bytes(action.topic, action.payload)
                self.down += _ACK_BYTES
                self.transport.publish(action.topic, action.payload, retain=action.retain)
            elif isinstance(action, Train):
                self._train(action)
            elif isinstance(action, Personalise):
                self._simulation.order(Order(self, action, self.client.state.base, 1.0))

    def _train(self, action: Train) -> None:
        group, chance = self.board.group, self._chance()
        if chance.random() < group.dropout:
            self._go_away()
            return
        pace = group.straggle_factor if chance.random() < group.straggle else 1.0
        self._simulation.order(Order(self, action, self.client.state.base, pace))

    def _chance(self) -> random.Random:
        """Of this client and the so manieth time that it is asked."""
        self._asked += 1
        return random.Random(f"{self._simulation.scenario.setup.seed}/{self.name}/{self._asked}")

    def _go_away(self) -> None:
        """Its connection is lost until the round's deadline is over, and its work with it."""
        self._away = True
        self.transport.cut()
        self._simulation.after(self._simulation.federation.schedule.deadline_s, self._come_back)

    def _come_back(self) -> None:
        self._carry_out(self.client.failed("connection lost", self._simulation.now))  # nobody hears it
        self._away = False
        self.transport.restore()

    def _usage(self) -> Usage:
        return Usage(wire_up=self.up, wire_down=self.down)


def packet_bytes(topic: str, payload: bytes) -> int:
    """Of an MQTT 5 PUBLISH at QoS 1: fixed header, topic, packet identifier, empty properties, payload."""
    rest = 2 + len(topic) + 2 + 1 + len(payload)
    return 1 + max(1, -(-rest.bit_length() // 7)) + rest

"""An in-memory broker with faults: topics, retained messages, wills, loss, duplication and reordering from a seed.

Single-threaded and without a clock: `deliver()` moves what is queued, so that a test or a simulation decides when time
passes. It shares the `Transport` seam with MQTT, so the protocol machines run on it unchanged.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from fedeq_edge.transport.base import Arrived, Connected, Disconnected, Event, Traffic, Will, matches


@dataclass(slots=True)
class MemoryBroker:
    """Faults are probabilities per delivery: `loss` drops it, `duplicate` repeats it, `reorder` shuffles the queue."""

    loss: float = 0.0
    duplicate: float = 0.0
    reorder: bool = False
    seed: int = 0
    retained: dict[str, bytes] = field(default_factory=dict)
    _queue: list[tuple["MemoryTransport", Arrived]] = field(default_factory=list)
    _clients: list["MemoryTransport"] = field(default_factory=list)
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def transport(self, subscriptions: tuple[str, ...], will: Will | None = None) -> "MemoryTransport":
        """A client of this broker, not yet connected."""
        return MemoryTransport(self, subscriptions, will)

    def deliver(self) -> int:
        """Hand over everything queued so far; returns how many deliveries happened."""
        batch, self._queue = self._queue, []
        if self.reorder:
            self._random.shuffle(batch)
        for client, message in batch:
            for _ in range(self._copies()):
                client.receive(message)
        return len(batch)

    def _copies(self) -> int:
        if self._random.random() < self.loss:
            return 0
        return 2 if self._random.random() < self.duplicate else 1

    def connect(self, client: "MemoryTransport") -> None:
        """Attach a client and queue the retained messages it subscribes to."""
        self._clients.append(client)
        for topic, payload in self.retained.items():
            self._offer(client, Arrived(topic, payload))

    def disconnect(self, client: "MemoryTransport", *, say_will: bool) -> None:
        """Detach a client, drop what was queued for it, publish its will where it vanished."""
        self._clients.remove(client)
        self._queue = [(to, message) for to, message in self._queue if to is not client]
        if say_will and client.will is not None:
            self.publish(client.will.topic, client.will.payload, retain=True)

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Queue a message for every subscriber."""
        if retain:
            self.retained[topic] = payload
        for client in self._clients:
            self._offer(client, Arrived(topic, payload))

    def _offer(self, client: "MemoryTransport", message: Arrived) -> None:
        if any(matches(pattern, message.topic) for pattern in client.subscriptions):
            self._queue.append((client, message))


@dataclass(slots=True)
class MemoryTransport:
    """One client of a MemoryBroker. `cut` and `restore` play a lost connection."""

    broker: MemoryBroker
    subscriptions: tuple[str, ...]
    will: Will | None = None
    _on_event: Callable[[Event], None] | None = None
    _connected: bool = False
    _up: int = 0
    _down: int = 0

    def start(self, on_event: Callable[[Event], None]) -> None:
        """Connect at once."""
        self._on_event = on_event
        self.restore()

    def restore(self) -> None:
        """Connect (again)."""
        self._connected = True
        self.broker.connect(self)
        self._emit(Connected())

    def cut(self) -> None:
        """Lose the connection: queued deliveries are gone and the will is said."""
        self._connected = False
        self.broker.disconnect(self, say_will=True)
        self._emit(Disconnected("connection cut"))

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Hand to the broker, or drop while disconnected."""
        if self._connected:
            self._up += len(payload)
            self.broker.publish(topic, payload, retain=retain)

    def receive(self, message: Arrived) -> None:
        """Called by the broker."""
        if self._connected:
            self._down += len(message.payload)
            self._emit(message)

    def traffic(self) -> Traffic:
        """Payload bytes; there are no packets here."""
        return Traffic(self._up, self._down)

    def stop(self, farewell: Will | None = None) -> None:
        """Say farewell and leave."""
        if not self._connected:
            return
        if farewell is not None:
            self.publish(farewell.topic, farewell.payload, retain=True)
        self._connected = False
        self.broker.disconnect(self, say_will=False)

    def _emit(self, event: Event) -> None:
        if self._on_event is not None:
            self._on_event(event)

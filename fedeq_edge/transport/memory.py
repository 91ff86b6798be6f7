"""An in-memory broker with faults: topics, retained messages, wills, loss, duplication and reordering from a seed.

Single-threaded and without a clock: `deliver()` moves what is queued, so that a test or a simulation decides when time
passes. It shares the `Transport` seam with MQTT, so the protocol machines run on it unchanged.
"""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from fedeq_edge.transport.base import Arrived, Connected, Disconnected, Event, Traffic, Will, matches


class _Index:
    """Clients by what they subscribe to, so that a message costs what its subscribers cost, not what the fleet does."""

    def __init__(self) -> None:
        self._numbers: dict[MemoryTransport, int] = {}  # in order of connecting, which is the order of deliveries
        self._exact: dict[str, dict[MemoryTransport, None]] = {}
        self._patterns: dict[MemoryTransport, tuple[str, ...]] = {}
        self._count = itertools.count()
        self._known: dict[str, list[MemoryTransport]] = {}  # what `of` has found, until somebody comes or goes

    def add(self, client: "MemoryTransport") -> None:
        """The client hears from now on what it has subscribed to."""
        self._known.clear()
        self._numbers[client] = next(self._count)
        for topic in filter(_is_exact, client.subscriptions):
            self._exact.setdefault(topic, {})[client] = None
        patterns = tuple(topic for topic in client.subscriptions if not _is_exact(topic))
        if patterns:
            self._patterns[client] = patterns

    def remove(self, client: "MemoryTransport") -> None:
        """The client hears nothing any more. Raises KeyError where it heard nothing before."""
        self._known.clear()
        del self._numbers[client]
        self._patterns.pop(client, None)
        for topic in filter(_is_exact, client.subscriptions):
            self._exact[topic].pop(client, None)

    def of(self, topic: str) -> list["MemoryTransport"]:
        """Whoever has subscribed to this topic, once each, in order of connecting."""
        if topic not in self._known:
            self._known[topic] = self._find(topic)
        return self._known[topic]

    def _find(self, topic: str) -> list["MemoryTransport"]:
        found = self._exact.get(topic, {})
        wide = [client for client, patterns in self._patterns.items() if any(matches(p, topic) for p in patterns)]
        return sorted({*found, *wide}, key=self._numbers.__getitem__) if wide else list(found)


def _is_exact(topic_filter: str) -> bool:
    return "+" not in topic_filter and "#" not in topic_filter


@dataclass(slots=True)
class MemoryBroker:
    """Faults are probabilities per delivery: `loss` drops it, `duplicate` repeats it, `reorder` shuffles the queue."""

    loss: float = 0.0
    duplicate: float = 0.0
    reorder: bool = False
    seed: int = 0
    retained: dict[str, bytes] = field(default_factory=dict)
    _queue: list[tuple["MemoryTransport", Arrived]] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)  # of a topic among those retained
    _clients: _Index = field(default_factory=_Index)
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
        self._clients.add(client)
        self._queue.extend(
            (client, Arrived(topic, self.retained[topic])) for topic in self._retained_for(client.subscriptions)
        )

    def disconnect(self, client: "MemoryTransport", *, say_will: bool) -> None:
        """Detach a client, drop what was queued for it, publish its will where it vanished."""
        self._clients.remove(client)
        if self._queue:
            self._queue = [(to, message) for to, message in self._queue if to is not client]
        if say_will and client.will is not None:
            self.publish(client.will.topic, client.will.payload, retain=True)

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Queue a message for every subscriber."""
        if retain:
            self.retained[topic] = payload
            self._places.setdefault(topic, len(self._places))
        message = Arrived(topic, payload)
        self._queue.extend((client, message) for client in self._clients.of(topic))

    def _retained_for(self, subscriptions: tuple[str, ...]) -> list[str]:
        """Retained topics that a subscription covers, the oldest first; without wildcards a look at each of them."""
        if all(map(_is_exact, subscriptions)):
            return sorted(self._places.keys() & set(subscriptions), key=self._places.__getitem__)
        return [topic for topic in self.retained if any(matches(pattern, topic) for pattern in subscriptions)]


@dataclass(slots=True, eq=False)
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

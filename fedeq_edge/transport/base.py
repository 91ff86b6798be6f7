"""The seam between the protocol machines and whatever carries their payloads.

A transport is started with a callback and from then on calls it, from any thread, with events; everything else about
connections (reconnecting, windows, acknowledgements of the broker) stays inside. What was published before a
`Disconnected` and not yet acknowledged may be lost: the machines say everything that matters again after the next
`Connected`, and every message is idempotent. No transport stores anything for later.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Connected:
    """The connection is up and the subscriptions are in force. packet_limit: the broker's largest packet."""

    packet_limit: int | None = None


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection is gone; the transport is already trying again. reason: one line for the log."""

    reason: str


@dataclass(frozen=True, slots=True)
class Arrived:
    """A payload came."""

    topic: str
    payload: bytes


Event = Connected | Disconnected | Arrived


@dataclass(frozen=True, slots=True, kw_only=True)
class Will:
    """What the broker says for us when we vanish (retained)."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of application packets on the wire since the start, with their MQTT headers and acknowledgements."""

    up: int = 0
    down: int = 0


def matches(topic_filter: str, topic: str) -> bool:
    """Whether an MQTT topic filter with + and # covers a topic."""
    wanted, given = topic_filter.split("/"), topic.split("/")
    for position, part in enumerate(wanted):
        if part == "#":
            return True
        if position >= len(given) or part not in ("+", given[position]):
            return False
    return len(wanted) == len(given)


class Transport(Protocol):
    """A connection to a broker that comes back by itself."""

    def start(self, on_event: Callable[[Event], None]) -> None:
        """Connect in the background; never raises for a broker that is away."""
        ...

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send at least once while connected; dropped when the connection is gone."""
        ...

    def traffic(self) -> Traffic:
        """What went over the wire so far."""
        ...

    def stop(self, farewell: Will | None = None) -> None:
        """Publish the farewell if connected, disconnect, end every thread."""
        ...

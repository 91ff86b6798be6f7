"""Packets that come twice, in another order, damaged, or from an attacker: cases 6, 7 and 8, on both brokers."""

import contextlib
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pytest

from fedeq_edge.transport.base import Connected, Event
from fedeq_edge.transport.faults import Corrupt, Packet, concerns_devices, duplicate
from fedeq_edge.transport.mqtt import Endpoint, MqttTransport
from fedeq_edge.wire import messages
from fedeq_edge.wire.chunks import digest
from tests.conftest import until
from tests.hostile.payloads import MAKERS
from tests.reliability.fleet import AGGREGATOR

if TYPE_CHECKING:
    from tests.conftest import RealMosquitto
    from tests.reliability.conftest import MakeFleet
    from tests.reliability.fleet import Fleet

ROUNDS = 4


@pytest.fixture
def fleet(make_fleet: "MakeFleet", either: Endpoint) -> "Fleet":
    """Three devices; a contribution takes several messages."""
    _, port, _ = either.address()
    return make_fleet(port, version=either.version, rounds=ROUNDS, channels=128, codec="f32")


def test_messages_that_come_twice_count_once(fleet: "Fleet") -> None:
    for link in fleet.links.values():
        link.conditions.tamper = duplicate
    fleet.start()
    assert fleet.finish().contributions == 3 * ROUNDS


def test_messages_in_another_order_change_no_bit(fleet: "Fleet") -> None:
    """Those of one device among themselves, and those of several on their way to the aggregator."""
    for link in fleet.links.values():
        link.conditions.jitter_s = 0.1
    fleet.start()
    assert fleet.finish().contributions == 3 * ROUNDS


def test_damaged_messages_are_refused_counted_and_said_again(make_fleet: "MakeFleet", either: Endpoint) -> None:
    _, port, _ = either.address()
    fleet = make_fleet(port, version=either.version, rounds=2, channels=64, codec="f32", retry_s=0.5)
    damage = {name: Corrupt(0.1, seed=number) for number, name in enumerate(fleet.links)}
    for name, link in fleet.links.items():
        link.conditions.tamper = damage[name]
    fleet.start()
    assert fleet.finish().contributions == 6
    assert damage[AGGREGATOR].damaged > 0
    assert fleet.status()["refusals"]["malformed"] > 0


class Recorder:
    """Keeps what a device says, and lets it pass."""

    def __init__(self) -> None:
        self.said: list[tuple[str, bytes]] = []

    def __call__(self, packet: Packet) -> Sequence[Packet]:
        if concerns_devices(packet) and packet.direction == "up":
            self.said.append((packet.topic, packet.payload))
        return (packet,)


class Attacker:
    """Somebody whom the broker lets publish anything."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._connected = False
        self._transport = MqttTransport(endpoint, "attacker", ("none/attacker",))
        self._transport.start(self._note)
        until(lambda: self._connected, "the attacker is connected")

    def _note(self, event: Event) -> None:
        self._connected = isinstance(event, Connected)

    def publish(self, topic: str, payload: bytes) -> None:
        self._transport.publish(topic, payload)

    def leave(self) -> None:
        """All of it has come to the broker."""
        self._transport.stop()


def test_everything_a_device_has_ever_said_may_be_said_again(fleet: "Fleet", either: Endpoint) -> None:
    recorder = Recorder()
    fleet.links["a"].conditions.tamper = recorder
    fleet.start()
    fleet.until_round(2)
    fleet.hold("b")
    fleet.until_only("b")
    attacker = Attacker(either)
    for topic, payload in list(recorder.said):
        attacker.publish(topic, payload)
    attacker.leave()
    fleet.release("b")
    assert fleet.finish().contributions == 3 * ROUNDS
    assert all(line["contributed"] == ["a", "b", "c"] for line in fleet.rounds())


def test_hostile_payloads_in_the_name_of_a_device_stop_nothing(fleet: "Fleet", either: Endpoint) -> None:
    fleet.hold("a")
    fleet.start()
    fleet.until_only("a")
    blob = messages.encode(messages.Decline(run="r", round=1, reason="none"))
    sound = messages.encode(messages.Chunk(transfer=digest(blob), index=0, size=len(blob)), blob)
    attacker = Attacker(either)
    for maker in MAKERS:
        for payload in maker(sound):
            if len(payload) < 100_000:  # what no broker passes on is the next test's
                attacker.publish(f"fedeq/v1/{fleet.name}/dev/a/up", payload)
    attacker.leave()
    fleet.until(lambda: fleet.status()["refusals"].get("malformed", 0) > 0, "the aggregator counts them")
    fleet.release("a")
    assert fleet.finish().contributions == 3 * ROUNDS


@pytest.mark.broker
def test_ten_megabytes_cost_their_sender_its_connection_and_the_fleet_nothing(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto"
) -> None:
    fleet = make_fleet(shared_mosquitto.port)
    fleet.hold("a")
    fleet.start()
    fleet.until_only("a")
    size = 10_000_000
    length = bytes((0x80 | size & 0x7F, 0x80 | size >> 7 & 0x7F, 0x80 | size >> 14 & 0x7F, size >> 21))
    with socket.create_connection(("127.0.0.1", shared_mosquitto.port), 10.0) as raw:
        raw.sendall(b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x3c\x00\x00")
        assert raw.recv(4)[:1] == b"\x20"
        with contextlib.suppress(ConnectionError):  # it is closed before all of it is sent
            raw.sendall(b"\x32" + length + bytes(size))
            while raw.recv(100):
                pass
    fleet.release("a")
    assert fleet.finish().contributions == 15

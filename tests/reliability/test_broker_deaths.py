"""The broker is killed, restarted with an empty memory, or takes only small packets: cases 1, 2, 13 and 15."""

import functools
import random
from typing import TYPE_CHECKING

import pytest

from fedeq_edge.transport import mqtt
from fedeq_edge.transport.base import Connected, Disconnected, Event
from fedeq_edge.transport.mqtt import Endpoint, MqttTransport
from fedeq_edge.wire.messages import Chunk, ChunkAck, Task, Verdict
from tests.conftest import until
from tests.reliability.fleet import AGGREGATOR, Gate, carries

if TYPE_CHECKING:
    from fedeq_edge.wire.messages import Message
    from tests.conftest import MakeMosquitto, RealMosquitto
    from tests.reliability.conftest import MakeFleet

pytestmark = pytest.mark.broker


def test_a_broker_that_dies_before_anybody_is_there_is_waited_for(
    make_fleet: "MakeFleet", mosquitto: "RealMosquitto"
) -> None:
    fleet = make_fleet(mosquitto.port)
    mosquitto.kill()
    fleet.start()
    fleet.until(lambda: fleet.status()["broker"] not in ("", "connecting"), "the aggregator finds no broker")
    mosquitto.start()
    assert fleet.finish().contributions == 15


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        pytest.param("a", Task, id="down"),
        pytest.param("a", Chunk, id="up"),
        pytest.param(AGGREGATOR, Chunk, id="between-puback-and-aggregator"),
        pytest.param(AGGREGATOR, Verdict, id="between-aggregator-and-device"),
        pytest.param("b", ChunkAck, id="within-a-transfer"),
    ],
)
def test_a_broker_that_dies_with_a_message_in_its_hands_loses_no_contribution(
    make_fleet: "MakeFleet", mosquitto: "RealMosquitto", part: str, kind: "type[Message]"
) -> None:
    """What it has acknowledged to one side and not passed on to the other is gone with it: nobody may rely on that."""
    fleet = make_fleet(mosquitto.port, channels=128, codec="f32")  # 70 kB: more than a small upload
    gate = Gate(fleet.links[part], carries(kind))
    fleet.start()
    gate.wait()
    mosquitto.kill()
    gate.open()
    mosquitto.start()
    assert fleet.finish().contributions == 15


def test_a_broker_that_dies_again_and_again_changes_no_bit(make_fleet: "MakeFleet", mosquitto: "RealMosquitto") -> None:
    fleet = make_fleet(mosquitto.port, rounds=12)
    fleet.start()
    for number in range(1, 6):
        fleet.until_round(2 * number)
        mosquitto.kill()
        mosquitto.start()
    assert fleet.finish().contributions == 36


def test_contributions_larger_than_the_brokers_packets_go_in_smaller_pieces(
    make_fleet: "MakeFleet", make_mosquitto: "MakeMosquitto"
) -> None:
    broker = make_mosquitto("max_packet_size 20000\n")
    fleet = make_fleet(broker.port, channels=128, codec="f32", rounds=2)
    fleet.start()
    assert fleet.finish().contributions == 6
    assert "over the broker's limit" not in fleet.logs()
    assert "disconnected" not in fleet.logs()


class Herd:
    """Many clients of one broker, and what became of their connections."""

    def __init__(self, url: str, count: int) -> None:
        self.connected, self.lost = [0] * count, [0] * count
        self.transports = [MqttTransport(Endpoint(url=url), f"herd-{n}", (f"none/{n}",)) for n in range(count)]
        for number, transport in enumerate(self.transports):
            transport.start(functools.partial(self._note, number))

    def _note(self, number: int, event: Event) -> None:
        self.connected[number] += isinstance(event, Connected)
        self.lost[number] += isinstance(event, Disconnected)


def test_a_herd_comes_back_spread_over_the_jitter_window(
    mosquitto: "RealMosquitto", monkeypatch: pytest.MonkeyPatch
) -> None:
    delays: list[tuple[float, float]] = []
    rng = random.Random(0)

    def drawn(low: float, bound: float) -> float:
        delays.append((rng.uniform(low, bound), bound))
        return delays[-1][0]

    monkeypatch.setattr("fedeq_edge.transport.mqtt.random.uniform", drawn)
    monkeypatch.setattr(mqtt, "_BACKOFF_FIRST_S", 0.5)
    herd = Herd(mosquitto.url, 40)
    try:
        until(lambda: min(herd.connected) == 1, "the herd is here")
        mosquitto.kill()
        until(lambda: min(herd.lost) >= 1, "the herd has seen it")
        mosquitto.start()
        until(lambda: min(herd.connected) >= 2, "the herd is back")
    finally:
        for transport in herd.transports:
            transport.stop()
    first = sorted(delay for delay, bound in delays if bound == 0.5)
    assert len(first) == 40
    assert first[-1] - first[0] > 0.4
    assert max(late - early for early, late in zip(first, first[10:], strict=False)) < 0.3  # no ten at once: ours alone

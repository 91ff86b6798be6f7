"""MQTT on real brokers: what arrives, what is dropped, what comes back, and how many bytes it took."""

import contextlib
import itertools
import queue
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

from fedeq_edge.errors import ConfigError, TransportError
from fedeq_edge.transport import broker as ladder
from fedeq_edge.transport import mqtt
from fedeq_edge.transport.base import Arrived, Connected, Disconnected, Event, Will
from fedeq_edge.transport.mqtt import WINDOW, Endpoint, MqttTransport
from tests.conftest import until

if TYPE_CHECKING:
    from tests.conftest import MakeMosquitto, RealMosquitto, WatchedProxy

E = TypeVar("E", Connected, Disconnected, Arrived)
PATIENCE_S = 30.0
PUBLISH, PUBACK = 3, 4
_numbers = itertools.count()


class Client:
    """A transport and its events. `wait` takes events until one of that kind comes, and returns it."""

    def __init__(self, endpoint: Endpoint, *filters: str, name: str = "", will: Will | None = None) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        name = name or f"test-{next(_numbers)}"
        self.transport = MqttTransport(endpoint, name, filters or (f"none/{name}",), will=will)
        self.transport.start(self._events.put)

    def wait(self, kind: type[E]) -> E:
        while True:
            event = self._events.get(timeout=PATIENCE_S)
            if isinstance(event, kind):
                return event

    def next(self) -> Event:
        return self._events.get(timeout=PATIENCE_S)

    def online(self) -> "Client":
        self.wait(Connected)
        return self


Connect = Callable[..., Client]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Make clients that are gone after the test."""
    with contextlib.ExitStack() as clients:

        def make(endpoint: Endpoint, *filters: str, name: str = "", will: Will | None = None) -> Client:
            client = Client(endpoint, *filters, name=name, will=will)
            clients.callback(client.transport.stop)
            return client

        yield make


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reconnect within a tenth of a second."""
    monkeypatch.setattr(mqtt, "_BACKOFF_FIRST_S", 0.1)


@pytest.fixture(scope="module")
def amqtt() -> Iterator[Endpoint]:
    pytest.importorskip("amqtt", reason="amqtt is not installed: pip install 'fedeq-edge[broker]'")
    with ladder.running("embedded") as broker:
        yield broker.endpoint


@pytest.fixture(
    params=[
        pytest.param("5", marks=pytest.mark.broker, id="mosquitto-5"),
        pytest.param("3.1.1", marks=pytest.mark.broker, id="mosquitto-3.1.1"),
        pytest.param("amqtt", id="amqtt-3.1.1"),
    ]
)
def endpoint(request: pytest.FixtureRequest) -> Endpoint:
    """Each broker in each version that it speaks."""
    if request.param == "amqtt":
        found: Endpoint = request.getfixturevalue("amqtt")
        return found
    broker: RealMosquitto = request.getfixturevalue("shared_mosquitto")
    return Endpoint(url=broker.url, version=request.param)


@pytest.fixture
def topic() -> str:
    """Of this test alone."""
    return f"test/{next(_numbers)}"


def test_a_message_arrives_and_a_retained_one_reaches_who_comes_later(
    connect: Connect, endpoint: Endpoint, topic: str
) -> None:
    early = connect(endpoint, f"{topic}/+").online()
    sender = connect(endpoint).online()
    sender.transport.publish(f"{topic}/state", b"kept", retain=True)
    assert early.wait(Arrived) == Arrived(f"{topic}/state", b"kept")
    sender.transport.publish(f"{topic}/news", b"once")
    assert early.wait(Arrived) == Arrived(f"{topic}/news", b"once")
    late = connect(endpoint, f"{topic}/+")
    assert late.wait(Arrived) == Arrived(f"{topic}/state", b"kept")


def test_what_others_subscribed_to_does_not_reach_us(connect: Connect, endpoint: Endpoint, topic: str) -> None:
    others = connect(endpoint, f"{topic}/other").online()
    others.transport.publish(f"{topic}/other", b"theirs", retain=True)
    others.wait(Arrived)
    late = connect(endpoint, f"{topic}/mine").online()
    others.transport.publish(f"{topic}/mine", b"ours")
    assert late.wait(Arrived).payload == b"ours"


def test_three_hundred_messages_all_arrive_in_order(connect: Connect, endpoint: Endpoint, topic: str) -> None:
    receiver, sender = connect(endpoint, topic).online(), connect(endpoint).online()
    sent = [number.to_bytes(2, "little") * 50 for number in range(300)]
    for payload in sent:
        sender.transport.publish(topic, payload)
    assert [receiver.wait(Arrived).payload for _ in sent] == sent


def test_what_a_full_socket_leaves_over_follows_when_it_has_room(
    connect: Connect, endpoint: Endpoint, topic: str
) -> None:
    receiver, sender = connect(endpoint, topic).online(), connect(endpoint).online()
    sent = [bytes([number]) * 900_000 for number in range(2 * WINDOW)]
    for payload in sent:
        sender.transport.publish(topic, payload)
    assert [receiver.wait(Arrived).payload for _ in sent] == sent


def test_leaving_says_the_farewell_and_not_the_will(connect: Connect, endpoint: Endpoint, topic: str) -> None:
    watcher = connect(endpoint, f"{topic}/#").online()
    device = connect(endpoint, will=Will(topic=f"{topic}/state", payload=b"vanished")).online()
    device.transport.stop(Will(topic=f"{topic}/state", payload=b"left"))
    assert watcher.wait(Arrived).payload == b"left"
    late = connect(endpoint, f"{topic}/#")
    assert late.wait(Arrived).payload == b"left"
    watcher.transport.publish(f"{topic}/last", b"nothing came between")
    assert watcher.wait(Arrived).payload == b"nothing came between"


@pytest.mark.broker
@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_a_lost_connection_says_the_will_and_comes_back_by_itself(
    connect: Connect, mosquitto: "RealMosquitto", proxy: "WatchedProxy", version: mqtt.Version
) -> None:
    watcher = connect(Endpoint(url=mosquitto.url, version=version), "state").online()
    device = connect(Endpoint(url=proxy.url, version=version), will=Will(topic="state", payload=b"vanished")).online()
    proxy.cut()
    assert watcher.wait(Arrived).payload == b"vanished"
    assert str(proxy.port) in device.wait(Disconnected).reason
    device.online().transport.publish("state", b"back")
    assert watcher.wait(Arrived).payload == b"back"


@pytest.mark.broker
def test_a_broker_that_is_killed_and_comes_back_is_found_again_and_what_was_said_meanwhile_is_dropped(
    connect: Connect, mosquitto: "RealMosquitto"
) -> None:
    endpoint = Endpoint(url=mosquitto.url)
    sender, receiver = connect(endpoint).online(), connect(endpoint, "t").online()
    mosquitto.kill()
    sender.wait(Disconnected)
    for _ in range(50):
        sender.transport.publish("t", b"said into the void")
    mosquitto.start()
    receiver.online()
    sender.online().transport.publish("t", b"after")
    assert receiver.wait(Arrived).payload == b"after"


@pytest.mark.broker
def test_the_window_is_used_and_never_exceeded(connect: Connect, proxy: "WatchedProxy") -> None:
    sender = connect(Endpoint(url=proxy.url)).online()
    for _ in range(300):
        sender.transport.publish("t", b"x" * 1000)
    sender.transport.stop()
    outstanding = most = 0
    for packet in proxy.seen:
        outstanding += (packet.direction, packet.kind) == ("up", PUBLISH)
        outstanding -= (packet.direction, packet.kind) == ("down", PUBACK)
        most = max(most, outstanding)
    assert outstanding == 0
    assert 1 < most <= WINDOW


@pytest.mark.broker
@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_traffic_is_what_the_proxy_counts(
    connect: Connect, mosquitto: "RealMosquitto", proxy: "WatchedProxy", version: mqtt.Version
) -> None:
    counted = connect(Endpoint(url=proxy.url, version=version), "down").online()
    other = connect(Endpoint(url=mosquitto.url, version=version), "up").online()
    for size in (0, 100, 200, 20_000):  # remaining lengths of one, two and three bytes
        counted.transport.publish("up", b"x" * size)
        assert len(other.wait(Arrived).payload) == size
        other.transport.publish("down", b"x" * size)
        assert len(counted.wait(Arrived).payload) == size
    proxy.wait_for("up", PUBACK, 4)
    counted.transport.stop()
    traffic = counted.transport.traffic()
    assert traffic.up == proxy.bytes("up", PUBLISH, PUBACK)
    assert traffic.down == proxy.bytes("down", PUBLISH, PUBACK)
    assert traffic.up > 20_300


@pytest.mark.broker
def test_a_packet_over_the_brokers_limit_is_refused_and_the_connection_stays(
    connect: Connect, shared_mosquitto: "RealMosquitto", topic: str
) -> None:
    client = connect(Endpoint(url=shared_mosquitto.url), topic)
    assert client.wait(Connected).packet_limit == ladder.MAX_PACKET_BYTES
    overhead = mqtt.packet_bytes(topic, b"x" * 100_000, "5") - 100_000
    with pytest.raises(TransportError, match=f"over the broker's limit of {ladder.MAX_PACKET_BYTES}"):
        client.transport.publish(topic, b"x" * (ladder.MAX_PACKET_BYTES - overhead + 1))
    client.transport.publish(topic, b"x" * (ladder.MAX_PACKET_BYTES - overhead))
    received = client.next()  # and no Disconnected before it
    assert isinstance(received, Arrived)
    assert len(received.payload) == ladder.MAX_PACKET_BYTES - overhead


@pytest.mark.broker
def test_a_broker_that_refuses_us_is_named_and_tried_again(connect: Connect, make_mosquitto: "MakeMosquitto") -> None:
    client = connect(Endpoint(url=make_mosquitto("allow_anonymous false\n").url))
    for _ in range(2):
        assert "refused us: Not authorized" in client.wait(Disconnected).reason


def test_a_broker_that_never_answers_is_given_up_and_tried_again(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt, "_PATIENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = connect(Endpoint(url=f"mqtt://127.0.0.1:{silent.getsockname()[1]}"))
        for _ in range(2):
            assert "did not answer" in client.wait(Disconnected).reason
        client.transport.stop()


def test_a_port_where_nobody_listens_is_no_error_but_an_event(connect: Connect) -> None:
    client = connect(Endpoint(url=f"mqtt://127.0.0.1:{ladder.free_port()}"))
    assert "refused" in client.wait(Disconnected).reason
    client.transport.publish("t", b"dropped")


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Bounds of the waits before each new connection, seconds; no wait is made."""
    drawn: list[float] = []

    def no_wait(_low: float, bound: float) -> float:
        drawn.append(bound)
        return 0.0

    monkeypatch.setattr("fedeq_edge.transport.mqtt.random.uniform", no_wait)
    return drawn


@pytest.mark.broker
def test_connections_that_do_not_last_are_tried_ever_more_slowly(
    connect: Connect, proxy: "WatchedProxy", bounds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = connect(Endpoint(url=proxy.url)).online()
    for _ in range(3):
        proxy.cut()
        device.online()
    assert bounds == pytest.approx([0.1, 0.2, 0.4])
    monkeypatch.setattr(mqtt, "_SETTLED_S", 0.0)  # from here on every connection has lasted
    proxy.cut()
    device.online()
    proxy.cut()
    device.online()
    assert bounds[-1] == pytest.approx(0.1)


@pytest.mark.broker
def test_a_link_that_breaks_after_it_has_carried_something_is_tried_again_soon(
    connect: Connect, proxy: "WatchedProxy", bounds: list[float]
) -> None:
    device = connect(Endpoint(url=proxy.url)).online()
    for _ in range(3):
        for _ in range(2):
            device.transport.publish("up", b"x")
        until(lambda: device.transport._session is not None and device.transport._session.useful, "PUBACKs came")
        proxy.cut()
        device.online()
    assert bounds == pytest.approx([0.1, 0.1, 0.1])


@pytest.mark.parametrize(
    "url",
    [
        "localhost:1883",
        "http://host",
        "mqtt://",
        "mqtt://host:port",
        "mqtt://host:99999",
        "mqtt://host:0",
        "mqtt://[::1",
        "mqtt://me:secret@host:x",
    ],
)
def test_an_url_that_is_no_brokers_is_a_config_error_without_the_password(url: str) -> None:
    with pytest.raises(ConfigError, match=r"no broker address; write mqtt://host:1883") as caught:
        MqttTransport(Endpoint(url=url), "me", ())
    assert "secret" not in str(caught.value)


def test_an_url_has_defaults_decoded_credentials_and_a_form_without_them() -> None:
    endpoint = Endpoint(url="mqtts://me:p%40ss@[::1]")
    assert endpoint.address() == ("::1", 8883, True)
    assert endpoint.credentials() == ("me", "p@ss")
    assert endpoint.shown() == "mqtts://[::1]:8883"
    assert Endpoint(url="mqtt://host").address() == ("host", 1883, False)
    assert Endpoint(url="mqtt://host").credentials() == (None, None)


def test_a_command_line_is_shown_without_the_secrets_in_it() -> None:
    shown = mqtt.without_secrets("fedeq demo --broker mqtt://me:s3@cret@host:1883 --out a@b")
    assert shown == "fedeq demo --broker mqtt://...@host:1883 --out a@b"


@pytest.mark.parametrize("field", ["ca", "certificate"])
def test_tls_files_that_cannot_be_used_are_a_config_error(tmp_path: Path, field: str) -> None:
    broken = tmp_path / "broken.pem"
    broken.write_text("not a certificate")
    for path in (broken, tmp_path / "missing.pem"):
        with pytest.raises(ConfigError, match="TLS files of the broker cannot be used"):
            MqttTransport(Endpoint(url="mqtts://host", **{field: str(path)}), "me", ())  # type: ignore[arg-type]

"""broker/mosquitto.conf and broker/acl on a real mosquitto: who may connect, and who may say and read what."""

import socket
import ssl
from typing import TYPE_CHECKING

import pytest

from fedeq_edge.transport.base import Connected, Disconnected, Event
from fedeq_edge.wire.topics import Topics
from tests.conftest import until

if TYPE_CHECKING:
    from tests.broker.conftest import Authority, Meet, Mosquitto, StartMosquitto

TOPICS = Topics("demo")
OWN, OTHER = "pi4-01", "pi4-02"
PATIENCE_S = 30.0
pytestmark = [
    pytest.mark.broker,
    # paho leaves the socket of a failed handshake to the garbage collector
    pytest.mark.filterwarnings("ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def broker(start: "StartMosquitto", shipped: dict[str, str]) -> "Mosquitto":
    return start(shipped["mosquitto.conf"], shipped["acl"])


FORBIDDEN_TO_WRITE = [
    TOPICS.up(OTHER),
    TOPICS.state(OTHER),
    TOPICS.down(OTHER),
    TOPICS.down(OWN),
    TOPICS.manifest,
    TOPICS.model,
    TOPICS.aggregator,
    Topics("another").up(OTHER),
]


def test_a_device_publishes_under_its_own_id_only(broker: "Mosquitto", meet: "Meet") -> None:
    aggregator = meet(broker, "aggregator", "fedeq/v1/#").connected()
    device = meet(broker, OWN).connected()
    device.says(*FORBIDDEN_TO_WRITE, TOPICS.state(OWN), TOPICS.up(OWN))
    assert aggregator.hears_until(TOPICS.up(OWN)) == [TOPICS.state(OWN), TOPICS.up(OWN)]


def test_a_device_reads_what_is_for_it_and_for_all(broker: "Mosquitto", meet: "Meet") -> None:
    """It asks for everything; SUBSCRIBE is granted and delivery is filtered."""
    device = meet(broker, OWN, "fedeq/v1/#").connected()
    aggregator = meet(broker, "aggregator").connected()
    for_others = (TOPICS.down(OTHER), TOPICS.up(OTHER), TOPICS.state(OTHER), "fedeq/v1/demo/global/notes")
    for_it = [TOPICS.manifest, TOPICS.model, TOPICS.aggregator, TOPICS.down(OWN)]
    aggregator.says(*for_others, *for_it)
    assert device.hears_until(TOPICS.down(OWN)) == for_it


def test_the_aggregator_reads_and_writes_everything(broker: "Mosquitto", meet: "Meet") -> None:
    aggregator = meet(broker, "aggregator", "fedeq/v1/#").connected()
    everything = [*FORBIDDEN_TO_WRITE, TOPICS.up(OWN)]
    aggregator.says(*everything)
    assert aggregator.hears_until(TOPICS.up(OWN)) == everything


def test_nobody_reads_or_writes_outside_the_tree(broker: "Mosquitto", meet: "Meet") -> None:
    aggregator = meet(broker, "aggregator", "#").connected()
    aggregator.says("elsewhere", TOPICS.manifest)
    assert aggregator.hears_until(TOPICS.manifest) == [TOPICS.manifest]


def test_the_name_given_in_connect_does_not_count(broker: "Mosquitto", meet: "Meet") -> None:
    """The certificate says who speaks, whatever client id it chooses."""
    aggregator = meet(broker, "aggregator", "fedeq/v1/#").connected()
    liar = meet(broker, OTHER, certificate=OWN).connected()
    liar.says(TOPICS.up(OTHER), TOPICS.up(OWN))
    assert aggregator.hears_until(TOPICS.up(OWN)) == [TOPICS.up(OWN)]


def test_a_stranger_is_refused(broker: "Mosquitto", meet: "Meet") -> None:
    assert isinstance(_first_event(meet, broker, "stranger"), Disconnected)


def test_somebody_without_a_certificate_is_refused(broker: "Mosquitto", authority: "Authority") -> None:
    _talk(broker, authority)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        _talk(broker, authority, certificate=None)


def test_tls_below_1_2_is_refused(broker: "Mosquitto", authority: "Authority") -> None:
    _talk(broker, authority, newest=ssl.TLSVersion.TLSv1_2)  # else the next line would prove nothing
    with (
        pytest.warns(DeprecationWarning, match="TLSv1_1"),
        pytest.raises(ssl.SSLError, match=r"alert protocol version|ALERT_PROTOCOL_VERSION"),
    ):
        _talk(broker, authority, newest=ssl.TLSVersion.TLSv1_1)


def _talk(
    broker: "Mosquitto",
    authority: "Authority",
    *,
    certificate: str | None = OWN,
    newest: ssl.TLSVersion = ssl.TLSVersion.MAXIMUM_SUPPORTED,
) -> None:
    """A handshake, and one read in which TLS 1.3 would say that it was refused."""
    context = ssl.create_default_context(cafile=str(authority.folder / "ca.crt"))
    context.set_ciphers("ALL:@SECLEVEL=0")  # or our own OpenSSL would refuse the old versions before mosquitto can
    context.minimum_version, context.maximum_version = ssl.TLSVersion.MINIMUM_SUPPORTED, newest
    if certificate is not None:
        context.load_cert_chain(authority.folder / f"{certificate}.crt", authority.folder / f"{certificate}.key")
    with (
        socket.create_connection(("127.0.0.1", broker.port), PATIENCE_S) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as link,
    ):
        link.sendall(b"\x10\x0f\x00\x04MQTT\x04\x02\x00\x3c\x00\x03who")  # CONNECT, MQTT 3.1.1
        assert link.recv(4) == b"\x20\x02\x00\x00"  # CONNACK, accepted


def test_a_revoked_device_is_refused_after_a_reload_and_the_others_are_not(
    broker: "Mosquitto", meet: "Meet", authority: "Authority"
) -> None:
    device = meet(broker, OWN).connected()
    authority.revoke(OWN)
    broker.read_again()
    device.leaves()
    # the list in force is the old one until mosquitto has come to the signal
    until(lambda: isinstance(_first_event(meet, broker, OWN), Disconnected), "a revoked certificate is refused")
    assert isinstance(_first_event(meet, broker, OTHER), Connected)


def _first_event(meet: "Meet", broker: "Mosquitto", name: str) -> Event:
    return meet(broker, name).events.get(timeout=PATIENCE_S)

"""mqtts with mutual TLS on a real mosquitto, with certificates made by openssl for the test."""

import getpass
import queue
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedeq_edge.transport.base import Arrived, Connected, Disconnected, Event
from fedeq_edge.transport.mqtt import Endpoint, MqttTransport

if TYPE_CHECKING:
    from tests.conftest import MakeMosquitto

PATIENCE_S = 30.0
pytestmark = [
    pytest.mark.broker,
    # paho leaves the socket of a failed handshake to the garbage collector
    pytest.mark.filterwarnings("ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"),
]


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def _key_and_certificate(folder: Path, name: str, *more: str) -> None:
    """NAME.key and NAME.pem, an elliptic key (quick) and a certificate for a day."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key")
    _openssl(folder, "req", "-x509", "-days", "1", *key, "-out", f"{name}.pem", "-subj", f"/CN={name}", *more)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a CA, a server and a client that it has signed, and a stranger of its own."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: apt-get install openssl")
    folder = tmp_path_factory.mktemp("certificates")
    _key_and_certificate(folder, "ca")
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE")
    _key_and_certificate(folder, "server", *signed, "-addext", "subjectAltName=IP:127.0.0.1")
    _key_and_certificate(folder, "client", *signed)
    _key_and_certificate(folder, "stranger")
    return folder


@pytest.fixture
def url(make_mosquitto: "MakeMosquitto", certificates: Path) -> str:
    """Of a mosquitto that wants to see a client's certificate."""
    here = certificates
    # started by root it would become another user, who may not read our temporary folder
    user = f"user {getpass.getuser()}\n"
    tls = f"cafile {here}/ca.pem\ncertfile {here}/server.pem\nkeyfile {here}/server.key\nrequire_certificate true\n"
    return make_mosquitto(user + tls).url.replace("mqtt://", "mqtts://")


@pytest.fixture
def events(url: str, certificates: Path, request: pytest.FixtureRequest) -> Iterator["queue.SimpleQueue[Event]"]:
    """Of a client with the CA and the certificate that the test names."""
    authority, name = request.param
    here = certificates
    endpoint = Endpoint(
        url=url, ca=f"{here}/{authority}.pem", certificate=f"{here}/{name}.pem", key=f"{here}/{name}.key"
    )
    arrived: queue.SimpleQueue[Event] = queue.SimpleQueue()
    transport = MqttTransport(endpoint, "me", ("t",))
    transport.start(arrived.put)
    transport.publish("t", b"dropped: not connected yet")
    yield arrived
    transport.stop()


@pytest.mark.parametrize("events", [("ca", "client")], indirect=True)
def test_both_sides_show_a_certificate_and_talk(events: "queue.SimpleQueue[Event]") -> None:
    assert isinstance(events.get(timeout=PATIENCE_S), Connected)


def test_large_payloads_pass_in_both_directions_at_once(url: str, certificates: Path) -> None:
    here = certificates
    endpoint = Endpoint(url=url, ca=f"{here}/ca.pem", certificate=f"{here}/client.pem", key=f"{here}/client.key")
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    transport = MqttTransport(endpoint, "me", ("t",))
    transport.start(events.put)
    assert isinstance(events.get(timeout=PATIENCE_S), Connected)
    sent = [bytes([number]) * 900_000 for number in range(12)]
    for payload in sent:
        transport.publish("t", payload)
    assert [events.get(timeout=PATIENCE_S) for _ in sent] == [Arrived("t", payload) for payload in sent]
    transport.stop()


@pytest.mark.parametrize(
    "events",
    [pytest.param(("stranger", "client"), id="broker unknown"), pytest.param(("ca", "stranger"), id="client unknown")],
    indirect=True,
)
def test_a_certificate_of_a_stranger_ends_the_connection(events: "queue.SimpleQueue[Event]") -> None:
    first = events.get(timeout=PATIENCE_S)
    assert isinstance(first, Disconnected)
    assert "broker 127.0.0.1" in first.reason

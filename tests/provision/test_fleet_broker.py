"""What a fleet makes, on a real mosquitto with the shipped configuration: who gets in, and who does not any more."""

import getpass
import os
import queue
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedeq_edge.provision import enrol
from fedeq_edge.provision.ca import Authority
from fedeq_edge.provision.fleet import Fleet, FleetSettings
from fedeq_edge.transport import broker as ladder
from fedeq_edge.transport.base import Connected, Disconnected, Event
from fedeq_edge.transport.mqtt import Endpoint, MqttTransport
from tests.conftest import listens, until

PATIENCE_S = 30.0
OWN, OTHER = "pi-01", "pi-02"
pytestmark = [
    pytest.mark.broker,
    # paho leaves the socket of a failed handshake to the garbage collector
    pytest.mark.filterwarnings("ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    settings = FleetSettings(name="plant", broker="mqtts://g", service="https://g", federation="plant")
    made = Fleet.init(tmp_path / "fleet", settings, ["127.0.0.1"])
    authority = Authority.open(made.folder / "ca")
    for device in (OWN, OTHER):
        made.add(device, "x86-64")
        etc = tmp_path / device
        certificate = authority.device_certificate(enrol.csr(etc, device), device)
        (etc / "device.crt").write_bytes(certificate)
    return made


@pytest.fixture
def broker(_mosquitto_installed: None, fleet: Fleet, tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """mosquitto with broker/mosquitto.conf and broker/acl, on the files of the gateway."""
    kit = Path(__file__).parents[2] / "broker"
    (tmp_path / "acl").write_text((kit / "acl").read_text())
    (tmp_path / "acl").chmod(0o600)
    gateway = fleet.folder / "gateway"
    changed = {
        "listener 8883": f"listener {ladder.free_port()} 127.0.0.1",
        "/etc/mosquitto/fedeq-edge/acl": f"{tmp_path}/acl",
        "/etc/mosquitto/fedeq-edge/": f"{gateway}/",
        "/var/lib/mosquitto/": f"{tmp_path}/",
    }
    text = (kit / "mosquitto.conf").read_text()
    for shipped, ours in changed.items():
        text = text.replace(shipped, ours)
    # started by root it would become another user, who may not read the fleet's folder
    (tmp_path / "mosquitto.conf").write_text(f"{text}\nuser {getpass.getuser()}\n")
    port = _port(tmp_path)
    with (tmp_path / "log").open("wb") as log:
        command = [str(ladder.mosquitto_path()), "-v", "-c", str(tmp_path / "mosquitto.conf")]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    until(lambda: listens(port) or process.poll() is not None, "mosquitto listens")
    assert process.poll() is None, (tmp_path / "log").read_text()
    yield process
    process.kill()
    process.wait()


def _port(folder: Path) -> int:
    line = next(line for line in (folder / "mosquitto.conf").read_text().splitlines() if line.startswith("listener"))
    return int(line.split()[1])


Meet = Callable[[str], Event]


@pytest.fixture
def meet(broker: "subprocess.Popen[bytes]", fleet: Fleet, tmp_path: Path) -> Iterator[Meet]:
    """What the broker says first to somebody with this certificate (without its ending)."""
    met: list[MqttTransport] = []
    ca = str(fleet.folder / "gateway" / "ca.crt")

    def one(path: str) -> Event:
        url, file = f"mqtts://127.0.0.1:{_port(tmp_path)}", tmp_path / path
        endpoint = Endpoint(url=url, ca=ca, certificate=f"{file}.crt", key=f"{file}.key")
        heard: queue.SimpleQueue[Event] = queue.SimpleQueue()
        met.append(MqttTransport(endpoint, f"client-{len(met)}", ("fedeq/v1/plant/agg/state",)))
        met[-1].start(heard.put)
        return heard.get(timeout=PATIENCE_S)

    yield one
    for transport in met:
        transport.stop()


def test_devices_and_aggregator_get_in_and_the_gateways_own_certificate_does_not(meet: Meet) -> None:
    assert isinstance(meet(f"{OWN}/device"), Connected)
    assert isinstance(meet("fleet/gateway/aggregator"), Connected)
    refused = meet("fleet/gateway/server")
    assert isinstance(refused, Disconnected)


def test_a_revoked_device_is_refused_once_the_broker_was_told_to_read_and_the_others_are_not(
    meet: Meet, fleet: Fleet, broker: "subprocess.Popen[bytes]"
) -> None:
    assert isinstance(meet(f"{OWN}/device"), Connected)
    fleet.revoke(OWN)
    os.kill(broker.pid, signal.SIGHUP)
    # the list in force is the old one until mosquitto has come to the signal
    until(lambda: isinstance(meet(f"{OWN}/device"), Disconnected), "a revoked certificate is refused")
    assert isinstance(meet(f"{OTHER}/device"), Connected)

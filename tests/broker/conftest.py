"""The shipped broker files on a real mosquitto, with certificates made by openssl."""

import getpass
import os
import queue
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedeq_edge.transport import broker as ladder
from fedeq_edge.transport.base import Arrived, Connected, Event
from fedeq_edge.transport.mqtt import Endpoint, MqttTransport
from tests.conftest import listens, until

PATIENCE_S = 30.0
PEOPLE = ("aggregator", "worker-1", "site-a", "pi4-01", "pi4-02")


@pytest.fixture
def shipped() -> dict[str, str]:
    """Text of every file in the folder broker/, by name."""
    return {path.name: path.read_text() for path in (Path(__file__).parents[2] / "broker").iterdir()}


class Authority:
    """A certificate authority in a folder: `ca.crt`, `crl.pem`, and NAME.crt with NAME.key for each it has signed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def found(self) -> None:
        """Make everything; it takes two seconds, so a test gets a copy."""
        (self.folder / "index.txt").touch()
        (self.folder / "crlnumber").write_text("01\n")
        (self.folder / "ca.cnf").write_text(
            "[ca]\ndefault_ca=own\n[own]\ndatabase=index.txt\ncrlnumber=crlnumber\ndefault_md=sha256\n"
            "default_crl_days=1\ncertificate=ca.crt\nprivate_key=ca.key\n"
        )
        self._make("ca")
        self.list_revoked()
        self._sign("server", "-addext", "subjectAltName=IP:127.0.0.1")
        for name in PEOPLE:
            self._sign(name)
        self._make("stranger")

    def revoke(self, name: str) -> None:
        """`name` stands in a new list of revoked certificates."""
        self._openssl("ca", "-config", "ca.cnf", "-revoke", f"{name}.crt")
        self.list_revoked()

    def list_revoked(self) -> None:
        """`crl.pem` is up to date."""
        self._openssl("ca", "-config", "ca.cnf", "-gencrl", "-out", "crl.pem")

    def _sign(self, name: str, *more: str) -> None:
        self._make(name, "-CA", "ca.crt", "-CAkey", "ca.key", "-addext", "basicConstraints=critical,CA:FALSE", *more)

    def _make(self, name: str, *more: str) -> None:
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key")
        self._openssl("req", "-x509", "-days", "1", *key, "-out", f"{name}.crt", "-subj", f"/CN={name}", *more)

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)


@pytest.fixture(scope="session")
def _founded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: apt-get install openssl")
    folder = tmp_path_factory.mktemp("authority")
    Authority(folder).found()
    return folder


@pytest.fixture
def authority(_founded: Path, tmp_path: Path) -> Authority:
    """One for each test, as a test may revoke what it has signed."""
    return Authority(shutil.copytree(_founded, tmp_path / "fedeq"))


class Mosquitto:
    """A mosquitto with a configuration of ours, its paths changed to the test's and nothing else."""

    def __init__(self, folder: Path, text: str, acl: str, authority: Authority) -> None:
        folder.mkdir()
        (folder / "acl").write_text(acl)
        (folder / "acl").chmod(0o600)  # else mosquitto warns
        self.port = ladder.free_port()
        self.log = folder / "log"
        changed = {
            "listener 8883": f"listener {self.port} 127.0.0.1",
            "/etc/mosquitto/fedeq-edge/acl": f"{folder}/acl",
            "/etc/mosquitto/fedeq-edge/": f"{authority.folder}/",
            "fleet-ca.crt": "ca.crt",  # one authority for both brokers
            "/var/lib/mosquitto/": f"{folder}/",
        }
        for shipped, ours in changed.items():
            text = text.replace(shipped, ours)
        # started by root it would become another user, who may not read our temporary folder
        (folder / "mosquitto.conf").write_text(f"{text}\nuser {getpass.getuser()}\n")
        with self.log.open("wb") as output:
            command = [str(ladder.mosquitto_path()), "-v", "-c", str(folder / "mosquitto.conf")]
            self._process = subprocess.Popen(command, stdout=output, stderr=output)

    def read_again(self) -> None:
        """What SIGHUP does: it reads its ACL and its list of revoked certificates."""
        os.kill(self._process.pid, signal.SIGHUP)

    def kill(self) -> None:
        """At once."""
        self._process.kill()
        self._process.wait()

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None


StartMosquitto = Callable[[str, str], Mosquitto]


@pytest.fixture
def start(_mosquitto_installed: None, tmp_path: Path, authority: Authority) -> Iterator[StartMosquitto]:
    """Start a mosquitto with this configuration and this ACL."""
    started: list[Mosquitto] = []

    def one(text: str, acl: str) -> Mosquitto:
        broker = Mosquitto(tmp_path / f"broker-{len(started)}", text, acl, authority)
        started.append(broker)
        until(lambda: listens(broker.port) or not broker.running, "mosquitto listens")
        assert broker.running, broker.log.read_text()
        return broker

    yield one
    for broker in started:
        broker.kill()


class Person:
    """Somebody with a certificate, connected; what arrives is kept in order."""

    def __init__(self, endpoint: Endpoint, name: str, subscriptions: tuple[str, ...]) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.transport = MqttTransport(endpoint, name, subscriptions)
        self.transport.start(self.events.put)

    def connected(self) -> "Person":
        """Once the subscriptions are in force."""
        first = self.events.get(timeout=PATIENCE_S)
        assert isinstance(first, Connected), first
        return self

    def says(self, *topics: str, retain: bool = False) -> None:
        """One message on each, in this order."""
        for topic in topics:
            self.transport.publish(topic, topic.encode(), retain=retain)

    def leaves(self) -> None:
        """Its broker has all that it said."""
        self.transport.stop()

    def hears_until(self, last: str) -> list[str]:
        """Topics of what arrives, up to a message on `last`."""
        heard: list[str] = []
        while not heard or heard[-1] != last:
            event = self.events.get(timeout=PATIENCE_S)
            if isinstance(event, Arrived):
                heard.append(event.topic)
        return heard


Meet = Callable[..., Person]


@pytest.fixture
def meet(authority: Authority) -> Iterator[Meet]:
    """Connect somebody by the certificate of that name to a broker."""
    met: list[Person] = []

    def one(broker: Mosquitto, name: str, *subscriptions: str, certificate: str | None = None) -> Person:
        file = f"{authority.folder}/{certificate or name}"
        endpoint = Endpoint(
            url=f"mqtts://127.0.0.1:{broker.port}",
            ca=f"{authority.folder}/ca.crt",
            certificate=f"{file}.crt",
            key=f"{file}.key",
        )
        met.append(Person(endpoint, name, subscriptions or (f"fedeq/v1/demo/dev/{name}/down",)))
        return met[-1]

    yield one
    for person in met:
        person.transport.stop()

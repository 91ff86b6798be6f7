"""Real parts that several test folders share: a mosquitto that can be killed, and a TCP proxy with faults."""

import contextlib
import logging
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from fedeq_edge.transport import broker as ladder
from fedeq_edge.transport.faults import Conditions, Direction, FaultProxy, Packet

PATIENCE_S = 30.0  # for what takes milliseconds on a machine that does nothing else
PUBLISH, PUBACK = 3, 4


def until(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """The condition holds, or the test fails saying what never came."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.01)


def listens(port: int) -> bool:
    """Whether something accepts connections there."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.5):
        return True
    return False


class RealMosquitto:
    """A mosquitto on a port of its own; after `kill` it comes back there with an empty memory."""

    def __init__(self, folder: Path, *, more: str = "") -> None:
        self.port = ladder.free_port()
        self._config = folder / "mosquitto.conf"
        self._config.write_text(ladder.mosquitto_config(self.port) + more)
        self._log = folder / "mosquitto.log"
        self.start()

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [str(ladder.mosquitto_path()), "-c", str(self._config)], stdout=output, stderr=output
            )
        try:
            until(lambda: listens(self.port) or self._process.poll() is not None, "mosquitto listens")
            assert self._process.poll() is None, self._log.read_text()
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    """A command that runs in this process sets up the program's log, whose stream is gone after its test."""
    logger = logging.getLogger("fedeq_edge")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture(scope="session")
def _mosquitto_installed() -> None:
    if ladder.mosquitto_path() is None:
        pytest.skip("mosquitto is not installed: apt-get install mosquitto")


@pytest.fixture
def mosquitto(_mosquitto_installed: None, tmp_path: Path) -> Iterator[RealMosquitto]:
    """A mosquitto for one test, to be maltreated."""
    broker = RealMosquitto(tmp_path)
    yield broker
    broker.kill()


@pytest.fixture(scope="module")
def shared_mosquitto(_mosquitto_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealMosquitto]:
    """A mosquitto for all tests of a module, which leave it alone."""
    broker = RealMosquitto(tmp_path_factory.mktemp("mosquitto"))
    yield broker
    broker.kill()


MakeMosquitto = Callable[[str], RealMosquitto]


@pytest.fixture
def make_mosquitto(_mosquitto_installed: None, tmp_path: Path) -> Iterator[MakeMosquitto]:
    """Start a mosquitto with more lines in its configuration."""
    with contextlib.ExitStack() as brokers:

        def make(more: str) -> RealMosquitto:
            broker = RealMosquitto(tmp_path, more=more)
            brokers.callback(broker.kill)
            return broker

        yield make


class WatchedProxy(FaultProxy):
    """A proxy before a broker that remembers every MQTT packet in the order in which they went in."""

    def __init__(self, target: int) -> None:
        super().__init__(target)
        self.seen: list[Packet] = []
        self.conditions = Conditions(tamper=self._watch)

    def _watch(self, packet: Packet) -> Sequence[Packet]:
        self.seen.append(packet)
        return (packet,)

    def bytes(self, direction: Direction, *kinds: int) -> int:
        """Bytes of the packets of these kinds."""
        return sum(len(one.raw) for one in self.seen if one.direction == direction and one.kind in kinds)

    def wait_for(self, direction: Direction, kind: int, count: int) -> None:
        """So many packets of this kind have come."""
        until(lambda: self.packets[direction, kind] >= count, f"{count} packets of type {kind} {direction}")


@pytest.fixture
def proxy(mosquitto: RealMosquitto) -> Iterator[WatchedProxy]:
    """A proxy before the mosquitto of the same test."""
    running = WatchedProxy(mosquitto.port)
    yield running
    running.stop()

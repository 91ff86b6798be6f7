"""Real parts that several test folders share: a mosquitto that can be killed, and a TCP proxy with faults."""

import asyncio
import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest

from fedeq_edge.transport import broker as ladder

T = TypeVar("T")
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


@dataclass(frozen=True, slots=True)
class Packet:
    """An MQTT packet that passed the proxy. kind: its control packet type; size: all of its bytes."""

    direction: Literal["up", "down"]
    kind: int
    size: int


@dataclass(slots=True)
class _Splitter:
    """Finds the packets in one direction's stream of bytes."""

    direction: Literal["up", "down"]
    pending: bytearray = field(default_factory=bytearray)

    def feed(self, chunk: bytes) -> list[Packet]:
        self.pending += chunk
        found = []
        while (size := self._size()) is not None:
            found.append(Packet(self.direction, self.pending[0] >> 4, size))
            del self.pending[:size]
        return found

    def _size(self) -> int | None:
        remaining = 0
        for position, byte in enumerate(self.pending[1:5]):
            remaining |= (byte & 0x7F) << (7 * position)
            if not byte & 0x80:
                size = 2 + position + remaining
                return size if len(self.pending) >= size else None
        return None


class FaultProxy:
    """A TCP proxy before a broker that sees every MQTT packet, and can cut or stall all connections."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.packets: list[Packet] = []
        self._writers: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy")
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Every connection is reset on both sides; new ones are welcome."""
        self._run(self._abort())

    def stall(self) -> None:
        """Connections stay open and nothing passes any more: a black hole."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def bytes(self, direction: Literal["up", "down"], *kinds: int) -> int:
        """Bytes of the packets of these kinds that have passed."""
        return sum(packet.size for packet in self.packets if packet.direction == direction and packet.kind in kinds)

    def wait_for(self, direction: Literal["up", "down"], kind: int, count: int) -> None:
        """So many packets of this kind have passed."""
        until(
            lambda: sum((packet.direction, packet.kind) == (direction, kind) for packet in self.packets) >= count,
            f"{count} packets of type {kind} {direction}",
        )

    def stop(self) -> None:
        self._run(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_S)

    async def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _finish(self) -> None:
        self._server.close()
        self._flowing.set()
        await self._abort()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        pair = {writer, far_writer}
        self._writers |= pair
        pumps = (self._pump(reader, far_writer, "up"), self._pump(far_reader, writer, "down"))
        await asyncio.gather(*pumps)
        self._writers -= pair

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Literal["up", "down"]
    ) -> None:
        splitter = _Splitter(direction)
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(65536):
                await self._flowing.wait()
                self.packets.extend(splitter.feed(chunk))
                writer.write(chunk)
                await writer.drain()
        writer.close()


@pytest.fixture
def proxy(mosquitto: RealMosquitto) -> Iterator[FaultProxy]:
    """A proxy before the mosquitto of the same test."""
    running = FaultProxy(mosquitto.port)
    yield running
    running.stop()

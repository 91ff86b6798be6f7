"""A bad network on purpose: a TCP proxy before a broker that is slow, silent, cut, or changes the packets that pass.

For `fedeq chaos` and the tests. It needs no rights and no kernel module (tc netem does). Without faults it forwards
bytes as they come; what it counts are MQTT packets, which it finds by their fixed headers (MQTT 5.0, section 2.1).

Theory of operation
-------------------
Each connection has two pipes, up (client to broker) and down, each with the link's rate to itself. What is read waits
for the rate before the next read, and then its latency in the air. The sockets' receive buffers are small, so that a
slow link pushes back on its sender as a radio does, and a cut loses what is on the way and not the megabytes that
loopback would have swallowed.
A `Tamper` sees packets instead of bytes: it returns what to pass on in place of each.
"""

import asyncio
import contextlib
import itertools
import math
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeVar

from fedeq_edge.errors import TransportError

Direction = Literal["up", "down"]
T = TypeVar("T")

PUBLISH: Final = 3
_CONNECT: Final = 1
_LARGEST_READ: Final = 4096  # a slow link's grain: 64 ms at 64 kB/s
_RECEIVE_BUFFER: Final = 16_384  # the kernel doubles it; smaller ones make loopback crawl
_AIR_READS: Final = 256  # a megabyte on the way: more than a link with a rate or a latency of ours ever holds
_PATIENCE_S: Final = 30.0  # for the proxy's own thread, which never waits for anybody


@dataclass(frozen=True, slots=True)
class Packet:
    """One MQTT control packet on its way. raw: all of its bytes. version: 4 (MQTT 3.1.1) or 5, as its CONNECT said."""

    direction: Direction
    raw: bytes
    version: int = 5

    @property
    def kind(self) -> int:
        """Control packet type; PUBLISH is 3."""
        return self.raw[0] >> 4

    @property
    def connect_version(self) -> int:
        """Of a CONNECT: the byte after the protocol's name (MQTT 5.0, section 3.1.2.2)."""
        return self.raw[self._variable_header + len(b"\x00\x04MQTT")]

    @property
    def topic(self) -> str:
        """Of a PUBLISH."""
        start = self._variable_header
        return self.raw[start + 2 : start + 2 + self._topic_bytes].decode()

    @property
    def payload(self) -> bytes:
        """Of a PUBLISH."""
        return self.raw[self._payload_start :]

    def with_payload(self, payload: bytes) -> "Packet":
        """The same PUBLISH with other content."""
        rest = self.raw[self._variable_header : self._payload_start] + payload
        return Packet(self.direction, self.raw[:1] + _variable_length(len(rest)) + rest, self.version)

    @property
    def _variable_header(self) -> int:
        return 2 + next(i for i in range(4) if not self.raw[1 + i] & 0x80)

    @property
    def _topic_bytes(self) -> int:
        start = self._variable_header
        return int.from_bytes(self.raw[start : start + 2], "big")

    @property
    def _payload_start(self) -> int:
        start = self._variable_header + 2 + self._topic_bytes + (2 if self.raw[0] & 0x06 else 0)
        if self.version < 5:
            return start
        properties, taken = _read_length(self.raw[start : start + 4]) or (0, 1)
        return start + taken + properties


Tamper = Callable[[Packet], Sequence[Packet]]
"""What passes in place of a packet: nothing, itself, several, others. Called on the proxy's thread; must not block."""


def pass_on(packet: Packet) -> Sequence[Packet]:
    """The packet itself."""
    return (packet,)


def concerns_devices(packet: Packet) -> bool:
    """Whether it is a PUBLISH on a device's up or down topic: what is said again where it is lost."""
    return packet.kind == PUBLISH and packet.topic.endswith(("/up", "/down"))


def duplicate(packet: Packet) -> Sequence[Packet]:
    """Every PUBLISH passes twice."""
    return (packet, packet) if packet.kind == PUBLISH else (packet,)


@dataclass(slots=True)
class Corrupt:
    """Of the devices' PUBLISH packets a `share` is damaged: a bit is flipped, the end cut off, or nothing left."""

    share: float
    seed: int = 0
    damaged: int = 0
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def __call__(self, packet: Packet) -> Sequence[Packet]:
        """The packet, or a damaged one of the same topic."""
        if not (concerns_devices(packet) and packet.payload and self._random.random() < self.share):
            return (packet,)
        self.damaged += 1
        return (packet.with_payload(self._damage(bytearray(packet.payload))),)

    def _damage(self, payload: bytearray) -> bytes:
        way = self._random.randrange(3)
        if way == 0:
            payload[self._random.randrange(len(payload))] ^= 1 << self._random.randrange(8)
            return bytes(payload)
        return bytes(payload[: self._random.randrange(len(payload))]) if way == 1 else b""


@dataclass(slots=True)
class Splitter:
    """Finds the packets in one direction's stream of bytes; a CONNECT tells it the version."""

    direction: Direction
    version: int = 5
    _pending: bytearray = field(default_factory=bytearray)

    def feed(self, chunk: bytes) -> list[Packet]:
        """The packets that these bytes complete."""
        self._pending += chunk
        found = []
        while (size := self._size()) is not None:
            packet = Packet(self.direction, bytes(self._pending[:size]), self.version)
            if packet.kind == _CONNECT:
                self.version = packet.connect_version  # before the next packet, which may be in the same chunk
            found.append(packet)
            del self._pending[:size]
        return found

    def _size(self) -> int | None:
        told = _read_length(self._pending[1:5])
        if told is None or len(self._pending) < 1 + told[1] + told[0]:
            return None
        return 1 + told[1] + told[0]


@dataclass(frozen=True, slots=True, order=True)
class _InAir:
    """Bytes on their way, by the time when they come out. number: tells those of the same moment apart."""

    out_at: float
    number: int
    chunk: bytes = field(compare=False)


@dataclass(slots=True)
class _Pipe:
    """One direction of a connection. air: what is on the way; what comes out at the end of time ends it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    splitter: Splitter
    air: "asyncio.PriorityQueue[_InAir]" = field(default_factory=lambda: asyncio.PriorityQueue(_AIR_READS))
    numbers: "itertools.count[int]" = field(default_factory=itertools.count)


@dataclass(slots=True, eq=False)
class _Connection:
    """A client's connection and ours to the broker in its name. silent: the client is not told of the broker's end."""

    up: _Pipe
    down: _Pipe
    silent: bool = False

    def abort(self) -> None:
        """Both sides are reset."""
        self.up.writer.transport.abort()
        self.down.writer.transport.abort()


@dataclass(slots=True)
class Conditions:
    """The link as it is now; may be changed at any time.

    rate: bytes a second and direction, None without a limit. jitter_s: what devices publish takes up to so much longer,
    each message for itself, so that they overtake each other.
    """

    rate: float | None = None
    latency_s: float = 0.0
    jitter_s: float = 0.0
    tamper: Tamper | None = None


class FaultProxy:
    """A proxy on a loopback port of its own, on a thread of its own, until `stop`.

    target: the broker's port. `sent` and `passed` count bytes that went into the link and that came out of it, by
    direction, all connections together; `packets` counts packets by (direction, control packet type) as they go in.
    """

    def __init__(self, target: int, *, host: str = "127.0.0.1") -> None:
        self.conditions = Conditions()
        self.sent: Counter[Direction] = Counter()
        self.passed: Counter[Direction] = Counter()
        self.packets: Counter[tuple[Direction, int]] = Counter()
        self.cuts = 0
        self._address = (host, target)
        self._plugged = True
        self._random = random.Random(0)
        self._connections: set[_Connection] = set()
        self._flapping: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault proxy", daemon=True)
        self._thread.start()
        self._server = self._call(self._listen())
        self.port: int = self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        """Where a client finds the broker through this link."""
        return f"mqtt://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return len(self._connections)

    # Faults

    def cut(self) -> None:
        """Every connection is reset on both sides; new ones are welcome."""
        self._call(self._cut())

    def unplug(self) -> None:
        """Every connection is reset, and new ones are too, until `plug`."""
        self._plugged = False
        self.cut()

    def plug(self) -> None:
        """Connections are welcome again."""
        self._plugged = True

    def stall(self) -> None:
        """Connections stay open and nothing passes any more: a black hole, until `release`."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def release(self) -> None:
        """What a stall has held passes, and what comes after it."""
        self._loop.call_soon_threadsafe(self._flowing.set)

    def half_open(self) -> None:
        """The broker's side of every connection is reset, and the client never hears of it."""
        self._call(self._abandon())

    def flap(self, period_s: float | None) -> None:
        """From now on a cut every so many seconds; None ends it."""
        self._call(self._flap(period_s))

    def stop(self) -> None:
        """Everything is closed and the thread has ended."""
        self._call(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # On the proxy's thread

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_PATIENCE_S)

    async def _listen(self) -> asyncio.Server:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)  # connections inherit it
        try:
            listener.bind(("127.0.0.1", 0))
        except OSError as error:
            raise TransportError(f"fault proxy: no loopback port is free ({error.strerror})") from error
        return await asyncio.start_server(self._serve, sock=listener, limit=_LARGEST_READ)

    async def _cut(self) -> None:
        self.cuts += 1
        for connection in self._connections:
            connection.abort()

    async def _abandon(self) -> None:
        for connection in self._connections:
            connection.silent = True
            connection.up.writer.transport.abort()

    async def _flap(self, period_s: float | None) -> None:
        if self._flapping is not None:
            self._flapping.cancel()
            self._flapping = None
        if period_s is not None:
            self._flapping = asyncio.create_task(self._flap_for_ever(period_s))

    async def _flap_for_ever(self, period_s: float) -> None:
        while True:
            await asyncio.sleep(period_s)
            await self._cut()

    async def _finish(self) -> None:
        self._server.close()
        self._flowing.set()
        await self._flap(None)
        await self._cut()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        cuts = self.cuts
        if not self._plugged:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._address, limit=_LARGEST_READ)
        except OSError:
            writer.transport.abort()
            return
        for end in (writer, far_writer):
            end.transport.set_write_buffer_limits(0)
        connection = _Connection(
            up=_Pipe(reader, far_writer, Splitter("up")), down=_Pipe(far_reader, writer, Splitter("down"))
        )
        self._connections.add(connection)
        try:
            if self.cuts == cuts:  # else it has been cut while we connected
                await self._carry(connection)
        finally:
            self._connections.discard(connection)
            connection.abort()

    async def _carry(self, connection: _Connection) -> None:
        """Both directions until their ends."""
        ways = (self._take_in, self._let_out)
        await asyncio.gather(*(way(connection, pipe) for pipe in (connection.up, connection.down) for way in ways))

    async def _take_in(self, connection: _Connection, pipe: _Pipe) -> None:
        """What the sender has written enters the link, as fast as the link takes it."""
        with contextlib.suppress(ConnectionError):
            while chunk := await pipe.reader.read(_LARGEST_READ):
                await self._flowing.wait()
                self.sent[pipe.splitter.direction] += len(chunk)
                if rate := self.conditions.rate:
                    await asyncio.sleep(len(chunk) / rate)
                for delay_s, part in self._altered(chunk, connection, pipe.splitter):
                    await pipe.air.put(_InAir(self._loop.time() + delay_s, next(pipe.numbers), part))
        await pipe.air.put(_InAir(math.inf, next(pipe.numbers), b""))

    def _altered(self, chunk: bytes, connection: _Connection, splitter: Splitter) -> Iterator[tuple[float, bytes]]:
        """(seconds on the way, bytes) of the chunk, or of what becomes of the packets that it completes."""
        packets = splitter.feed(chunk)
        for packet in packets:
            self.packets[packet.direction, packet.kind] += 1
        connection.down.splitter.version = connection.up.splitter.version
        now = self.conditions
        if now.tamper is None and not now.jitter_s:
            yield now.latency_s, chunk
            return
        for packet in packets:
            for passed in (now.tamper or pass_on)(packet):
                jitter_s = self._random.uniform(0.0, now.jitter_s) if concerns_devices(passed) else 0.0
                yield now.latency_s + jitter_s, passed.raw

    async def _let_out(self, connection: _Connection, pipe: _Pipe) -> None:
        """What is in the air comes out when its time has come, and the receiver hears of the sender's end."""
        broken = False  # then the rest is lost, as on the way to a machine that is off
        while (item := await pipe.air.get()).out_at < math.inf:
            try:
                if not broken:
                    await self._come_out(pipe, item)
            except ConnectionError:
                broken = True
        if not connection.silent:
            pipe.writer.close()

    async def _come_out(self, pipe: _Pipe, item: _InAir) -> None:
        if (early_s := item.out_at - self._loop.time()) > 0.0:
            await asyncio.sleep(early_s)
        await self._flowing.wait()
        self.passed[pipe.splitter.direction] += len(item.chunk)
        pipe.writer.write(item.chunk)
        await pipe.writer.drain()


def _variable_length(value: int) -> bytes:
    """A variable byte integer (MQTT 5.0, section 1.5.5)."""
    encoded = bytearray()
    while True:
        value, low = divmod(value, 128)
        encoded.append(low | (0x80 if value else 0))
        if not value:
            return bytes(encoded)


def _read_length(encoded: bytes | bytearray) -> tuple[int, int] | None:
    """(value, bytes taken) of a variable byte integer, None where it is not complete."""
    value = 0
    for position, byte in enumerate(encoded):
        value |= (byte & 0x7F) << (7 * position)
        if not byte & 0x80:
            return value, position + 1
    return None

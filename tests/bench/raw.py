"""Thousands of MQTT 3.1.1 connections in one selector loop, without paho: what a broker needs, not its clients."""

import contextlib
import os
import resource
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.bench.processes import cpu_seconds, memory_bytes

PATIENCE_S = 120.0
PUBLISH, PUBACK = 3, 4
_READ_BYTES = 262_144
_DOWN, _UP = "load/down", "load/up"


def wait_until_it_listens(port: int) -> None:
    """A server accepts connections on this loopback port."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.02)
    raise TimeoutError(f"nothing listens on port {port}")


def _packet(kind: int, rest: bytes) -> bytes:
    length, more = b"", len(rest)
    while True:
        more, digit = divmod(more, 128)
        length += bytes([digit | (0x80 if more else 0)])
        if not more:
            return bytes([kind]) + length + rest


def _text(text: str) -> bytes:
    return struct.pack(">H", len(text)) + text.encode()


def _connect(name: str) -> bytes:
    return _packet(0x10, _text("MQTT") + struct.pack(">BBH", 4, 2, 600) + _text(name))


def _subscribe(topic_filter: str) -> bytes:
    return _packet(0x82, struct.pack(">H", 1) + _text(topic_filter) + b"\x01")


def _publish(topic: str, payload: bytes, *, retain: bool = False) -> bytes:
    return _packet(0x33 if retain else 0x32, _text(topic) + struct.pack(">H", 1) + payload)


@dataclass(slots=True)
class Connection:
    """One client: what it has to send, and what of a packet has come."""

    link: socket.socket
    outgoing: deque[memoryview] = field(default_factory=deque)
    incoming: bytearray = field(default_factory=bytearray)

    @classmethod
    def open(cls, port: int, name: str, topic_filter: str) -> "Connection":
        """Connected and subscribed."""
        link = socket.create_connection(("127.0.0.1", port))
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for request, answer_bytes in ((_connect(name), 4), (_subscribe(topic_filter), 5)):
            link.sendall(request)
            link.recv(answer_bytes, socket.MSG_WAITALL)
        link.setblocking(False)
        return cls(link)

    def send(self, packet: bytes) -> None:
        """Queue it."""
        self.outgoing.append(memoryview(packet))

    def write(self) -> None:
        """As much as the socket takes."""
        with contextlib.suppress(BlockingIOError):
            while self.outgoing:
                rest = self.outgoing[0][self.link.send(self.outgoing[0]) :]
                if rest:
                    self.outgoing[0] = rest
                else:
                    self.outgoing.popleft()

    def read(self) -> int:
        """Take what has come and acknowledge it; how many PUBLISH packets it was."""
        count = 0
        with contextlib.suppress(BlockingIOError):
            while chunk := self.link.recv(_READ_BYTES):
                self.incoming += chunk
                count += self._take_packets()
                if len(chunk) < _READ_BYTES:
                    return count
            raise ConnectionError("the broker has closed a connection")
        return count

    def _take_packets(self) -> int:
        count = 0
        while (span := _span(self.incoming)) is not None:
            start, end = span
            if self.incoming[0] >> 4 == PUBLISH:
                count += 1
                topic_bytes = struct.unpack_from(">H", self.incoming, start)[0]
                at = start + 2 + topic_bytes
                self.send(_packet(PUBACK << 4, bytes(self.incoming[at : at + 2])))
            del self.incoming[:end]
        return count


def _span(incoming: bytearray) -> tuple[int, int] | None:
    """(start of what follows the fixed header, end) of the first packet, None while it is not whole."""
    remaining = 0
    for position, byte in enumerate(incoming[1:5]):
        remaining |= (byte & 0x7F) << (7 * position)
        if not byte & 0x80:
            start = 2 + position
            return (start, start + remaining) if len(incoming) >= start + remaining else None
    return None


def _pump(connections: list[Connection], wanted: int) -> None:
    """Until so many PUBLISH packets have come and all is sent."""
    got, deadline = 0, time.monotonic() + PATIENCE_S
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection.link, selectors.EVENT_READ, connection)
            connection.write()
        while got < wanted or any(connection.outgoing for connection in connections):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{got} of {wanted} messages in {PATIENCE_S:.0f} s")
            for key, _ in selector.select(0.05):
                got += key.data.read()
            for connection in connections:
                connection.write()


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the broker needed. up and down: CPU per megabyte delivered."""

    down_ms_per_mb: float
    up_ms_per_mb: float
    connect_ms: float
    kb_a_connection: float
    peak_mb: float


def measure(port: int, pid: int, *, clients: int, size: int) -> Load:
    """A round: one retained payload down to all, then one up from each, all at once."""
    _allow_open_files(2 * clients + 100)
    rest = memory_bytes(pid, "VmRSS")
    aggregator, before = Connection.open(port, "aggregator", f"{_UP}/#"), cpu_seconds(pid)
    fleet = [Connection.open(port, f"d{number}", _DOWN) for number in range(clients)]
    connect_s = cpu_seconds(pid) - before
    resting = memory_bytes(pid, "VmRSS")
    payload, everybody, megabytes = os.urandom(size), [aggregator, *fleet], clients * size / 1e6
    aggregator.send(_publish(_DOWN, payload, retain=True))
    down_s = _cost(pid, lambda: _pump(everybody, clients))
    for number, connection in enumerate(fleet):
        connection.send(_publish(f"{_UP}/{number}", payload))
    up_s = _cost(pid, lambda: _pump(everybody, clients))
    for connection in everybody:
        connection.link.close()
    return Load(
        down_ms_per_mb=1e3 * down_s / megabytes,
        up_ms_per_mb=1e3 * up_s / megabytes,
        connect_ms=1e3 * connect_s / clients,
        kb_a_connection=(resting - rest) / clients / 1e3,
        peak_mb=memory_bytes(pid, "VmHWM") / 1e6,
    )


def _cost(pid: int, work: Callable[[], None]) -> float:
    before = cpu_seconds(pid)
    work()
    return cpu_seconds(pid) - before


def _allow_open_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))

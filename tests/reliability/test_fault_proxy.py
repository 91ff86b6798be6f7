"""The fault proxy does what it says and nothing else: every other test of this folder stands on it."""

import queue
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from fedeq_edge.transport import faults
from fedeq_edge.transport.faults import Corrupt, FaultProxy, Packet, duplicate

PATIENCE_S = 10.0


class Far:
    """A server that keeps what it gets and lets a test answer."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self.connections: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                self.connections.put(self._server.accept()[0])
            except OSError:
                return

    def accepted(self) -> socket.socket:
        connection = self.connections.get(timeout=PATIENCE_S)
        connection.settimeout(PATIENCE_S)
        return connection

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join()
        while not self.connections.empty():
            self.connections.get().close()


@pytest.fixture
def far() -> Iterator[Far]:
    server = Far()
    yield server
    server.close()


@pytest.fixture
def proxy(far: Far) -> Iterator[FaultProxy]:
    running = FaultProxy(far.port)
    yield running
    running.stop()


def connected(proxy: FaultProxy) -> socket.socket:
    near = socket.create_connection(("127.0.0.1", proxy.port), PATIENCE_S)
    near.settimeout(PATIENCE_S)
    return near


def received(end: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer where the end came before."""
    found = b""
    while len(found) < size and (chunk := end.recv(size - len(found))):
        found += chunk
    return found


def ended(end: socket.socket) -> bool:
    """Whether nothing comes any more because the connection is over."""
    try:
        return end.recv(1) == b""
    except ConnectionResetError:
        return True


def connect_packet(level: int) -> bytes:
    return b"\x10\x0c\x00\x04MQTT" + bytes((level, 2, 0, 60, 0, 0))


def publish(topic: str, payload: bytes, *, level: int = 5, qos: int = 1) -> bytes:
    rest = len(topic).to_bytes(2, "big") + topic.encode() + (b"\x00\x07" if qos else b"")
    if level == 5:
        rest += b"\x03\x26\x00\x00"  # three bytes of properties
    length = len(rest) + len(payload)
    assert length < 128**2
    return bytes((0x30 | qos << 1, length % 128 | 0x80, length // 128)) + rest + payload


def test_without_faults_bytes_pass_both_ways_and_are_counted(far: Far, proxy: FaultProxy) -> None:
    sent = random.Random(0).randbytes(300_000)
    with connected(proxy) as near, far.accepted() as end:
        threading.Thread(target=near.sendall, args=(sent,), daemon=True).start()
        assert received(end, len(sent)) == sent
        end.sendall(b"answer")
        assert received(near, 6) == b"answer"
        assert proxy.connections == 1
    assert proxy.sent == {"up": 300_000, "down": 6}


def test_an_end_is_passed_on_to_the_other_side(far: Far, proxy: FaultProxy) -> None:
    with connected(proxy) as near, far.accepted() as end:
        end.sendall(b"last words")
        end.close()
        assert received(near, 100) == b"last words"


def test_a_cut_resets_both_sides_and_the_next_connection_is_sound(far: Far, proxy: FaultProxy) -> None:
    with connected(proxy) as near, far.accepted() as end:
        proxy.cut()
        assert ended(near)
        assert ended(end)
    with connected(proxy) as near, far.accepted() as end:
        near.sendall(b"again")
        assert received(end, 5) == b"again"


def test_an_unplugged_link_takes_nobody_until_it_is_plugged_in(far: Far, proxy: FaultProxy) -> None:
    proxy.unplug()
    with connected(proxy) as near:
        assert ended(near)
    proxy.plug()
    with connected(proxy) as near, far.accepted() as end:
        near.sendall(b"x")
        assert received(end, 1) == b"x"


def test_a_stall_holds_what_is_sent_and_its_release_lets_it_pass(far: Far, proxy: FaultProxy) -> None:
    with connected(proxy) as near, far.accepted() as end:
        near.sendall(b"before")
        assert received(end, 6) == b"before"
        proxy.stall()
        near.sendall(b"held")
        end.settimeout(0.2)
        with pytest.raises(TimeoutError):
            end.recv(1)
        end.settimeout(PATIENCE_S)
        proxy.release()
        assert received(end, 4) == b"held"


def test_a_half_open_connection_looks_sound_to_the_client_alone(far: Far, proxy: FaultProxy) -> None:
    with connected(proxy) as near, far.accepted() as end:
        near.sendall(b"x")
        assert received(end, 1) == b"x"
        proxy.half_open()
        assert ended(end)
        near.sendall(b"into the void")
        near.settimeout(0.2)
        with pytest.raises(TimeoutError):
            near.recv(1)


def test_flapping_cuts_until_it_is_told_to_end(far: Far, proxy: FaultProxy) -> None:
    proxy.flap(0.05)
    for _ in range(3):
        with connected(proxy) as near:
            assert ended(near)
    proxy.flap(None)
    cuts = proxy.cuts
    assert cuts >= 3
    while not far.connections.empty():
        far.connections.get().close()
    with connected(proxy) as near, far.accepted() as end:
        near.sendall(b"x")
        assert received(end, 1) == b"x"
    assert proxy.cuts == cuts


def test_a_slow_link_takes_its_time(far: Far, proxy: FaultProxy) -> None:
    proxy.conditions.rate = 200_000.0
    with connected(proxy) as near, far.accepted() as end:
        began = time.monotonic()
        threading.Thread(target=near.sendall, args=(bytes(60_000),), daemon=True).start()
        received(end, 60_000)
        assert time.monotonic() - began >= 0.28  # 0.3 s at that rate; a lower bound holds on any machine
        assert proxy.sent["up"] == proxy.passed["up"] == 60_000


def test_a_far_link_delays_and_does_not_slow_down(far: Far, proxy: FaultProxy) -> None:
    proxy.conditions.latency_s = 0.1
    with connected(proxy) as near, far.accepted() as end:
        near.sendall(bytes(40_000))
        received(end, 40_000)
        assert proxy.passed["up"] == 40_000
        began = time.monotonic()
        near.sendall(b"x")
        received(end, 1)
        assert time.monotonic() - began >= 0.1


@pytest.mark.parametrize("level", [4, 5])
@pytest.mark.parametrize("qos", [0, 1])
def test_a_tamper_sees_topic_and_payload_of_every_publish(far: Far, proxy: FaultProxy, level: int, qos: int) -> None:
    seen: list[Packet] = []

    def note(packet: Packet) -> tuple[Packet, ...]:
        seen.append(packet)
        return (packet,)

    proxy.conditions.tamper = note
    stream = connect_packet(level) + publish("a/up", b"payload", level=level, qos=qos) * 2
    with connected(proxy) as near, far.accepted() as end:
        for byte in stream:
            near.sendall(bytes((byte,)))
        assert received(end, len(stream)) == stream
    assert [packet.kind for packet in seen] == [1, 3, 3]
    assert {(packet.topic, packet.payload) for packet in seen[1:]} == {("a/up", b"payload")}
    assert proxy.packets["up", faults.PUBLISH] == 2


def test_a_changed_payload_makes_a_sound_packet() -> None:
    packet = Packet("up", publish("a/up", b"short"))
    longer = packet.with_payload(b"x" * 300)
    assert longer.raw == publish("a/up", b"x" * 300)
    assert longer.with_payload(b"").payload == b""


def test_duplicate_repeats_publishes_alone() -> None:
    packet, ping = Packet("up", publish("t", b"x")), Packet("up", b"\xc0\x00")
    assert duplicate(packet) == (packet, packet)
    assert duplicate(ping) == (ping,)


def test_on_a_jittery_link_devices_messages_overtake_each_other_and_all_arrive(far: Far, proxy: FaultProxy) -> None:
    proxy.conditions.jitter_s = 0.1
    packets = [publish("x/up", bytes((number,))) for number in range(30)]
    with connected(proxy) as near, far.accepted() as end:
        near.sendall(connect_packet(5) + b"".join(packets))
        found = received(end, len(connect_packet(5)) + sum(map(len, packets)))
    arrived = faults.Splitter("up").feed(found)
    assert arrived[0].raw == connect_packet(5)
    payloads = [packet.payload[0] for packet in arrived[1:]]
    assert sorted(payloads) == list(range(30))
    assert payloads != sorted(payloads)


def test_corrupt_damages_its_share_of_what_devices_say_and_stays_sound_mqtt() -> None:
    corrupt = Corrupt(0.5, seed=1)
    packet, state = Packet("up", publish("x/up", b"payload" * 10)), Packet("up", publish("x/state", b"payload"))
    results = [corrupt(packet)[0] for _ in range(200)]
    damaged = [result for result in results if result != packet]
    assert len(damaged) == corrupt.damaged
    assert 60 < corrupt.damaged < 140
    assert {result.topic for result in damaged} == {"x/up"}
    assert {len(result.payload) for result in damaged} >= {0, 70}
    assert all(corrupt(state) == (state,) for _ in range(50))

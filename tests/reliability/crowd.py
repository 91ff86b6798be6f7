"""Hundreds of devices in one thread: the real client machines on bare MQTT 3.1.1 connections at QoS 0."""

import asyncio
import functools
import threading
import time
from collections.abc import Coroutine
from typing import Any

from fedeq_edge.protocol.actions import ClientAction, Finished, Personalise, Publish, Train
from fedeq_edge.protocol.client import Client, Identity, Usage
from fedeq_edge.protocol.state import ClientState
from fedeq_edge.training.step import LocalResult, LocalTask
from fedeq_edge.transport.faults import PUBLISH, Splitter
from fedeq_edge.wire.topics import Topics
from tests.protocol.fleet import result_of
from tests.reliability.parts import difference

PATIENCE_S = 60.0
_CONNACK, _SUBACK = 2, 9
_TICK_S = 1.0


class _Device(asyncio.Protocol):
    """One connection and its machine; a training takes no time, and nothing is kept on disk."""

    def __init__(self, name: str, topics: Topics) -> None:
        self.name, self._topics = name, topics
        self.machine = Client(Identity(device=name, boot="b", samples=10), topics, ClientState())
        self.finished = False
        self._splitter = Splitter("down", version=4)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        name = self.name.encode()
        transport.write(_packet(0x10, b"\x00\x04MQTT\x04\x02\x00\x3c" + _text(name)))

    def data_received(self, data: bytes) -> None:
        for packet in self._splitter.feed(data):
            if packet.kind == _CONNACK:
                self._subscribe()
            elif packet.kind == _SUBACK:
                self.carry_out(self.machine.connected(time.monotonic()))
            elif packet.kind == PUBLISH:
                self.carry_out(self.machine.arrived(packet.topic, packet.payload, time.monotonic()))

    def carry_out(self, actions: list[ClientAction]) -> None:
        for action in actions:
            if isinstance(action, Publish):
                retain = 1 if action.retain else 0
                self.transport.write(_packet(0x30 | retain, _text(action.topic.encode()) + action.payload))
            elif isinstance(action, Train):
                self.carry_out(self.machine.trained(self._result(action.task), Usage(), time.monotonic()))
            elif isinstance(action, Personalise):
                self.carry_out(self.machine.failed("no model here", time.monotonic()))
            elif isinstance(action, Finished):
                self.finished = True

    def _result(self, task: LocalTask) -> LocalResult:
        return result_of(task, difference(self.name, task))

    def _subscribe(self) -> None:
        wanted = (self._topics.manifest, self._topics.model, self._topics.aggregator, self._topics.down(self.name))
        filters = b"".join(_text(topic.encode()) + b"\x00" for topic in wanted)
        self.transport.write(_packet(0x82, b"\x00\x01" + filters))


class Crowd:
    """Devices d0, d1, ... of one federation on a thread of their own, until `leave`."""

    def __init__(self, port: int, federation: str, count: int) -> None:
        topics = Topics(federation)
        self.devices = [_Device(f"d{number}", topics) for number in range(count)]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="crowd")
        self._thread.start()
        self._call(self._connect(port))
        self._ticking = asyncio.run_coroutine_threadsafe(self._tick(), self._loop)

    def leave(self) -> None:
        self._ticking.cancel()
        self._call(self._disconnect())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE_S)

    async def _connect(self, port: int) -> None:
        for device in self.devices:
            await self._loop.create_connection(functools.partial(_itself, device), "127.0.0.1", port)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            for device in self.devices:
                device.carry_out(device.machine.tick(time.monotonic()))

    async def _disconnect(self) -> None:
        for device in self.devices:
            device.transport.abort()


def _itself(device: _Device) -> _Device:
    return device


def _packet(first: int, rest: bytes) -> bytes:
    length, size = bytearray(), len(rest)
    while True:
        size, low = divmod(size, 128)
        length.append(low | (0x80 if size else 0))
        if not size:
            return bytes((first,)) + bytes(length) + rest


def _text(encoded: bytes) -> bytes:
    return len(encoded).to_bytes(2, "big") + encoded

"""What the wire is compared with: paho alone, sending and receiving as many bytes and doing nothing with them.

A round: the aggregator publishes one retained payload of `--bytes` to all, each link answers with a payload of as many
bytes, and when all have arrived the next round begins.
"""

import argparse
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from tests.bench.processes import Recorder, watched

DOWN, UP = "bare/down", "bare/up"


def connected(name: str, port: int, topic_filter: str, on_message: Callable[..., None]) -> paho.Client:
    """A client with its thread, subscribed; its callbacks get its name."""
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id=name, userdata=name, protocol=paho.MQTTv5)
    ready = threading.Event()

    def on_connect(*_: object) -> None:
        client.subscribe(topic_filter, 1)

    client.on_connect = on_connect
    client.on_subscribe = lambda *_: ready.set()
    client.on_message = on_message
    client.on_socket_open = _disable_nagle
    client.connect("127.0.0.1", port)
    client.loop_start()
    ready.wait()
    return client


def _disable_nagle(_client: paho.Client, _name: object, opened: Any) -> None:
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def aggregator(port: int, clients: int, size: int, rounds: int) -> None:
    """Count contributions and drop them."""
    payload, arrived = os.urandom(size - 4), threading.Semaphore(0)
    client = connected("aggregator", port, f"{UP}/+", lambda *_: arrived.release())
    for number in range(1, rounds + 1):
        client.publish(DOWN, number.to_bytes(4, "big") + payload, qos=1, retain=True)
        for _ in range(clients):
            arrived.acquire()


def links(port: int, first: int, count: int, size: int, recorder: Recorder) -> None:
    """Answer every round for ever."""
    payload = os.urandom(size)

    def on_message(client: paho.Client, name: str, message: paho.MQTTMessage) -> None:
        number = int.from_bytes(message.payload[:4], "big")
        if recorder.round_begins(number):
            recorder.record(number)
        client.publish(f"{UP}/{name}", payload, qos=1)

    for number in range(first, first + count):
        connected(f"d{number}", port, DOWN, on_message)
    threading.Event().wait()


def main() -> None:
    """The aggregator, or a process of links; pids after --watch are in its readings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("aggregator", "links"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--watch", nargs="*", default=[], metavar="NAME=PID")
    options = parser.parse_args()
    if options.part == "aggregator":
        aggregator(options.port, options.count, options.bytes, options.rounds)
    else:
        recorder = Recorder({**watched(options.watch), f"links-{os.getpid()}": os.getpid()})
        links(options.port, options.first, options.count, options.bytes, recorder)


if __name__ == "__main__":
    main()

"""Workers of the aggregator in an MQTT 5 shared subscription, behind the shipped mosquitto.conf and acl."""

import queue
from collections.abc import Iterator
from typing import TYPE_CHECKING

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from fedeq_edge.wire.topics import Topics

if TYPE_CHECKING:
    from tests.broker.conftest import Authority, Meet, Mosquitto, StartMosquitto

TOPICS = Topics("demo")
OWN = "pi4-01"
SHARED = f"$share/workers/{TOPICS.up('+')}"
CONTRIBUTIONS = 20
PATIENCE_S = 30.0
pytestmark = pytest.mark.broker


@pytest.fixture
def broker(start: "StartMosquitto", shipped: dict[str, str]) -> "Mosquitto":
    """With a worker's two lines of the ACL in force."""
    acl = shipped["acl"].replace("#user worker-1\n#topic", "user worker-1\ntopic")
    assert acl != shipped["acl"]
    return start(shipped["mosquitto.conf"], acl)


class Worker:
    """A connection that takes part in the shared subscription. Every payload is put into `arrived` with its number."""

    def __init__(
        self, number: int, broker: "Mosquitto", authority: "Authority", arrived: "queue.SimpleQueue[tuple[int, bytes]]"
    ) -> None:
        subscribed: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id=f"worker-{number}", protocol=paho.MQTTv5)
        here = authority.folder
        self._client.tls_set(f"{here}/ca.crt", f"{here}/worker-1.crt", f"{here}/worker-1.key")
        self._client.on_subscribe = lambda *_: subscribed.put(True)
        self._client.on_message = lambda _c, _u, message: arrived.put((number, bytes(message.payload)))
        self._client.on_connect = self._subscribe
        self._client.connect("127.0.0.1", broker.port)
        self._client.loop_start()
        subscribed.get(timeout=PATIENCE_S)

    def _subscribe(self, *_: object) -> None:
        self._client.subscribe(SHARED, 1)

    def stop(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def arrived(broker: "Mosquitto", authority: "Authority") -> Iterator["queue.SimpleQueue[tuple[int, bytes]]"]:
    """What the two workers get."""
    both: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
    workers = [Worker(number, broker, authority, both) for number in (1, 2)]
    yield both
    for worker in workers:
        worker.stop()


def test_every_message_reaches_exactly_one_worker(
    broker: "Mosquitto", arrived: "queue.SimpleQueue[tuple[int, bytes]]", meet: "Meet"
) -> None:
    device = meet(broker, OWN).connected()
    sent = [bytes([number]) for number in range(CONTRIBUTIONS)]
    for payload in sent:
        device.transport.publish(TOPICS.up(OWN), payload)
    got = [arrived.get(timeout=PATIENCE_S) for _ in sent]
    assert sorted(payload for _, payload in got) == sent
    assert {worker for worker, _ in got} == {1, 2}

"""The in-memory broker behaves like a broker, and its faults come from a seed."""

import pytest

from fedeq_edge.transport.base import Arrived, Connected, Disconnected, Event, Traffic, Will, matches
from fedeq_edge.transport.memory import MemoryBroker, MemoryTransport


def _listener(broker: MemoryBroker, *filters: str) -> tuple[MemoryTransport, list[Event]]:
    events: list[Event] = []
    transport = broker.transport(filters or ("#",))
    transport.start(events.append)
    return transport, events


def _arrived(events: list[Event]) -> list[Arrived]:
    return [event for event in events if isinstance(event, Arrived)]


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/+/c", "a/x/c", True),
        ("a/+", "a/x/c", False),
        ("a/+", "a", False),
        ("a/#", "a/x/c", True),
        ("a/#", "a", True),  # MQTT 5, 4.7.1.2: the parent level as well
        ("#", "a/b", True),
        ("+/b", "a/b", True),
        ("a/b/c", "a/b", False),
    ],
)
def test_topic_filters_match_as_mqtt_says(topic_filter: str, topic: str, expected: bool) -> None:
    assert matches(topic_filter, topic) is expected


def test_a_message_reaches_its_subscribers_and_nobody_else_when_delivered() -> None:
    broker = MemoryBroker()
    _, wanted = _listener(broker, "a/+")
    _, other = _listener(broker, "b")
    sender, _ = _listener(broker, "none")
    sender.publish("a/x", b"1")
    assert _arrived(wanted) == []
    assert broker.deliver() == 1
    assert _arrived(wanted) == [Arrived("a/x", b"1")]
    assert _arrived(other) == []


def test_a_retained_message_reaches_who_comes_later_and_the_newest_counts() -> None:
    broker = MemoryBroker()
    sender, _ = _listener(broker, "none")
    sender.publish("state", b"old", retain=True)
    sender.publish("state", b"new", retain=True)
    sender.publish("news", b"gone")
    _, late = _listener(broker)
    broker.deliver()
    assert _arrived(late) == [Arrived("state", b"new")]


def test_a_cut_says_the_will_and_loses_what_was_on_its_way() -> None:
    broker = MemoryBroker()
    _, watcher = _listener(broker, "state")
    events: list[Event] = []
    device = broker.transport(("down",), Will(topic="state", payload=b"gone"))
    device.start(events.append)
    broker.publish("down", b"lost", retain=False)
    device.cut()
    device.publish("state", b"dropped")
    broker.deliver()
    assert _arrived(watcher) == [Arrived("state", b"gone")]
    assert events == [Connected(), Disconnected("connection cut")]
    device.restore()
    assert events[-1] == Connected()


def test_leaving_says_the_farewell_and_not_the_will() -> None:
    broker = MemoryBroker()
    device = broker.transport((), Will(topic="state", payload=b"vanished"))
    device.start(lambda _event: None)
    device.stop(Will(topic="state", payload=b"left"))
    assert broker.retained == {"state": b"left"}


def _delivered(broker: MemoryBroker) -> list[bytes]:
    _, events = _listener(broker)
    for number in range(200):
        broker.publish("t", bytes([number]), retain=False)
    broker.deliver()
    return [event.payload for event in _arrived(events)]


def test_faults_are_the_same_for_the_same_seed_and_differ_between_seeds() -> None:
    first, again, other = (
        _delivered(MemoryBroker(loss=0.2, duplicate=0.2, reorder=True, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_loss_drops_duplication_repeats_and_reordering_keeps_everything() -> None:
    everything = [bytes([number]) for number in range(200)]
    lossy = _delivered(MemoryBroker(loss=0.3))
    assert 100 < len(lossy) < 180
    assert set(lossy) < set(everything)
    repeated = _delivered(MemoryBroker(duplicate=0.3))
    assert len(repeated) > 220
    assert set(repeated) == set(everything)
    shuffled = _delivered(MemoryBroker(reorder=True))
    assert shuffled != everything
    assert sorted(shuffled) == everything


def test_traffic_counts_payloads_that_went_over() -> None:
    broker = MemoryBroker()
    listener, _ = _listener(broker, "a")
    sender, _ = _listener(broker, "none")
    sender.publish("a", b"12345")
    broker.deliver()
    assert sender.traffic() == Traffic(up=5)
    assert listener.traffic() == Traffic(down=5)

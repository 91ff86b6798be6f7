"""Topics: no identifier can reach another's."""

import pytest

from fedeq_edge.errors import ConfigError
from fedeq_edge.wire.topics import Topics, check_identifier

TOPICS = Topics("farm-1")


@pytest.mark.parametrize("name", ["a", "pi4-02", "0", "x" * 63, "a_b-c"])
def test_a_plain_identifier_is_taken(name: str) -> None:
    assert check_identifier(name, "device") == name
    assert TOPICS.device_of(TOPICS.up(name)) == (name, "up")
    assert TOPICS.device_of(TOPICS.state(name)) == (name, "state")


@pytest.mark.parametrize(
    "name", ["", "+", "#", "a/b", "A", "-a", "_a", "a b", "a\n", "é", "x" * 64, "..", "$SYS", "a+"]
)
def test_an_identifier_that_could_reach_another_topic_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"device .* cannot stand in a topic"):
        check_identifier(name, "device")
    with pytest.raises(ConfigError, match="federation name"):
        Topics(name)
    assert TOPICS.device_of(f"fedeq/v1/farm-1/dev/{name}/up") is None


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "fedeq/v1/farm-1/dev/pi/down",
        "fedeq/v1/farm-1/dev/pi",
        "fedeq/v1/farm-1/dev/pi/up/more",
        "fedeq/v1/farm-2/dev/pi/up",
        "fedeq/v2/farm-1/dev/pi/up",
        "fedeq/v1/farm-1/agg/state",
        "fedeq/v1/farm-1/global/manifest",
        "x/fedeq/v1/farm-1/dev/pi/up",
        "pi/up",
    ],
)
def test_a_topic_that_no_device_publishes_on_names_no_device(topic: str) -> None:
    assert TOPICS.device_of(topic) is None


def test_no_topic_has_more_than_seven_levels() -> None:
    topics = [TOPICS.manifest, TOPICS.aggregator, TOPICS.state("d"), TOPICS.up("d"), TOPICS.down("d")]
    topics += [TOPICS.worker_up("d"), TOPICS.worker_down("d")]
    assert max(topic.count("/") + 1 for topic in topics) <= 7
    assert len(set(topics)) == 7


def test_a_worker_is_named_by_its_own_topic_alone() -> None:
    assert TOPICS.worker_of(TOPICS.worker_up("w-1")) == "w-1"
    for topic in (TOPICS.worker_down("w-1"), TOPICS.up("w-1"), TOPICS.worker_up("a/b"), "w-1", TOPICS.worker_up("W")):
        assert TOPICS.worker_of(topic) is None

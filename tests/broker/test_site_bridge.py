"""broker/mosquitto-bridge.conf and broker/acl-site: a site's broker joined to the fleet's, both real."""

import queue
from typing import TYPE_CHECKING

import pytest

from fedeq_edge.wire.topics import Topics

if TYPE_CHECKING:
    from tests.broker.conftest import Meet, Mosquitto, Person, StartMosquitto

TOPICS = Topics("demo")
OWN, OTHER, SITE = "pi4-01", "pi4-02", "site-a"
pytestmark = pytest.mark.broker


@pytest.fixture
def brokers(start: "StartMosquitto", shipped: dict[str, str]) -> "tuple[Mosquitto, Mosquitto]":
    """The fleet's and the site's, which is bridged to it."""
    fleet = start(shipped["mosquitto.conf"], shipped["acl"] + shipped["acl-site"])
    bridge = shipped["mosquitto-bridge.conf"].replace("fleet.example.org:8883", f"127.0.0.1:{fleet.port}")
    return fleet, start(shipped["mosquitto.conf"] + bridge, shipped["acl"])


def test_a_site_s_device_and_the_aggregator_hear_each_other(
    brokers: "tuple[Mosquitto, Mosquitto]", meet: "Meet"
) -> None:
    fleet, site = brokers
    aggregator = meet(fleet, "aggregator", TOPICS.up("+"), TOPICS.state("+")).connected()
    down = (TOPICS.manifest, TOPICS.model, TOPICS.aggregator, TOPICS.down(OWN))
    device = meet(site, OWN, *down).connected()
    _wait_for_the_bridge(device, aggregator)
    aggregator.says(*down)
    assert device.hears_until(TOPICS.down(OWN)) == list(down)


def test_a_device_that_comes_later_finds_what_is_retained_at_its_site(
    brokers: "tuple[Mosquitto, Mosquitto]", meet: "Meet"
) -> None:
    fleet, site = brokers
    aggregator = meet(fleet, "aggregator", TOPICS.state("+")).connected()
    first = meet(site, OWN, TOPICS.manifest).connected()
    _wait_for_the_bridge(first, aggregator)
    aggregator.says(TOPICS.manifest, retain=True)
    first.hears_until(TOPICS.manifest)
    later = meet(site, OTHER, TOPICS.manifest).connected()
    assert later.hears_until(TOPICS.manifest) == [TOPICS.manifest]


def test_a_site_does_not_speak_for_a_device_of_another_site(
    brokers: "tuple[Mosquitto, Mosquitto]", meet: "Meet"
) -> None:
    fleet, site = brokers
    aggregator = meet(fleet, "aggregator", TOPICS.up("+"), TOPICS.state("+")).connected()
    device, intruder = meet(site, OWN).connected(), meet(site, OTHER).connected()
    _wait_for_the_bridge(device, aggregator)
    intruder.says(TOPICS.up(OTHER))
    intruder.leaves()
    device.says(TOPICS.up(OWN))
    assert TOPICS.up(OTHER) not in aggregator.hears_until(TOPICS.up(OWN))


def test_a_site_s_worker_and_its_root_hear_each_other_and_no_other_worker_is_taken_for_it(
    brokers: "tuple[Mosquitto, Mosquitto]", meet: "Meet"
) -> None:
    fleet, site = brokers
    root = meet(fleet, "aggregator", TOPICS.worker_up("+"), TOPICS.state("+")).connected()
    worker = meet(site, "aggregator", TOPICS.worker_down(SITE)).connected()
    _wait_for_the_bridge(meet(site, OWN).connected(), root)
    worker.says(TOPICS.worker_up("site-b"), TOPICS.worker_up(SITE))
    assert TOPICS.worker_up("site-b") not in root.hears_until(TOPICS.worker_up(SITE))
    root.says(TOPICS.worker_down(SITE))
    assert worker.hears_until(TOPICS.worker_down(SITE)) == [TOPICS.worker_down(SITE)]


def _wait_for_the_bridge(device: "Person", aggregator: "Person") -> None:
    """Messages pass from the site to the fleet; the bridge subscribes before it sends, so they pass back as well."""
    while True:
        device.says(TOPICS.state(OWN))
        try:
            aggregator.events.get(timeout=0.2)
        except queue.Empty:
            continue
        return

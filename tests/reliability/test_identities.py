"""Two agents that say they are one device, clocks that are wrong, a device that is denied: cases 11, 12 and 16."""

from typing import TYPE_CHECKING

import pytest

from fedeq_edge import orders
from fedeq_edge.transport import mqtt
from fedeq_edge.transport.base import Connected, Event
from fedeq_edge.transport.mqtt import Endpoint, MqttTransport
from tests.conftest import until
from tests.reliability.fleet import AGGREGATOR

if TYPE_CHECKING:
    from tests.conftest import RealMosquitto
    from tests.reliability.conftest import MakeFleet

pytestmark = pytest.mark.broker
YEAR_S = 365.25 * 86_400.0


def test_a_war_of_two_agents_for_one_name_slows_down_to_the_longest_wait(
    shared_mosquitto: "RealMosquitto", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes the connection of the other over: after every loss both wait longer before they try again."""
    bounds: list[float] = []

    def no_wait(_low: float, bound: float) -> float:
        bounds.append(bound)
        return 0.0

    monkeypatch.setattr("fedeq_edge.transport.mqtt.random.uniform", no_wait)
    connections: list[Event] = []
    twins = [MqttTransport(Endpoint(url=shared_mosquitto.url), "twin", (f"none/{number}",)) for number in range(2)]
    try:
        for twin in twins:
            twin.start(lambda event: connections.append(event) if isinstance(event, Connected) else None)
        until(lambda: bounds.count(mqtt._BACKOFF_LAST_S) >= 2, "both wait as long as they ever do")
    finally:
        for twin in twins:
            twin.stop()
    doublings = sorted({bound for bound in bounds if bound < mqtt._BACKOFF_LAST_S})
    assert doublings == [mqtt._BACKOFF_FIRST_S * 2.0**n for n in range(len(doublings))]
    assert all(bounds.count(bound) <= 2 for bound in doublings)  # nobody starts over


def test_two_agents_with_one_name_spoil_no_sum(make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto") -> None:
    """With a state of its own each: whoever holds another dual than the task names has to begin anew."""
    fleet = make_fleet(shared_mosquitto.port, rounds=6, retry_s=0.3)
    fleet.start()
    fleet.until_round(2)
    twin = fleet.start_twin("a")
    fleet.until_round(4)
    twin.kill()
    twin.wait()
    found = fleet.finish()
    assert found.contributions <= 18


@pytest.mark.parametrize("off_s", [-YEAR_S, YEAR_S], ids=["a-year-behind", "a-year-ahead"])
def test_wrong_clocks_change_nothing(make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto", off_s: float) -> None:
    """Of a device, and of the aggregator the other way."""
    fleet = make_fleet(shared_mosquitto.port)
    fleet.start("a", clock_off_s=off_s)
    fleet.start(AGGREGATOR, clock_off_s=-off_s)
    fleet.start("b", "c")
    assert fleet.finish().contributions == 15
    assert all(line["contributed"] == ["a", "b", "c"] for line in fleet.rounds())


def test_what_a_denied_device_gave_to_the_open_round_is_in_no_consensus(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto"
) -> None:
    fleet = make_fleet(shared_mosquitto.port)
    fleet.hold("b")
    fleet.start()
    fleet.until_only("b")
    orders.give(fleet.folder / "state", "deny", "a")
    fleet.until(lambda: fleet.status()["denied"] == ["a"], "the aggregator obeys")
    fleet.release("b")
    assert fleet.finish().contributions == 10
    assert all(line["contributed"] == ["b", "c"] for line in fleet.rounds())

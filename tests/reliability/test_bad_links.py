"""Links that are silent, slow, flapping or away: cases 3, 4, 5 and 18."""

from typing import TYPE_CHECKING

import pytest

from fedeq_edge.transport.faults import PUBLISH
from fedeq_edge.wire.messages import Chunk
from tests.reliability.fleet import AGGREGATOR, Gate, carries

if TYPE_CHECKING:
    from tests.conftest import RealMosquitto
    from tests.reliability.conftest import MakeFleet

pytestmark = pytest.mark.broker
SLOW = {"retry_s": 10.0, "schedule": {"deadline_s": 120.0}}


def test_a_black_hole_costs_a_device_its_connection_and_nothing_else(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto"
) -> None:
    fleet = make_fleet(shared_mosquitto.port, keepalive_s=1, rounds=2)
    fleet.hold("a")
    fleet.start()
    fleet.until_only("a")
    fleet.links["a"].stall()
    fleet.until(lambda: "a" not in fleet.status()["online"], "the broker gives the silent device up")
    fleet.release("a")
    fleet.links["a"].release()
    assert fleet.finish().contributions == 6


@pytest.mark.parametrize("part", ["a", AGGREGATOR])
def test_a_half_open_connection_is_found_out_by_the_side_that_does_not_know(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto", part: str
) -> None:
    fleet = make_fleet(shared_mosquitto.port, keepalive_s=1, rounds=2)
    fleet.hold("a")
    fleet.start()
    fleet.until_only("a")
    fleet.links[part].half_open()
    fleet.release("a")
    assert fleet.finish().contributions == 6


@pytest.mark.parametrize(("rate", "channels"), [(64_000.0, 192), (8_000.0, 56)])
def test_a_slow_link_delivers_without_losing_its_connection(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto", rate: float, channels: int
) -> None:
    """The contribution is on the way for longer than the keepalive, and no piece of it is."""
    fleet = make_fleet(shared_mosquitto.port, channels=channels, codec="f32", rounds=1, keepalive_s=2, **SLOW)
    fleet.links["a"].conditions.rate = rate
    fleet.start()
    assert fleet.finish().contributions == 3
    assert "disconnected" not in (fleet.folder / "a" / "agent.log").read_text()


def test_half_a_megabyte_comes_down_over_a_link_that_flaps(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto"
) -> None:
    """64 kB/s, cut every 2 s: a fifth of the consensus fits between two cuts."""
    fleet = make_fleet(shared_mosquitto.port, devices=("a",), channels=350, codec="f32", rounds=1, **SLOW)
    link = fleet.links["a"]
    link.conditions.rate = 64_000.0
    link.flap(2.0)
    fleet.hold("a")
    fleet.start()
    fleet.until(lambda: fleet.agent_status("a")["doing"] == "training", "the device has its task and its consensus")
    came, cuts = link.sent["down"], link.cuts
    link.flap(None)
    link.conditions.rate = None
    fleet.release("a")
    assert fleet.finish().contributions == 1
    assert cuts >= 3
    assert 490_000 < came < 1.5 * 490_000, f"{came} bytes over {cuts} cuts"


def test_a_megabyte_arrives_over_a_link_that_flaps_with_less_than_a_fifth_more_bytes(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto"
) -> None:
    """64 kB/s, cut every 2 s: a tenth of the contribution fits between two cuts."""
    fleet = make_fleet(shared_mosquitto.port, devices=("a",), channels=500, codec="f32", rounds=1, **SLOW)
    link = fleet.links["a"]
    fleet.hold("a")
    fleet.start()
    fleet.until(lambda: fleet.agent_status("a")["doing"] == "training", "the device has its task and its consensus")
    link.unplug()
    fleet.release("a")
    fleet.until(lambda: fleet.agent_status("a")["pending_bytes"] > 0, "the contribution is made")
    size = fleet.agent_status("a")["pending_bytes"]
    sent_before, cuts_before = link.sent["up"], link.cuts
    link.conditions.rate = 64_000.0
    link.flap(2.0)
    link.plug()
    fleet.until_round(1)
    spent, cuts = link.sent["up"] - sent_before, link.cuts - cuts_before
    link.flap(None)
    link.conditions.rate = None
    fleet.finish()
    (line,) = fleet.rounds()
    assert line["contributed"] == ["a"]
    assert size > 1e6
    assert cuts >= 8
    assert size < spent < 1.2 * size, f"{spent} bytes over {cuts} cuts"


def test_a_contribution_made_while_offline_waits_on_disk_and_counts_once(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto"
) -> None:
    fleet = make_fleet(shared_mosquitto.port)
    fleet.hold("a")
    fleet.start()
    fleet.until_only("a")
    fleet.links["a"].unplug()
    fleet.release("a")
    fleet.until(lambda: fleet.agent_status("a")["pending_bytes"] > 0, "the contribution is made")
    fleet.kill("a")
    fleet.start("a")  # still offline
    fleet.links["a"].plug()
    assert fleet.finish().contributions == 15
    assert all(line["contributed"] == ["a", "b", "c"] for line in fleet.rounds())


def test_rounds_on_links_that_are_cut_at_every_upload_are_exact(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto"
) -> None:
    """Each contribution is cut off in the middle of its transfer once, and resumes it."""
    fleet = make_fleet(shared_mosquitto.port, channels=192, codec="f32", rounds=3)
    fleet.start()
    for number in range(3):
        gate = Gate(fleet.links["a"], carries(Chunk))
        gate.wait()
        fleet.links["a"].cut()
        gate.open()
        fleet.until_round(number + 1)
    assert fleet.finish().contributions == 9
    assert fleet.links["a"].packets["up", PUBLISH] > 6

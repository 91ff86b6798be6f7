"""Devices at a site's own broker, joined to the fleet's by the shipped bridge; the aggregator is as without one."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import RealMosquitto
    from tests.reliability.conftest import MakeFleet, StartSite

pytestmark = pytest.mark.broker


def test_a_federation_across_two_brokers_is_one_federation(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto", start_site: "StartSite"
) -> None:
    site = start_site(shared_mosquitto.port, "devices")
    fleet = make_fleet(shared_mosquitto.port, {"a": site.port, "b": site.port})
    fleet.start()
    assert fleet.finish().contributions == 15


def test_a_site_whose_broker_dies_comes_back_into_the_open_round(
    make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto", start_site: "StartSite"
) -> None:
    site = start_site(shared_mosquitto.port, "devices")
    fleet = make_fleet(shared_mosquitto.port, {"a": site.port, "b": site.port})
    fleet.hold("a")
    fleet.start()
    fleet.until_only("a")
    site.kill()
    site.start()
    fleet.release("a")
    assert fleet.finish().contributions == 15

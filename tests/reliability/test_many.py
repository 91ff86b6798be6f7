"""Many devices, and many rounds: cases 14 and 19. `fedeq chaos` is the long soak."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest

from tests.reliability.crowd import Crowd
from tests.reliability.fleet import AGGREGATOR

if TYPE_CHECKING:
    from tests.conftest import RealMosquitto
    from tests.reliability.conftest import MakeFleet
    from tests.reliability.fleet import Fleet

pytestmark = pytest.mark.broker
DEVICES = 500
AGGREGATOR_BYTES = 90_000_000  # promised in the README for any fleet
GROWTH_BYTES = 1_000_000


@pytest.fixture
def alone(make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto") -> "Fleet":
    """An aggregator that waits for a crowd."""
    return make_fleet(shared_mosquitto.port, devices=(), rounds=2, schedule={"min_devices": DEVICES})


@pytest.fixture
def crowd(alone: "Fleet", shared_mosquitto: "RealMosquitto") -> Iterator[Crowd]:
    alone.start(AGGREGATOR)
    devices = Crowd(shared_mosquitto.port, alone.name, DEVICES)
    yield devices
    devices.leave()


def test_five_hundred_devices_are_all_counted_in_the_memory_that_is_promised(alone: "Fleet", crowd: Crowd) -> None:
    found = alone.finish()
    assert found.contributions == 2 * DEVICES
    assert all(len(line["contributed"]) == DEVICES for line in alone.rounds())
    assert alone.status()["rss_peak_bytes"] <= AGGREGATOR_BYTES
    assert alone.status()["cpu_s"] < 0.02 * 2 * DEVICES  # 20 ms a contribution; 2 are normal
    alone.until(lambda: all(device.finished for device in crowd.devices), "the crowd hears of the end")
    for device in crowd.devices:
        np.testing.assert_array_equal(device.machine.state.nu, found.duals[device.name])


def test_memory_does_not_grow_with_the_rounds(make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto") -> None:
    fleet = make_fleet(shared_mosquitto.port, devices=("a", "b"), rounds=200)
    fleet.start()
    fleet.until_round(100)
    parts = {name: psutil.Process(process.pid) for name, process in fleet.processes.items()}
    before = {name: part.memory_info().rss for name, part in parts.items()}
    fleet.until_round(195)
    grown = {name: part.memory_info().rss - before[name] for name, part in parts.items()}
    assert max(grown.values()) <= GROWTH_BYTES, grown
    assert fleet.finish().contributions == 400

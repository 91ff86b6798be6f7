"""Hot, throttled or low on battery means less work, and an empty battery none."""

import pytest

from fedeq_edge.hardware.profiles import DeviceLimits
from fedeq_edge.hardware.reading import Battery, Reading
from fedeq_edge.hardware.throttle import derate

LIMITS = DeviceLimits(hot_c=80.0, low_battery_percent=30.0, critical_battery_percent=10.0)


@pytest.mark.parametrize(
    ("reading", "factor", "reason"),
    [
        (Reading(), 1.0, ""),
        (Reading(temperature_c=65.0, throttled=()), 1.0, ""),
        (Reading(temperature_c=75.0), 0.75, "75 °C"),
        (Reading(temperature_c=80.0), 0.5, "80 °C"),
        (Reading(temperature_c=99.0), 0.25, "99 °C"),
        (Reading(throttled=("under-voltage", "throttled")), 0.5, "under-voltage, throttled"),
        (Reading(battery=Battery(percent=20.0, plugged=False)), 0.5, "battery at 20 %"),
        (Reading(battery=Battery(percent=10.0, plugged=False)), 0.0, "battery at 10 %"),
        (Reading(battery=Battery(percent=1.0, plugged=True)), 1.0, ""),
        (Reading(temperature_c=99.0, battery=Battery(percent=5.0, plugged=False)), 0.0, "battery at 5 %"),
        (Reading(temperature_c=72.0, throttled=("throttled",)), 0.5, "throttled"),
    ],
)
def test_the_strictest_cause_decides_and_is_named(reading: Reading, factor: float, reason: str) -> None:
    derating = derate(reading, LIMITS)

    assert derating.factor == pytest.approx(factor)
    assert reason in derating.reason
    assert bool(derating.reason) == (factor < 1.0)


def test_a_warmer_device_never_works_more() -> None:
    factors = [derate(Reading(temperature_c=t / 2), LIMITS).factor for t in range(40, 260)]

    assert factors == sorted(factors, reverse=True)
    assert min(factors) == 0.25

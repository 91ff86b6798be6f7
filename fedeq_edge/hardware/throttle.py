"""From how a device is doing to how much it should work: hot, throttled or on a low battery means less."""

from dataclasses import dataclass

from fedeq_edge.hardware.profiles import DeviceLimits
from fedeq_edge.hardware.reading import Battery, Reading

# Work is halved at the throttling temperature, falls linearly around it, and is never cut below a quarter: a round
# at a quarter of the speed still helps, and lets the board cool.
HALF = 0.5
QUARTER = 0.25
# Easing begins this far below the limit, so that the firmware's own throttling is rarely met.
WARM_MARGIN_C = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Derating:
    """factor: share of its full work that the device should do, 0 (abstain) to 1. reason: for people; may be empty."""

    factor: float
    reason: str


def derate(reading: Reading, limits: DeviceLimits) -> Derating:
    """The strictest of what temperature, firmware and battery ask for; unknown readings ask for nothing."""
    causes = [
        _heat(reading.temperature_c, limits.hot_c),
        _firmware(reading.throttled),
        _charge(reading.battery, limits),
    ]
    return min(causes, key=lambda cause: cause.factor)


_FULL = Derating(factor=1.0, reason="")


def _heat(temperature_c: float | None, hot_c: float) -> Derating:
    if temperature_c is None or temperature_c <= hot_c - WARM_MARGIN_C:
        return _FULL
    eased = 1.0 - HALF * (temperature_c - (hot_c - WARM_MARGIN_C)) / WARM_MARGIN_C
    return Derating(factor=max(QUARTER, eased), reason=f"{temperature_c:.0f} °C (limit {hot_c:.0f} °C)")


def _firmware(throttled: tuple[str, ...] | None) -> Derating:
    return Derating(factor=HALF, reason=", ".join(throttled)) if throttled else _FULL


def _charge(battery: Battery | None, limits: DeviceLimits) -> Derating:
    if battery is None or battery.plugged or battery.percent > limits.low_battery_percent:
        return _FULL
    critical = battery.percent <= limits.critical_battery_percent
    return Derating(factor=0.0 if critical else HALF, reason=f"battery at {battery.percent:.0f} %")

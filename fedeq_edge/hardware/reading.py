"""The fast-changing part of a device: temperature, throttling, battery, load.

Everything comes from files below a `root`, so that a test (or a check of a mounted card) can give its own tree.
Sysfs is written by drivers of every quality: a file that is missing or holds nonsense means "unknown", never an
error. Sources: kernel Documentation/ABI/testing/{sysfs-class-thermal,sysfs-class-power}; Raspberry Pi firmware
documentation for the bits of get_throttled.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec

# Bits of the firmware's get_throttled word that describe this moment (16 to 19 repeat them "since boot").
THROTTLE_BITS = {0: "under-voltage", 1: "frequency-capped", 2: "throttled", 3: "soft-temperature-limit"}
# A reading outside is a disconnected sensor (drivers report -273, 0x7fff, ...), not a temperature of a running board.
PLAUSIBLE_CELSIUS = (-40.0, 150.0)
CPU_ZONES = re.compile(r"cpu|soc|pkg|core|k10temp", re.IGNORECASE)
FIRMWARE_WORD = "sys/devices/platform/soc/soc:firmware/get_throttled"


class Battery(msgspec.Struct, frozen=True, kw_only=True):
    """percent: charge, 0 to 100. plugged: whether external power is connected."""

    percent: float
    plugged: bool


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """How the device is doing now; None where it does not say.

    temperature_c: hottest processor sensor. throttled: the firmware's complaints of this moment (empty: none).
    load: runnable processes, mean over the last minute.
    """

    temperature_c: float | None = None
    throttled: tuple[str, ...] | None = None
    battery: Battery | None = None
    load: float | None = None


def read(root: Path = Path("/")) -> Reading:
    """The reading of the device whose file system is at `root`; never raises."""
    return Reading(
        temperature_c=_temperature(root),
        throttled=_throttled(root),
        battery=battery_of(root),
        load=number((text_of(root / "proc/loadavg") or "").split(" ", 1)[0]),
    )


def text_of(path: Path) -> str | None:
    """The stripped text of a small file, or None where it cannot be read."""
    try:
        # Device-tree strings end in NUL; some drivers answer a read with EIO or ENODATA.
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n\t")
    except (OSError, ValueError):
        return None


def number(text: str | None) -> float | None:
    """The finite number that `text` spells, or None."""
    try:
        value = float(text) if text else None
    except ValueError:
        return None
    return value if value is not None and abs(value) < float("inf") else None


def _matches(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _temperature(root: Path) -> float | None:
    sensors = list(_sensors(root))
    # Batteries, radios and disks have zones too: prefer what names the processor.
    chosen = [t for name, t in sensors if CPU_ZONES.search(name)] or [t for _, t in sensors]
    return max(chosen, default=None)


def _sensors(root: Path) -> Iterator[tuple[str, float]]:
    """(name, degrees Celsius) of every plausible sensor."""
    zones = _matches(root / "sys/class/thermal", "thermal_zone*/temp")
    chips = _matches(root / "sys/class/hwmon", "hwmon*/temp1_input")
    for path in [*zones, *chips]:
        name = text_of(path.parent / "type") or text_of(path.parent / "name") or ""
        millidegrees = number(text_of(path))
        if millidegrees is None:
            continue
        celsius = millidegrees / 1000
        if PLAUSIBLE_CELSIUS[0] <= celsius <= PLAUSIBLE_CELSIUS[1]:
            yield name, celsius


def _throttled(root: Path) -> tuple[str, ...] | None:
    word = text_of(root / FIRMWARE_WORD) or (_ask_firmware() if root == Path("/") else None)
    if word is None:
        return None
    try:
        bits = int(word, 16)
    except ValueError:
        return None
    return tuple(name for bit, name in THROTTLE_BITS.items() if bits >> bit & 1)


def _ask_firmware() -> str | None:
    """The word that `vcgencmd get_throttled` prints as `throttled=0x50005`; None on boards without it."""
    tool = shutil.which("vcgencmd")
    if tool is None:
        return None
    try:
        answer = subprocess.run([tool, "get_throttled"], capture_output=True, text=True, timeout=2, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip().removeprefix("throttled=")


def battery_of(root: Path = Path("/")) -> Battery | None:
    """The battery that the device runs on, None where it has none or does not say."""
    supplies = [path.parent for path in _matches(root / "sys/class/power_supply", "*/type")]
    # Scope "Device" marks a mouse or a headset, whose charge is not ours.
    batteries = [s for s in supplies if _is(s, "type", "Battery") and not _is(s, "scope", "Device")]
    charges = [c for c in (number(text_of(s / "capacity")) for s in batteries) if c is not None]
    if not charges:
        return None
    wired = any(text_of(s / "online") == "1" for s in supplies if not _is(s, "type", "Battery"))
    fed = any(_is(s, "status", "Charging") or _is(s, "status", "Full") for s in batteries)
    return Battery(percent=min(max(charges[0], 0.0), 100.0), plugged=wired or fed)


def _is(supply: Path, attribute: str, value: str) -> bool:
    return text_of(supply / attribute) == value

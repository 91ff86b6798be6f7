"""Board profiles: what is known of a board before it has been measured; one folder per board in `devices/`.

An idle agent reads its board's, so nothing here imports psutil, which the probe needs.
"""

import difflib
from math import inf
from pathlib import Path

import msgspec

from fedeq_edge.errors import ConfigError
from fedeq_edge.kit import folder


class DeviceLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a board needs care.

    hot_c: temperature at which its firmware begins to throttle. On battery: below `low_battery_percent` a device
    works less, below `critical_battery_percent` it sits rounds out.
    """

    hot_c: float
    low_battery_percent: float = 30.0
    critical_battery_percent: float = 10.0


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One board.

    wheel_tag: platform tag of the wheels that it takes. cpu_part: "CPU part" of /proc/cpuinfo (empty on x86).
    model: beginning of its device-tree model (empty where it has none). relative_speed: speed of one core at fp32
    work of this kind, the x86-64 reference core being 1.0; an estimate until the device has been calibrated.
    active_watts: what the whole board draws while it computes, an estimate (devices/README.md); None: not known.
    python: minor of the python that its usual operating system brings. qemu_cpu: the model of qemu-aarch64 that crashes
    where this board does (empty: none). pins: versions of wheels that were run under that model, for bundles.
    """

    id: str
    name: str
    arch: str
    wheel_tag: str
    cores: int
    memory_bytes: int
    relative_speed: float
    limits: DeviceLimits
    active_watts: float | None = None
    cpu_part: str = ""
    model: str = ""
    python: str = "3.11"
    qemu_cpu: str = ""
    pins: dict[str, str] = {}
    notes: str = ""


def profiles(where: Path | None = None) -> dict[str, Profile]:
    """Every board of `where` (default: the kit's `devices/`) by id, sorted."""
    base = folder("devices") if where is None else where
    return {path.parent.name: _load(path) for path in sorted(base.glob("*/profile.toml"))}


def load_profile(board: str, where: Path | None = None) -> Profile:
    """The profile of one board. Raises ConfigError naming the nearest known id, or the file's fault."""
    base = folder("devices") if where is None else where
    known = sorted(path.parent.name for path in base.glob("*/profile.toml"))
    if board in known:
        return _load(base / board / "profile.toml")
    nearest = difflib.get_close_matches(board, known, n=1, cutoff=0.0)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ConfigError(f"board {board!r} has no profile in {base} (known: {', '.join(known) or 'none'}){hint}")


def _load(path: Path) -> Profile:
    try:
        profile = msgspec.toml.decode(path.read_bytes(), type=Profile)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not a board profile: {error}; compare it with another board's") from error
    if profile.id != path.parent.name:
        raise ConfigError(f"{path}: id is {profile.id!r} but its folder is {path.parent.name!r}; make them equal")
    if not (profile.relative_speed > 0 and profile.cores > 0 and profile.memory_bytes > 0):
        raise ConfigError(f"{path}: relative_speed, cores and memory_bytes must be positive")
    if profile.active_watts is not None and not 0.0 < profile.active_watts < inf:
        raise ConfigError(f"{path}: active_watts is {profile.active_watts}; give watts above 0, or leave it out")
    return profile

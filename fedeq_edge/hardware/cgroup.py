"""The processor time and memory that control groups leave to this process.

psutil reports the host's processors and memory even inside a container, so the limits are read here, from
version 1 and version 2 hierarchies alike. A limit anywhere above us binds us: the smallest of all ancestors counts.
Source: kernel Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst; scheduler/sched-bwc.rst.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fedeq_edge.hardware.reading import number, text_of

# Version 1 writes "no limit" as the largest page-aligned 63-bit number.
UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """cpus: processors' worth of time per second, memory_bytes: most resident memory; None without a limit."""

    cpus: float | None
    memory_bytes: int | None


def limits(root: Path = Path("/")) -> Limits:
    """The limits of this process in the file system at `root`; never raises."""
    groups = list(_groups(root))
    quotas = [quota for group in groups if (quota := _quota(group)) is not None]
    memory = [most for group in groups if (most := _memory(group)) is not None]
    return Limits(cpus=min(quotas, default=None), memory_bytes=min(memory, default=None))


def _groups(root: Path) -> Iterator[Path]:
    """Every folder that may hold a limit of ours, from our own group up to the mount point."""
    for line in (text_of(root / "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for mount in _mounts(root, controllers):
            # Inside a container the path may be the host's: the walk up then ends at the mount, which is ours.
            ours = PurePosixPath("/", path)
            for ancestor in (ours, *ours.parents):
                yield mount / str(ancestor).lstrip("/")


def _mounts(root: Path, controllers: str) -> tuple[Path, ...]:
    base = root / "sys/fs/cgroup"
    if not controllers:  # version 2; a hybrid system mounts it beside version 1
        return base, base / "unified"
    return tuple(base / name for name in {controllers, *controllers.split(",")})


def _quota(group: Path) -> float | None:
    pair = (text_of(group / "cpu.max") or "").split()
    if len(pair) != 2:
        pair = [text_of(group / f"cpu.cfs_{part}_us") or "" for part in ("quota", "period")]
    quota, period = map(number, pair)  # "max" (version 2) and -1 (version 1) both mean no limit
    return quota / period if quota and period and quota > 0 and period > 0 else None


def _memory(group: Path) -> int | None:
    value = number(text_of(group / "memory.max") or text_of(group / "memory.limit_in_bytes"))
    return int(value) if value and 0 < value < UNLIMITED_BYTES else None

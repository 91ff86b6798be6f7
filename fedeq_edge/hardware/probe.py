"""What a device is: processor, memory, and how much of both this process may use."""

import platform
import re
from pathlib import Path

import msgspec
import psutil

from fedeq_edge.hardware.cgroup import limits
from fedeq_edge.hardware.profiles import Profile, profiles
from fedeq_edge.hardware.reading import Reading, number, read, text_of

# (implementer, part) of /proc/cpuinfo to core, as in the kernel's arch/arm64/include/asm/cputype.h.
CORES = {
    ("0x41", "0xb76"): "ARM1176",
    ("0x41", "0xc07"): "Cortex-A7",
    ("0x41", "0xc09"): "Cortex-A9",
    ("0x41", "0xc0f"): "Cortex-A15",
    ("0x41", "0xd03"): "Cortex-A53",
    ("0x41", "0xd04"): "Cortex-A35",
    ("0x41", "0xd05"): "Cortex-A55",
    ("0x41", "0xd07"): "Cortex-A57",
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd09"): "Cortex-A73",
    ("0x41", "0xd0a"): "Cortex-A75",
    ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse-N1",
    ("0x41", "0xd40"): "Neoverse-V1",
    ("0x41", "0xd41"): "Cortex-A78",
    ("0x41", "0xd42"): "Cortex-A78AE",
    ("0x41", "0xd46"): "Cortex-A510",
    ("0x41", "0xd47"): "Cortex-A710",
    ("0x41", "0xd49"): "Neoverse-N2",
    ("0x41", "0xd4f"): "Neoverse-V2",
    ("0x4e", "0x003"): "Denver 2",
    ("0x4e", "0x004"): "Carmel",
}


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """A device as found. None means that it does not say.

    affinity: processors that this process may run on. cgroup_cpus, cgroup_memory_bytes: limits set from outside.
    effective_cores, effective_memory_bytes: the smallest of hardware, affinity and limits; plan with these.
    """

    arch: str
    os: str
    python: str
    model: str | None
    cpu_model: str | None
    cpu_part: str | None
    cpu_core: str | None
    cores_logical: int
    cores_physical: int
    affinity: tuple[int, ...]
    memory_total_bytes: int
    memory_available_bytes: int
    cgroup_cpus: float | None
    cgroup_memory_bytes: int | None
    effective_cores: float
    effective_memory_bytes: int
    reading: Reading


def probe(root: Path = Path("/")) -> Probe:
    """The device whose file system is at `root`; never raises for a missing or malformed file.

    What the tree does not tell (a laptop without /proc) is asked from psutil.
    """
    cpus = _processors(root)
    logical = len(cpus) or psutil.cpu_count() or 1
    affinity = _affinity(root) or tuple(range(logical))
    total, available = _memory(root)
    bound = limits(root)
    implementer, part = _first(cpus, "CPU implementer"), _first(cpus, "CPU part")
    return Probe(
        arch=platform.machine(),
        os=_os_name(root),
        python=platform.python_version(),
        model=text_of(root / "proc/device-tree/model"),
        cpu_model=_first(cpus, "model name"),
        cpu_part=part,
        cpu_core=CORES.get((implementer or "", part or "")),
        cores_logical=logical,
        cores_physical=_physical(cpus) or logical,
        affinity=affinity,
        memory_total_bytes=total,
        memory_available_bytes=available,
        cgroup_cpus=bound.cpus,
        cgroup_memory_bytes=bound.memory_bytes,
        effective_cores=min(float(len(affinity)), bound.cpus or float("inf")),
        effective_memory_bytes=min(total, bound.memory_bytes or total),
        reading=read(root),
    )


def recognise(probe: Probe, where: Path | None = None) -> Profile | None:
    """The profile whose device-tree model and architecture fit, longest model first; None for an unknown board."""
    known = [
        profile
        for profile in profiles(where).values()
        if profile.arch == probe.arch and (probe.model or "").startswith(profile.model)
    ]
    return max(known, key=lambda profile: len(profile.model), default=None)


def _processors(root: Path) -> list[dict[str, str]]:
    """The blocks of /proc/cpuinfo that describe a processor (32-bit ARM ends with one about the board)."""
    blocks = re.split(r"\n\s*\n", text_of(root / "proc/cpuinfo") or "")
    return [block for block in map(_fields, blocks) if "processor" in block]


def _fields(block: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in block.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs if value}


def _first(cpus: list[dict[str, str]], key: str) -> str | None:
    return next((cpu[key] for cpu in cpus if key in cpu), None)


def _physical(cpus: list[dict[str, str]]) -> int:
    """Distinct cores; ARM names none of these fields and has one thread per core, which gives 0: unknown."""
    return len({(cpu.get("physical id"), cpu["core id"]) for cpu in cpus if "core id" in cpu})


def _affinity(root: Path) -> tuple[int, ...]:
    """Processors in `Cpus_allowed_list: 0-3,6` of /proc/self/status; empty where it does not say."""
    listed = _fields(text_of(root / "proc/self/status") or "").get("Cpus_allowed_list", "")
    spans = re.findall(r"(\d{1,5})(?:-(\d{1,5}))?", listed)
    return tuple(cpu for first, last in spans for cpu in range(int(first), int(last or first) + 1))


def _memory(root: Path) -> tuple[int, int]:
    """Total and available bytes."""
    fields = _fields(text_of(root / "proc/meminfo") or "")
    kilobytes = [number(fields.get(key, "").removesuffix("kB")) for key in ("MemTotal", "MemAvailable")]
    if kilobytes[0] is None or kilobytes[1] is None:
        memory = psutil.virtual_memory()
        return memory.total, memory.available
    return int(kilobytes[0] * 1024), int(kilobytes[1] * 1024)


def _os_name(root: Path) -> str:
    pairs = (line.partition("=") for line in (text_of(root / "etc/os-release") or "").splitlines())
    names = {key: value.strip('"') for key, _, value in pairs}
    return names.get("PRETTY_NAME") or platform.platform()

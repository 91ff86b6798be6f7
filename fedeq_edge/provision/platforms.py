"""What a bundle is built for: the wheels, the python and the CPU of a board, out of its profile in devices/."""

import re
from typing import Final, Literal

import msgspec

from fedeq_edge.errors import ConfigError
from fedeq_edge.hardware.profiles import Profile

Architecture = Literal["aarch64", "x86_64"]
# The oldest is what the package itself needs; the newest is what its wheels are tested with.
PYTHONS: Final = ("3.11", "3.12", "3.13")
# Debian, uname and Windows have names of their own for the same two.
_ALIASES: Final = {"arm64": "aarch64", "amd64": "x86_64", "x86-64": "x86_64"}
_TAG: Final = re.compile(r"manylinux_(\d+)_(\d+)_(aarch64|x86_64)")


class Platform(msgspec.Struct, frozen=True, kw_only=True):
    """A board as wheels see it.

    profile: its id in devices/. python: minor version, "3.11". glibc: the oldest that the wheels may ask for, "2.28".
    cpu_part: "CPU part" of /proc/cpuinfo; qemu_cpu: the qemu-aarch64 model that crashes where the board does; both
    empty on x86. pins: exact versions of wheels known to run there, where they are part of the bundle.
    """

    profile: str
    architecture: Architecture
    python: str
    glibc: str
    cpu_part: str = ""
    qemu_cpu: str = ""
    pins: dict[str, str] = {}

    @property
    def uv(self) -> str:
        """The platform in uv's words: aarch64-manylinux_2_28."""
        return f"{self.architecture}-manylinux_{self.glibc.replace('.', '_')}"


def platform_of(board: Profile, python: str | None = None) -> Platform:
    """The platform of a board; python: another minor than its operating system's usual. Raises ConfigError."""
    wanted = python or board.python
    if wanted not in PYTHONS:
        raise ConfigError(f"python {wanted!r}: bundles are built for {', '.join(PYTHONS)}; give --python one of them")
    tag = _TAG.fullmatch(board.wheel_tag)
    if tag is None or tag[3] != board.arch:
        raise ConfigError(
            f"board {board.id!r}: wheel_tag is {board.wheel_tag!r}, expected manylinux_MAJOR_MINOR_{board.arch} with "
            "arch aarch64 or x86_64; mend its profile.toml (a 32-bit board needs a 64-bit operating system)"
        )
    return Platform(
        profile=board.id,
        architecture="aarch64" if board.arch == "aarch64" else "x86_64",
        python=wanted,
        glibc=f"{tag[1]}.{tag[2]}",
        cpu_part=board.cpu_part,
        qemu_cpu=board.qemu_cpu,
        pins=board.pins,
    )


def architecture_of(machine: str) -> str:
    """The one name that we use for what `uname -m` or dpkg call an architecture."""
    return _ALIASES.get(machine.lower(), machine.lower())


def version_of(text: str) -> tuple[int, ...]:
    """The leading numbers of a dotted version, for comparing: 2.36-9 is (2, 36)."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()

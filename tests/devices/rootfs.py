"""Debian root file systems for boards that boot on this machine, built once and kept as tar files.

They hold what a fresh board's image holds that matters here, and nothing of fedeq-edge.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import psutil

from tests.devices.locks import alone_with

Architecture = Literal["amd64", "arm64"]

SUITE: Final = "bookworm"  # what Raspberry Pi OS was when python 3.11 became the boards' python
PACKAGES: Final = "python3,systemd,systemd-sysv,dbus,openssh-server,iproute2,procps,openssl,sudo"
_BUILD_S: Final = 900  # 30 s native, 180 s emulated; a slow mirror may take its time
_UNREAD: Final = "/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"
_SCRATCH: Final = 3 << 30  # a board with torch has 1.1 GB, before and after an update
_MEMORY: Final = 8 << 30  # two boards' scratch, and what runs
_BINFMT: Final = Path("/proc/sys/fs/binfmt_misc")


class RootfsError(Exception):
    """A root file system cannot be had here; the text is one line."""


def cache() -> Path:
    """Where built systems are kept between runs: FEDEQ_ROOTFS_CACHE, or the user's cache folder."""
    named = os.environ.get("FEDEQ_ROOTFS_CACHE", "")
    return Path(named) if named else Path.home() / ".cache" / "fedeq-edge" / "rootfs"


def missing(architecture: Architecture) -> str:
    """Why such a system can be neither built nor run here, in one line; empty if it can."""
    if os.geteuid() != 0:
        return "a booted board needs root"
    wanted = ["systemd-nspawn", "mmdebstrap", "ip", "nsenter", "script", "ssh", "ssh-keygen"]
    if architecture == "arm64":
        wanted += ["qemu-aarch64-static", "update-binfmts"]
    if absent := lacking(wanted):
        return f"not installed: {', '.join(absent)}; apt-get install {_DEBIAN}"
    return ""


def lacking(programs: Sequence[str]) -> list[str]:
    """Those that are not installed here."""
    return [name for name in programs if shutil.which(name, path=_PATH) is None]


_PATH: Final = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
_DEBIAN: Final = "mmdebstrap systemd-container qemu-user-static binfmt-support iproute2 openssh-client"


class Disk(Protocol):
    """What a board boots from. root: its mounted file system. mounts: folders here by where they are mounted on it."""

    root: Path
    mounts: Mapping[str, Path]

    def kernel_words(self) -> list[str]:
        """Its kernel's command line, as far as systemd reads it."""
        ...

    def close(self) -> None:
        """Nothing of it is mounted."""
        ...


class Layered:
    """A system to be written to, over the one in the cache, which stays as it is. Raises RootfsError.

    more: packages beside those that all have.
    """

    def __init__(self, architecture: Architecture, folder: Path, *more: str) -> None:
        self.root = folder / "root"
        self.root.mkdir()
        self.mounts: Mapping[str, Path] = {}
        lower = unpacked(architecture, *more)
        with contextlib.ExitStack() as mounting:
            written = mounting.enter_context(scratch(folder / "written"))
            upper, work = written / "upper", written / "work"
            upper.mkdir()
            work.mkdir()
            layers = f"lowerdir={lower},upperdir={upper},workdir={work}"
            must(["mount", "-t", "overlay", "overlay", "-o", layers, str(self.root)])
            mounting.callback(must, ["umount", str(self.root)])
            self._mounted = mounting.pop_all()

    def kernel_words(self) -> list[str]:
        return []

    def close(self) -> None:
        """What was written is gone, too."""
        self._mounted.close()


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """The new folder is there until the end, in memory where that is large enough.

    A board's installer has everything synced that this machine has written, and disks of test machines are slow.
    """
    folder.mkdir()
    in_memory = psutil.virtual_memory().available >= _MEMORY
    if in_memory:
        must(["mount", "-t", "tmpfs", "-o", f"size={_SCRATCH},mode=755", "tmpfs", str(folder)])
    try:
        yield folder
    finally:
        if in_memory:
            must(["umount", str(folder)])
        shutil.rmtree(folder)


def unpacked(architecture: Architecture, *more: str) -> Path:
    """The folder in the cache that holds the system with more packages, for reading. Raises RootfsError."""
    if architecture == "arm64":
        emulate()
    archive = built(architecture, *more)
    folder = archive.with_suffix("")
    with alone_with(folder):
        if not folder.exists():
            part = folder.with_name(f".{os.getpid()}-{folder.name}")
            part.mkdir()
            must(["tar", "--numeric-owner", "-xpf", str(archive), "-C", str(part)])
            part.rename(folder)
    return folder


def built(architecture: Architecture, *more: str) -> Path:
    """The tar file of such a system; it appears in the cache whole or not at all. Raises RootfsError."""
    packages = ",".join((PACKAGES, *more))
    recipe = hashlib.sha256(f"{SUITE} {packages} {_UNREAD}".encode()).hexdigest()[:8]
    archive = cache() / f"{SUITE}-{architecture}-{recipe}.tar"
    with alone_with(archive):
        if not archive.exists():
            part = archive.with_name(f".{os.getpid()}-{archive.name}")
            try:
                _build(architecture, packages, part)
                part.replace(archive)
            finally:
                part.unlink(missing_ok=True)
    return archive


def _build(architecture: Architecture, packages: str, archive: Path) -> None:
    options = [f"--dpkgopt=path-exclude={pattern}" for pattern in _UNREAD]
    command = ["mmdebstrap", "--variant=minbase", f"--architectures={architecture}", f"--include={packages}", *options]
    made = subprocess.run(
        [*command, SUITE, str(archive)], capture_output=True, text=True, timeout=_BUILD_S, check=False
    )
    if made.returncode != 0:
        raise RootfsError(f"mmdebstrap of {SUITE}: {made.stderr.strip().splitlines()[-1]}")


def emulate() -> None:
    """The kernel runs aarch64 programs by qemu-user; it stays so, because other programs may rely on it by then."""
    with alone_with(cache() / "binfmt"):
        if not (_BINFMT / "register").exists():
            must(["mount", "-t", "binfmt_misc", "binfmt_misc", str(_BINFMT)])
        if not (_BINFMT / "qemu-aarch64").exists():
            must(["update-binfmts", "--enable", "qemu-aarch64"])


def must(command: list[str], **more: Any) -> None:
    """The command ended well. Raises RootfsError with what it complained of."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": _PATH}, **more
    )
    if done.returncode != 0:
        raise RootfsError(f"{' '.join(command)}: {done.stderr.strip()}")

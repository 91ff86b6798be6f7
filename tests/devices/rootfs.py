"""Debian root file systems for boards that boot on this machine, built once and kept as tar files.

They hold what a fresh board's image holds that matters here, and nothing of fedeq-edge.
"""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final, Literal

Architecture = Literal["amd64", "arm64"]

SUITE: Final = "bookworm"  # what Raspberry Pi OS was when python 3.11 became the boards' python
PACKAGES: Final = "python3,systemd,systemd-sysv,dbus,openssh-server,iproute2,procps,openssl,sudo"
_BUILD_S: Final = 900  # 30 s native, 180 s emulated; a slow mirror may take its time
_UNREAD: Final = "/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"
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
    lacking = [name for name in wanted if shutil.which(name, path=_PATH) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)}; apt-get install {_DEBIAN}"
    return ""


_PATH: Final = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
_DEBIAN: Final = "mmdebstrap systemd-container qemu-user-static binfmt-support iproute2 openssh-client"


def mount(architecture: Architecture, folder: Path) -> Path:
    """A system to be written to at the path returned, inside `folder`, over the one in the cache, which stays as it is.

    `unmount` it. Raises RootfsError.
    """
    lower, upper, work, root = unpacked(architecture), folder / "written", folder / "work", folder / "root"
    for made in (upper, work, root):
        made.mkdir(parents=True)
    layers = f"lowerdir={lower},upperdir={upper},workdir={work}"
    _must(["mount", "-t", "overlay", "overlay", "-o", layers, str(root)])
    return root


def unmount(root: Path) -> None:
    """Nothing of the system is left but its folder, which is empty."""
    _must(["umount", str(root)])
    for written in ("written", "work"):
        shutil.rmtree(root.with_name(written))


def unpacked(architecture: Architecture) -> Path:
    """The folder in the cache that holds the system, for reading. Raises RootfsError."""
    if architecture == "arm64":
        emulate()
    archive = built(architecture)
    folder = archive.with_suffix("")
    if not folder.exists():
        part = folder.with_name(f".{os.getpid()}-{folder.name}")
        part.mkdir()
        _must(["tar", "--numeric-owner", "-xpf", str(archive), "-C", str(part)])
        part.rename(folder)
    return folder


def built(architecture: Architecture) -> Path:
    """The tar file of this architecture; it appears in the cache whole or not at all. Raises RootfsError."""
    recipe = hashlib.sha256(f"{SUITE} {PACKAGES} {_UNREAD}".encode()).hexdigest()[:8]
    archive = cache() / f"{SUITE}-{architecture}-{recipe}.tar"
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        part = archive.with_name(f".{os.getpid()}-{archive.name}")
        try:
            _build(architecture, part)
            part.replace(archive)
        finally:
            part.unlink(missing_ok=True)
    return archive


def _build(architecture: Architecture, archive: Path) -> None:
    options = [f"--dpkgopt=path-exclude={pattern}" for pattern in _UNREAD]
    command = ["mmdebstrap", "--variant=minbase", f"--architectures={architecture}", f"--include={PACKAGES}", *options]
    made = subprocess.run(
        [*command, SUITE, str(archive)], capture_output=True, text=True, timeout=_BUILD_S, check=False
    )
    if made.returncode != 0:
        raise RootfsError(f"mmdebstrap of {SUITE}: {made.stderr.strip().splitlines()[-1]}")


def emulate() -> None:
    """The kernel runs aarch64 programs by qemu-user; it stays so, because other programs may rely on it by then."""
    if not (_BINFMT / "register").exists():
        _must(["mount", "-t", "binfmt_misc", "binfmt_misc", str(_BINFMT)])
    if not (_BINFMT / "qemu-aarch64").exists():
        _must(["update-binfmts", "--enable", "qemu-aarch64"])


def _must(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": _PATH})
    if done.returncode != 0:
        raise RootfsError(f"{' '.join(command)}: {done.stderr.strip()}")

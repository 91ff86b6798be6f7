"""What a board is, as one JSON line on stdout: sent over stdin to its python3, so standard library only, python >= 3.7.

With an argument the tree of a mounted card is read instead of the running machine: nothing of it is run, so its
architecture may be another one; what only a running machine tells (memory, clock) is null then.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

# e_machine of an ELF header (elf.h) and the name that `uname -m` gives it.
MACHINES = {3: "i686", 40: "armv7l", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
# systemd saves a seed, cloud-init has an instance: booting leaves these, building an image does not.
MARKS = ("var/lib/systemd/random-seed", "var/lib/cloud/instance", "var/lib/cloud/instances")


def running() -> dict[str, object]:
    """This machine."""
    cpu = text(Path("/proc/cpuinfo"))
    libc, version = platform.libc_ver()
    memory = re.search(r"MemTotal:\s*(\d+) kB", text(Path("/proc/meminfo")))
    musl = any(path.name.startswith("ld-musl") for path in inside(Path("/lib")))
    return {
        "architecture": platform.machine(),
        "cpu_implementer": field(cpu, "CPU implementer"),
        "cpu_part": field(cpu, "CPU part"),
        "cpu_name": field(cpu, "model name"),
        "libc": libc or ("musl" if musl else ""),
        "glibc": version if libc == "glibc" else "",
        "python": ".".join(map(str, sys.version_info[:2])),
        "pythons": pythons(Path("/")),
        "free_disk_bytes": free_bytes(Path("/")),
        "memory_bytes": int(memory.group(1)) * 1024 if memory else None,
        "clock": int(time.time()),
        "systemd": systemd_running(),
        "machine_id": text(Path("/etc/machine-id")),
        "root": os.geteuid() == 0,
        "hostname": socket.gethostname(),
        "booted": True,
    }


def tree(root: Path) -> dict[str, object]:
    """The system whose files are at `root`, without running any of it."""
    libc = library(root, "libc.so.6")
    return {
        "architecture": elf_machine(root, libc),
        "cpu_implementer": "",
        "cpu_part": "",
        "cpu_name": "",
        "libc": "glibc" if libc else "musl",
        "glibc": glibc(libc) if libc else "",
        "python": python(root),
        "pythons": pythons(root),
        "free_disk_bytes": free_bytes(root),
        "memory_bytes": None,
        "clock": None,
        "systemd": systemd_installed(root),
        "machine_id": text(root / "etc/machine-id"),
        "root": os.access(str(root / "etc"), os.W_OK),
        "hostname": text(root / "etc/hostname"),
        "booted": any((root / mark).exists() or (root / mark).is_symlink() for mark in MARKS),
    }


def text(path: Path) -> str:
    """What the file holds, empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def inside(folder: Path) -> list[Path]:
    """What the folder holds, nothing where there is none."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def field(content: str, name: str) -> str:
    """The first value of `name : value` lines such as those of /proc/cpuinfo."""
    found = re.search(r"(?m)^" + re.escape(name) + r"\s*:\s*(.+)$", content)
    return found.group(1).strip() if found else ""


def free_bytes(root: Path) -> int:
    """Free on the file system that releases go to: /opt, or /opt/fedeq-edge, may be one of its own."""
    places = (root / "opt/fedeq-edge", root / "opt", root)
    return shutil.disk_usage(str(next(place for place in places if place.is_dir()))).free


def folders(root: Path) -> list[Path]:
    """Where shared libraries are: /usr/lib/<triplet> of Debian, /usr/lib and /usr/lib64 of others."""
    lib = root / "usr/lib"
    return [*(path for path in inside(lib) if "-linux-" in path.name), lib, root / "usr/lib64", root / "lib"]


def library(root: Path, name: str) -> Path | None:
    """A shared library of that system, None where it has none."""
    return next((folder / name for folder in folders(root) if (folder / name).is_file()), None)


def elf_machine(root: Path, libc: Path | None) -> str:
    """The processor that the system's programs are made for."""
    for path in filter(None, (libc, root / "usr/bin/env", root / "bin/busybox")):
        if path.is_file():
            with path.open("rb") as file:
                head = file.read(20)
            if head[:4] == b"\x7fELF":
                return MACHINES.get(struct.unpack_from("<H", head, 18)[0], "unknown")
    return ""


def glibc(path: Path) -> str:
    """The version that a glibc says of itself."""
    found = re.search(rb"GNU C Library [^\n]*version (\d+\.\d+)", path.read_bytes())
    return found.group(1).decode() if found else ""


def python(root: Path) -> str:
    """Minor version of /usr/bin/python3: where the link goes, or else the newest interpreter beside it."""
    link = root / "usr/bin/python3"
    target = [Path(os.readlink(str(link))).name] if link.is_symlink() else []  # noqa: PTH115  # 3.9 has the other
    found = (re.match(r"python3\.(\d+)$", name) for name in (path.name for path in inside(root / "usr/bin")))
    newest = sorted(int(match.group(1)) for match in found if match)[-1:]
    names = [*target, *("python3." + str(minor) for minor in newest)]
    matches = (re.match(r"python(3\.\d+)$", name) for name in names)
    return next((match.group(1) for match in matches if match), "")


def pythons(root: Path) -> list[str]:
    """Minor versions of the interpreters where a release looks for its own: others may be beside python3."""
    names = (path.name for folder in ("usr/bin", "usr/local/bin") for path in inside(root / folder))
    found = (re.match(r"python(3\.\d+)$", name) for name in names)
    return sorted({match.group(1) for match in found if match})


def systemd_running() -> int:
    """Version of the systemd that runs this machine, 0 where another init does."""
    try:
        asked = ["systemctl", "show", "--property=Version", "--value"]  # process 1 itself answers
        said = subprocess.run(asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False).stdout.decode()
    except OSError:
        return 0
    found = re.match(r"v?(\d+)", said)
    return int(found.group(1)) if found else 0


def systemd_installed(root: Path) -> int:
    """Version of the systemd that is there, out of the name of its library; 0 without."""
    names = (path.name for folder in folders(root) for path in inside(folder / "systemd"))
    found = (re.match(r"libsystemd-shared-(\d+)", name) for name in names)
    return next((int(match.group(1)) for match in found if match), 0)


if __name__ == "__main__":
    print(json.dumps(tree(Path(sys.argv[1])) if len(sys.argv) > 1 else running()))

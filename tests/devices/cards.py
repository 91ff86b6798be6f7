"""The image of a card: a FAT partition that other computers read, and the root of a system."""

import contextlib
import hashlib
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.conftest import until
from tests.devices import rootfs

BootFiles = Mapping[str, str]  # of the FAT partition: contents by name
FIRMWARE: Final = "/boot/firmware"  # where the system has its FAT partition
CMDLINE: Final = "console=tty1 root=PARTUUID=1-02 rootwait\n"
BOOKWORM: Final[BootFiles] = {"cmdline.txt": CMDLINE}
# A user's own: cloud-init would make new host keys and close root's door, and the system has one locale.
USER_DATA: Final = "#cloud-config\nhostname: mine\nssh_deletekeys: false\ndisable_root: false\nlocale: C.UTF-8\n"
TRIXIE: Final[BootFiles] = {"cmdline.txt": CMDLINE, "user-data": USER_DATA, "meta-data": "instance-id: rpi\n"}
NO_RASPBERRY: Final[BootFiles] = {"startup.nsh": "grubx64.efi\n"}
_MIB: Final = 1 << 20
_FAT_AT, _FAT_MIB = 4 * _MIB, 128  # a bundle and room for as much again
_ROOT_AT, _ROOT_MIB = _FAT_AT + _FAT_MIB * _MIB, 900
_PARTITIONS: Final = ((_FAT_AT, _FAT_MIB), (_ROOT_AT, _ROOT_MIB))
_SECTOR: Final = 512
_RELEASED_S: Final = 120.0
_TOOLS: Final = ("sfdisk", "mformat", "mcopy", "mke2fs", "debugfs")


def missing() -> str:
    """Why no card can be made here, in one line; empty if one can."""
    lacking = rootfs.lacking(_TOOLS)
    return f"not installed: {', '.join(lacking)}; apt-get install fdisk mtools e2fsprogs" if lacking else ""


class Card:
    """A card for x86-64 boards in the file `path`, not yet booted. Raises RootfsError.

    packages: of its system, beside those that all have.
    """

    def __init__(self, path: Path, boot_files: BootFiles, *packages: str) -> None:
        self.path = path
        with path.open("wb") as image:
            image.truncate(_ROOT_AT + (_ROOT_MIB + 1) * _MIB)
        first, second = (f"{at // _SECTOR},{size * _MIB // _SECTOR}" for at, size in _PARTITIONS)
        rootfs.must(["sfdisk", "--quiet", str(path)], input=f"label: dos\n{first},c,*\n{second},83\n")
        rootfs.must(["mformat", "-i", self.boot, "-T", str(_FAT_MIB * _MIB // _SECTOR), "-h", "4", "-s", "16", "::"])
        system = str(rootfs.unpacked("amd64", *packages))
        place = ["-E", f"offset={_ROOT_AT}", str(path), f"{_ROOT_MIB}M"]
        rootfs.must(["mke2fs", "-q", "-F", "-t", "ext4", "-d", system, *place])
        for name, content in boot_files.items():
            rootfs.must(["mcopy", "-i", self.boot, "-", f"::/{name}"], input=content)

    def fat(self, name: str) -> bytes:
        """A file of the FAT partition. Raises CalledProcessError where there is none."""
        return subprocess.run(["mtype", "-i", self.boot, f"::/{name}"], capture_output=True, check=True).stdout

    def digest(self) -> str:
        """Of every byte."""
        with self.path.open("rb") as image:
            return hashlib.file_digest(image, "sha256").hexdigest()

    @property
    def boot(self) -> str:
        """The FAT partition as mtools name it."""
        return f"{self.path}@@{_FAT_AT}"


class Inserted:
    """A card in a board: its partitions are where the system looks for them; `close` pulls it out.

    Few kernels of test machines know FAT, so that its files are copied out of the partition, and back in the end.
    """

    def __init__(self, card: Card, folder: Path) -> None:
        self._card = card
        self.root, self.firmware = folder / "root", folder / "firmware"
        for made in (self.root, self.firmware):
            made.mkdir()
        rootfs.must(["mount", "-o", f"loop,offset={_ROOT_AT}", str(card.path), str(self.root)])
        rootfs.must(["mcopy", "-s", "-n", "-i", card.boot, "::/", str(self.firmware)])
        for path in self.firmware.rglob("*"):
            path.chmod(0o755)  # as vfat shows all files, scripts among them
        self.mounts: Mapping[str, Path] = {FIRMWARE: self.firmware}

    def kernel_words(self) -> list[str]:
        """What cmdline.txt says to systemd: the firmware reads it anew at each boot."""
        cmdline = self.firmware / "cmdline.txt"
        words = cmdline.read_text().split() if cmdline.exists() else []
        return [word for word in words if word.startswith("systemd.")]

    def close(self) -> None:
        """The card is as the board left it, and not mounted."""
        rootfs.must(["umount", str(self.root)])
        # Another board that starts just then holds a copy of all mounts for a moment, on a busy machine for longer.
        until(lambda: str(self._card.path) not in _behind_loops(), "what the board wrote is on the card", _RELEASED_S)
        rootfs.must(["mdeltree", "-i", self._card.boot, "::/*"])
        rootfs.must(["mcopy", "-s", "-i", self._card.boot, *map(str, self.firmware.iterdir()), "::/"])
        shutil.rmtree(self.firmware)


def _behind_loops() -> set[str]:
    """The files that loop devices show as disks."""
    found = set()
    for loop in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # it is gone by now
            found.add(loop.read_text().strip())
    return found

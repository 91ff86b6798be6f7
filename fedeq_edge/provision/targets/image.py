"""A card, or the image of one: read and written without mounting it and, for an image file, without root."""

import tempfile
from pathlib import Path
from typing import Final

import msgspec

from fedeq_edge.errors import Exit, ProvisionError
from fedeq_edge.provision.facts import Facts
from fedeq_edge.provision.layout import Layout
from fedeq_edge.provision.targets import disks, partitions
from fedeq_edge.provision.targets.rootfs import facts_of_tree

FOLDER: Final = "fedeq"  # on the boot partition
_MARKS: Final = ("var/lib/systemd/random-seed", "var/lib/cloud/instance", "var/lib/cloud/instances")
_TEXTS: Final = ("etc/hostname", "etc/machine-id")


class ImageTarget:
    """A card.img or /dev/sdX. boot: its FAT partition, root: its ext4 partition, None where it has none.

    Raises ProvisionError on a disk of this machine, a disk in use, and what holds no operating system.
    """

    def __init__(self, path: Path) -> None:
        disks.check_writable(path)
        self.name = str(path)
        self.layout = Layout()
        self.boot, self.root = partitions.find(path)
        if self.root is None:
            raise ProvisionError(
                Exit.MISUSED,
                f"{path} has no ext4 partition to boot from; write an operating system to it first (rpi-imager, dd)",
            )

    def facts(self) -> Facts:
        """What the system on the card is. Its disk is as large as the card, which grows at first boot: None."""
        assert self.root is not None
        with tempfile.TemporaryDirectory() as folder:
            _excerpt(self.root, Path(folder))
            found = facts_of_tree(Path(folder))
        return msgspec.structs.replace(found, free_disk_bytes=None, root=True, booted=found.booted or self._reported())

    def _reported(self) -> bool:
        """A first boot wrote its status to the boot partition."""
        return self.boot is not None and self.boot.read(f"{FOLDER}/status.json") is not None

    def close(self) -> None:
        """Nothing was open."""


def _excerpt(root: partitions.Ext4, into: Path) -> None:
    """The few files that facts are read from, in the places that they have on the card."""
    for path in (*_MARKS, *_TEXTS):
        if root.exists(path):
            _copy(into / path, root.read(path) or b"" if path in _TEXTS else b"")
    for name in root.names("usr/bin"):
        if name.startswith("python3."):
            _copy(into / "usr/bin" / name, b"")
    if link := root.link("usr/bin/python3"):
        (into / "usr/bin").mkdir(parents=True, exist_ok=True)
        (into / "usr/bin/python3").symlink_to(link)
    triplets = [f"usr/lib/{name}" for name in root.names("usr/lib") if "-linux-" in name]
    for folder in (*triplets, "usr/lib", "usr/lib64"):
        if (library := root.read(f"{folder}/libc.so.6")) is not None:
            _copy(into / folder / "libc.so.6", library)
        for name in root.names(f"{folder}/systemd"):
            if name.startswith("libsystemd-shared"):
                _copy(into / folder / "systemd" / name, b"")


def _copy(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)

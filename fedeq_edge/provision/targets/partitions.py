"""Files inside the partitions of a card or its image, without mounting: mtools for FAT, debugfs for ext4, no root.

Every write is read back from the medium and compared, because a card that is worn out takes writes without a word.
"""

import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Protocol

from fedeq_edge.errors import Exit, ProvisionError

_EXT_MAGIC_AT: Final = 1024 + 56  # superblock at 1024, s_magic 56 bytes into it (Documentation/filesystems/ext4)
_EXT_MAGIC: Final = b"\x53\xef"
_FAT_MARKS: Final = ((0x36, b"FAT"), (0x52, b"FAT32"))  # BS_FilSysType of FAT12/16 and of FAT32
_PACKAGES: Final = {
    "sfdisk": "fdisk",
    "mcopy": "mtools",
    "mtype": "mtools",
    "mmd": "mtools",
    "mdel": "mtools",
    "mdir": "mtools",
    "debugfs": "e2fsprogs",
}


class Partition(Protocol):
    """A file system inside a card or its image; paths are relative to its root."""

    def read(self, path: str) -> bytes | None:
        """What the file holds, None where there is none."""
        ...

    def write(self, path: str, content: bytes, *, mode: int = 0o644) -> None:
        """The file holds `content`, compared on the medium; its folders are made. Raises ProvisionError."""
        ...

    def remove(self, path: str) -> None:
        """There is no such file. Raises ProvisionError where it stays."""
        ...

    def free_bytes(self) -> int:
        """How much more it can hold."""
        ...


def find(image: Path) -> tuple["Fat | None", "Ext4 | None"]:
    """The first FAT and the first ext4 partition, told by what is in them. Raises ProvisionError without a table."""
    done = _tool(["sfdisk", "--json", str(image)])
    if done.returncode:
        raise ProvisionError(
            Exit.MISUSED, f"{image} has no partition table; write an operating system to it first (rpi-imager, dd)"
        )
    table = json.loads(done.stdout)["partitiontable"]
    starts = [part["start"] * table.get("sectorsize", 512) for part in table.get("partitions", [])]
    heads = [(start, _head(image, start)) for start in starts]
    fat = next((Fat(image, start) for start, head in heads if _is_fat(head)), None)
    ext = next((Ext4(image, start) for start, head in heads if head[_EXT_MAGIC_AT:][:2] == _EXT_MAGIC), None)
    return fat, ext


def _head(image: Path, start: int) -> bytes:
    with image.open("rb") as file:
        file.seek(start)
        return file.read(2048)


def _is_fat(head: bytes) -> bool:
    return any(head[at : at + len(mark)] == mark for at, mark in _FAT_MARKS)


@dataclass(frozen=True, slots=True)
class Fat:
    """A FAT partition that begins at byte `start`; modes mean nothing on it."""

    image: Path
    start: int

    def read(self, path: str) -> bytes | None:
        """What the file holds, None where there is none."""
        done = self._mtools("mtype", f"::/{path}")
        return None if done.returncode else done.stdout

    def write(self, path: str, content: bytes, *, mode: int = 0o644) -> None:  # noqa: ARG002  # FAT has no modes
        """The file holds `content`, compared on the medium."""
        for folder in reversed(PurePosixPath(path).parents[:-1]):
            if self._mtools("mdir", "-b", f"::/{folder}").returncode:
                _check(self._mtools("mmd", f"::/{folder}"), self.image, str(folder))
        with tempfile.NamedTemporaryFile() as source:
            source.write(content)
            source.flush()
            _check(self._mtools("mcopy", "-o", source.name, f"::/{path}"), self.image, path)
        _flush(self.image)
        _compare(self.image, path, content, self.read(path))

    def remove(self, path: str) -> None:
        """There is no such file."""
        if self.read(path) is not None:
            _check(self._mtools("mdel", f"::/{path}"), self.image, path)
            _flush(self.image)

    def free_bytes(self) -> int:
        """How much more it can hold."""
        found = re.search(rb"([\d ]+) bytes free", self._mtools("mdir", "::/").stdout)
        return int(found.group(1).replace(b" ", b"")) if found else 0

    def _mtools(self, command: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        # Images of Raspberry Pi OS break a geometry rule of DOS that nothing else cares for.
        return _tool([command, "-i", f"{self.image}@@{self.start}", *arguments], {"MTOOLS_SKIP_CHECK": "1"})


@dataclass(frozen=True, slots=True)
class Ext4:
    """An ext2, 3 or 4 partition that begins at byte `start`; files that are written are root's."""

    image: Path
    start: int

    def read(self, path: str) -> bytes | None:
        """What the file holds, None where there is none."""
        done = self._debugfs(f"cat /{path}")
        return None if _complaint(done) else done.stdout

    def exists(self, path: str) -> bool:
        """A file, folder or link of this name is there."""
        return b"Inode:" in self._debugfs(f"stat /{path}").stdout

    def link(self, path: str) -> str:
        """Where a symbolic link goes, empty where it is none."""
        found = re.search(rb'link dest: "([^"]+)"', self._debugfs(f"stat /{path}").stdout)
        return found.group(1).decode() if found else ""

    def names(self, path: str) -> list[str]:
        """What the folder holds."""
        lines = self._debugfs(f"ls -p /{path}").stdout.decode(errors="replace").splitlines()
        fields = (line.split("/") for line in lines if line.startswith("/"))
        return [field[5] for field in fields if len(field) > 5 and field[5] not in (".", "..")]

    def write(self, path: str, content: bytes, *, mode: int = 0o644) -> None:
        """The file holds `content`, compared on the medium."""
        with tempfile.NamedTemporaryFile() as source:
            source.write(content)
            source.flush()
            remove = [f"rm /{path}"] if self.exists(path) else []  # debugfs does not overwrite
            mark = f"set_inode_field /{path} mode 0{0o100000 | mode:o}"
            self._change([*self._folders(path), *remove, f"write {source.name} /{path}", mark], path)
        _flush(self.image)
        _compare(self.image, path, content, self.read(path))

    def remove(self, path: str) -> None:
        """There is no such file."""
        if self.exists(path):
            self._change([f"rm /{path}"], path)
            _flush(self.image)

    def symlink(self, path: str, destination: str) -> None:
        """`path` is a symbolic link to `destination`."""
        if self.link(path) != destination:
            self._change([*self._folders(path), f"symlink /{path} {destination}"], path)
            _flush(self.image)

    def free_bytes(self) -> int:
        """How much more it can hold."""
        said = self._debugfs("stats -h").stdout
        free, size = (re.search(name + rb":\s+(\d+)", said) for name in (rb"Free blocks", rb"Block size"))
        return int(free.group(1)) * int(size.group(1)) if free and size else 0

    def _folders(self, path: str) -> list[str]:
        missing = itertools.takewhile(lambda folder: not self.exists(str(folder)), PurePosixPath(path).parents[:-1])
        return [f"mkdir /{folder}" for folder in reversed(list(missing))]

    def _change(self, commands: Sequence[str], path: str) -> None:
        for command in commands:
            done = self._debugfs(command, write=True)
            if said := _complaint(done):
                raise ProvisionError(Exit.FAILED, f"{self.image}: cannot write {path}: {said}; run e2fsck on it")

    def _debugfs(self, command: str, *, write: bool = False) -> subprocess.CompletedProcess[bytes]:
        return _tool(["debugfs", *(["-w"] if write else []), "-R", command, f"{self.image}?offset={self.start}"])


def _complaint(done: subprocess.CompletedProcess[bytes]) -> str:
    """What debugfs could not do: its first line is the version, its status always 0."""
    return done.stderr.split(b"\n", 1)[-1].decode(errors="replace").strip()


def _tool(command: Sequence[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # where Debian has sfdisk and debugfs, for root alone
    try:
        return subprocess.run(
            command,
            capture_output=True,
            check=False,
            timeout=600,
            env={**os.environ, "LC_ALL": "C", **(environment or {}), "PATH": path},
        )
    except FileNotFoundError as error:
        package = _PACKAGES[command[0]]
        raise ProvisionError(
            Exit.FAILED, f"{command[0]} is needed to write cards and is not installed; apt-get install {package}"
        ) from error


def _check(done: subprocess.CompletedProcess[bytes], image: Path, path: str) -> None:
    if done.returncode == 0:
        return
    said = done.stderr.decode(errors="replace").strip().splitlines()
    code = Exit.NO_SPACE if b"full" in done.stderr.lower() else Exit.FAILED
    reason = said[-1] if said else f"exit status {done.returncode}"
    raise ProvisionError(code, f"{image}: cannot write {path}: {reason}; is the card full or locked?")


def _flush(image: Path) -> None:
    """What was written is on the medium, and the next read comes from there (as far as the kernel obeys)."""
    handle = os.open(image, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def _compare(image: Path, path: str, wanted: bytes, found: bytes | None) -> None:
    if found != wanted:
        raise ProvisionError(
            Exit.VERIFICATION, f"{image}: {path} reads back differently from what was written; use another card"
        )

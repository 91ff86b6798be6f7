"""Files that are whole or not there: atomic replacement, checksums, and one owner of a folder at a time."""

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from fedeq_edge import structs
from fedeq_edge.errors import StateError

_MAGIC: Final = b"FDQS0002"
_DIGEST_BYTES: Final = 32
_LIMIT_BYTES: Final = 2**31  # a state file beyond this is not ours
T = TypeVar("T")


def write_atomically(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """`path` holds `content`, on the disk, or what it held before. Raises StateError where the disk refuses.

    mode: who may read and write a new file, less the umask; 0o600 for secrets.
    """
    neighbour = path.with_name(f".{path.name}.new")
    with writing(path):
        handle = os.open(neighbour, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(handle, "wb") as output:
            output.write(content)
            output.flush()
            os.fsync(output.fileno())
        neighbour.replace(path)
        sync(path.parent)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the disk refuses inside becomes a StateError that names `path`."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space" if full else "check its owner"
        raise StateError(f"cannot write {path}: {error.strerror}; {remedy} or choose another folder") from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the disk refuses inside, an absent file apart, becomes a StateError that names `path`."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StateError(f"state file {path} cannot be read: {error.strerror}; check its owner and its disk") from error


def sync(path: Path) -> None:
    """What was written to this file, or the names in this folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(path: Path, value: object) -> None:
    """Write a struct with numpy vectors in it, with its checksum."""
    write_atomically(path, b"".join(sealed(structs.pack(value))))


def load(path: Path, kind: type[T]) -> T | None:
    """What `save` wrote, None where there is no such file. Raises StateError where it is damaged."""
    content = read_sealed(path)
    if content is None:
        return None
    try:
        return structs.unpack(content, kind)
    except msgspec.ValidationError as error:
        raise damaged(path, str(error)) from error


def sealed(content: bytes | memoryview) -> tuple[bytes, bytes, bytes | memoryview]:
    """What a sealed file holds, one after the other: magic of the format, sha256 of `content`, `content`."""
    return _MAGIC, hashlib.sha256(content).digest(), content


def read_sealed(path: Path) -> bytes | None:
    """The content that was `sealed` into this file, None where there is none. Raises StateError where it is damaged."""
    try:
        with reading(path):
            if path.stat().st_size > _LIMIT_BYTES:
                raise damaged(path, "it is too large")
            raw = path.read_bytes()
    except FileNotFoundError:
        return None
    start = len(_MAGIC) + _DIGEST_BYTES
    content = raw[start:]
    if raw[: len(_MAGIC)] != _MAGIC:
        raise damaged(path, "it is no state file of this version of fedeq-edge")
    if hashlib.sha256(content).digest() != raw[len(_MAGIC) : start]:
        raise damaged(path, "its checksum differs")
    return content


def damaged(path: Path, why: str) -> StateError:
    """The error for a file that is not as we wrote it."""
    return StateError(f"state file {path} is damaged ({why}); restore it from a backup, or delete it to start anew")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """`folder` exists and is ours alone until the end. Raises StateError where another process has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / "lock").open("w")
    except OSError as error:
        raise StateError(f"state folder {folder} cannot be used: {error.strerror}; check its path and owner") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StateError(
                f"state folder {folder} is in use by another process; stop it or use another folder"
            ) from error
        yield folder

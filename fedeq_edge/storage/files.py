"""Files that are whole or not there, with a checksum where numpy's vectors are in them."""

import hashlib
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from fedeq_edge import structs
from fedeq_edge.atomic import locked, reading, sync, write_atomically, writing
from fedeq_edge.errors import StateError

__all__ = [
    "SEAL",
    "damaged",
    "load",
    "locked",
    "read_sealed",
    "reading",
    "save",
    "sealed",
    "sync",
    "write_atomically",
    "writing",
]

SEAL: Final = b"FDQS"
"""First bytes of every sealed file, of whatever version."""
_MAGIC: Final = SEAL + b"0002"
_DIGEST_BYTES: Final = 32
_LIMIT_BYTES: Final = 2**31  # a state file beyond this is not ours
T = TypeVar("T")


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

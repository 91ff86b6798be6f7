"""Small JSON files that several programs read and write: whole, or as they were; one writer at a time."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fedeq_edge.atomic import reading, write_atomically, writing
from fedeq_edge.errors import StateError

T = TypeVar("T")


def read(path: Path, kind: type[T]) -> T | None:
    """What the file holds, None where there is none. Raises StateError where it is damaged: nobody guesses."""
    try:
        with reading(path):
            content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.DecodeError as error:
        # not to be deleted, as other state may be: without its list a revoked device would be let in
        raise StateError(f"{path} is damaged ({error}); restore it from a backup") from error


def write(path: Path, value: Any) -> None:
    """The file holds `value`, for its owner alone; text that a person may read."""
    content = msgspec.json.format(msgspec.json.encode(value), indent=2)
    write_atomically(path, content + b"\n", mode=0o600)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Nobody else is inside a `held` of this folder, no thread and no process; waits for its turn."""
    with writing(folder / ".lock"):
        handle = (folder / ".lock").open("w")
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield

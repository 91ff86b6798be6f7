"""Files that are whole or as they were, and one owner of a folder at a time; needs the standard library alone."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fedeq_edge.errors import StateError


def write_atomically(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """`path` holds `content`, on the disk, or what it held before. Raises StateError where the disk refuses.

    mode: who may read and write a new file, less the umask; 0o600 for secrets.
    """
    neighbour = path.with_name(f".{path.name}.new")
    with writing(path):
        if path.exists() and not path.is_file():  # a device (/dev/stdout) would be gone
            raise StateError(f"cannot write {path}: it is no regular file; choose another name")
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

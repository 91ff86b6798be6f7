"""What several test processes share on disk is made by one of them while the others wait."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def alone_with(path: Path) -> Iterator[None]:
    """Until the end no other process that asks for it works on `path`, which need not exist; its folder does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

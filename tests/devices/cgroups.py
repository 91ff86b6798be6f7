"""A control group for each board: systemd-nspawn calls its own `payload` in whatever group it is started in.

Two boards started in one group would share that, and systemd on one would kill the processes of the other.
"""

import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.conftest import until

_TOP: Final = Path("/sys/fs/cgroup")
_ENTER: Final = 'for group in $GROUPS_TO_ENTER; do echo $$ > "$group/cgroup.procs"; done; exec "$@"'


class Group:
    """A group of this name in each hierarchy that systemd uses."""

    def __init__(self, name: str) -> None:
        self.folders = [hierarchy / name for hierarchy in _hierarchies()]
        for folder in self.folders:
            folder.mkdir()

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command, entering the group before it starts."""
        groups = " ".join(map(str, self.folders))
        return ["env", f"GROUPS_TO_ENTER={groups}", "sh", "-c", _ENTER, "sh", *command]

    def pids(self) -> set[int]:
        """Every process in it and in the groups below."""
        lists = [path for folder in self.folders for path in folder.rglob("cgroup.procs")]
        return {int(word) for path in lists for word in _text(path).split()}

    def kill(self) -> None:
        """No process is left."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        until(lambda: not self.pids(), "a board's processes die")

    def close(self) -> None:
        """No process and no group is left."""
        self.kill()
        for folder in self.folders:
            for inner, _, _ in os.walk(folder, topdown=False):
                Path(inner).rmdir()


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):  # groups come and go
        return path.read_text()
    return ""


def _hierarchies() -> list[Path]:
    """systemd's named hierarchy of version 1 and the unified one beside it, or version 2 alone."""
    beside = [_TOP / name for name in ("systemd", "unified") if (_TOP / name / "cgroup.procs").exists()]
    return beside or [_TOP]

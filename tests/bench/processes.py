"""What the benches read of processes, and the line in which a child tells it to its parent."""

import contextlib
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

_SCHEDULER_CLOCK = 2  # CPUCLOCK_SCHED of Linux: nanoseconds of CPU of a whole process, threads that have ended included


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has taken so far, by the kernel's nanosecond clock of it."""
    return time.clock_gettime((~pid << 3) | _SCHEDULER_CLOCK)


def memory_bytes(pid: int, field: str) -> int:
    """A field of /proc/PID/status: "VmRSS" is what is resident now, "VmHWM" the most that ever was."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """Taken when a process of links first hears of a round.

    cpu: seconds so far, by the name of a process. up, down: mean bytes so far of a link in the process that reads.
    """

    round: int
    cpu: dict[str, float]
    up: float = 0.0
    down: float = 0.0


@dataclass(slots=True)
class Recorder:
    """Prints a reading for every round that begins. watched: pids by name."""

    watched: Mapping[str, int]
    _round: int = 0

    def round_begins(self, number: int) -> bool:
        """Whether nobody had heard of this round before."""
        new, self._round = number > self._round, max(number, self._round)
        return new

    def record(self, number: int, up: float = 0.0, down: float = 0.0) -> None:
        """One line on stdout."""
        cpu = {name: cpu_seconds(pid) for name, pid in self.watched.items()}
        print(msgspec.json.encode(Reading(round=number, cpu=cpu, up=up, down=down)).decode(), flush=True)


def watched(pairs: Sequence[str]) -> dict[str, int]:
    """NAME=PID arguments as a mapping."""
    return {name: int(pid) for name, _, pid in (pair.partition("=") for pair in pairs)}


@contextlib.contextmanager
def child(command: Sequence[str], log: IO[bytes]) -> Iterator["subprocess.Popen[str]"]:
    """A process that ends with the context; its stdout is a pipe, its stderr goes to `log`."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()

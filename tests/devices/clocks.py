"""Boards without a clock: our programs on them read 1970, by a library, as a container has no time of its own.

libfaketime has one more of these functions, clock_nanosleep, and takes a deadline of the monotonic clock for a date.
"""

import shutil
import subprocess
import time
from typing import Final

from tests.devices.board import Board

_UNITS: Final = ("fedeq-agent", "fedeq-updater", "fedeq-first-boot")
_LIBRARY: Final = "/usr/local/lib/no_clock.so"
_SOURCE: Final = r"""
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec -= BEHIND;
    return failed;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int failed = syscall(SYS_gettimeofday, now, zone);
    if (!failed) now->tv_sec -= BEHIND;
    return failed;
}
time_t time(time_t *there) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (there) *there = now.tv_sec;
    return now.tv_sec;
}
"""


def missing() -> str:
    """Why no board can lose its clock here, in one line; empty if it can."""
    return "" if shutil.which("cc") else "not installed: cc; apt-get install gcc libc6-dev"


def stand_in_1970(board: Board) -> None:
    """Our units, and whoever comes by ssh, find a clock that begins in 1970. The board is off."""
    path = board.root / _LIBRARY.lstrip("/")
    command = ["cc", "-shared", "-fPIC", f"-DBEHIND={time.time():.0f}L", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=_SOURCE.encode(), check=True)
    preload = f"LD_PRELOAD={_LIBRARY}\n"
    (board.root / "etc/environment").write_text(preload)
    for unit in _UNITS:
        drop_in = board.root / f"etc/systemd/system/{unit}.service.d/clock.conf"
        drop_in.parent.mkdir(parents=True)
        drop_in.write_text(f"[Service]\nEnvironment={preload}")

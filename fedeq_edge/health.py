"""Whether this installation can do its work: one real solve, and what is told to systemd of it.

numpy alone. A unit of Type=notify has started when READY has been said, so `systemctl restart` is the health check
of a new release; whether the network is there is no part of it, or a pulled cable would roll a good release back.
"""

import contextlib
import os
import socket
import time
from typing import Final

import msgspec
import numpy as np

from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.numeric import NumpyDEQ
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import SolverError

_SPEC: Final = ModelSpec(input_shape=(16,), classes=4, channels=32)
_BUDGET: Final = 60
_TOL: Final = 1e-4


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """One solve. residual: relative, evaluations: spent on the slowest sample, seconds: of wall time."""

    residual: float
    evaluations: int
    seconds: float


def solve() -> Health:
    """The fixed points of a small model of known weights. Raises SolverError where they are not found."""
    started = time.perf_counter()
    model = NumpyDEQ(_SPEC, *initial(_SPEC, 0))
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    answer = model.infer(x, budget=_BUDGET, tol=_TOL)
    found = Health(
        residual=float(answer.residual.max()),
        evaluations=int(answer.evaluations.max()),
        seconds=time.perf_counter() - started,
    )
    if not found.residual <= _TOL:
        raise SolverError(
            f"health: residual {found.residual:.2g} after {found.evaluations} evaluations, {_TOL:g} is expected; "
            "numpy computes wrongly here, install another build of it"
        )
    return found


def notify(text: str) -> None:
    """Tell systemd, if it listens: READY=1, STATUS=..., WATCHDOG=1 (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.sendto(text.encode(), address)


def watchdog_s() -> float | None:
    """How often WATCHDOG=1 is due: twice in the unit's WatchdogSec; None without one."""
    limit = os.environ.get("WATCHDOG_USEC", "")
    return int(limit) / 2e6 if limit.isdecimal() else None

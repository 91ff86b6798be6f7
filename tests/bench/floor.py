"""What a contribution takes of a processor whatever the protocol: its name, its place on the disk, its step.

numpy and the system alone, each at its best: in parts that fit a cache, over a file that is there already.
"""

import hashlib
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from fedeq_edge.training.step import Vector

_REPEATS: Final = 50
_TOGETHER: Final = 10  # contributions that share a commit at an aggregator of a hundred devices
_PART: Final = 8192
_UNIT: Final = 0.1 * 2.0**32  # a penalty, in units of the fixed point


def required(size: int, folder: Path) -> tuple[float, float]:
    """CPU seconds of (a client, the aggregator) for one contribution of `size` float32 values.

    Both: sha256 of the blob, one write of it, the step of the dual and its addition. The client: sha256 of the
    consensus that it gets, and an fdatasync of its own.
    """
    difference = np.random.default_rng(0).normal(0.0, 1e-3, size).astype(np.float32)
    blob, total = difference.tobytes(), np.zeros(size, np.int64)
    handle = os.open(folder / "floor", os.O_RDWR | os.O_CREAT)

    def write(syncs: bool) -> None:
        os.pwrite(handle, blob, 0)
        if syncs:
            os.fdatasync(handle)

    name, step = _cost(lambda: hashlib.sha256(blob).digest()), _cost(lambda: _move(total, difference))
    written, synced = _cost(lambda: write(syncs=False)), _cost(lambda: write(syncs=True))
    os.close(handle)
    return 2 * name + step + synced, name + step + written + (synced - written) / _TOGETHER


def _move(total: np.ndarray[tuple[int], np.dtype[np.int64]], difference: Vector) -> None:
    for start in range(0, difference.size, _PART):
        part = slice(start, start + _PART)
        exact = difference[part].astype(np.float64)
        exact *= _UNIT
        np.rint(exact, out=exact)
        total[part] += exact.astype(np.int64)


def _cost(work: Callable[[], object]) -> float:
    return statistics.median(_once(work) for _ in range(_REPEATS))


def _once(work: Callable[[], object]) -> float:
    before = time.thread_time()
    work()
    return time.thread_time() - before

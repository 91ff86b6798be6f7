"""Contributions to store, and a disk that forgets what was not synced."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedeq_edge.consensus.fixed import WHOLE, FixedVector, dual_step
from fedeq_edge.wire import coding, messages

KAPPA = 0.25
METRICS = messages.Metrics(
    loss=1.0,
    residual=0.1,
    backward_residual=0.1,
    forward=3,
    adjoint=3,
    seconds=1.0,
    accuracy=0.5,
    reduced=False,
    wire_up=1,
    wire_down=1,
)


def blob_of(values: NDArray[np.float32], codec: str = "f32") -> bytes:
    """A contribution message with these values."""
    message = messages.Contribution(
        run="r", round=1, boot="b", base=bytes(32), samples=5, codec=codec, length=values.size, metrics=METRICS
    )
    return messages.encode(message, coding.encode(codec, values, random.Random(0)))


def step_of(blob: bytes, kappa: float = KAPPA, factor: int = WHOLE) -> FixedVector:
    """What nu moves by when this contribution is accepted."""
    received = messages.decode(blob)
    assert isinstance(received.message, messages.Contribution)
    difference = coding.decode(received.message.codec, received.body, received.message.length)
    return dual_step(difference.astype(np.float64) * (factor / WHOLE), kappa, 32)


class Disk:
    """What would survive a power cut: the size of each file when it was last synced. No sync takes time here."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.syncs = 0
        self._safe: dict[int, int] = {}
        patch.setattr(os, "fsync", self._sync)
        patch.setattr(os, "fdatasync", self._sync)

    def safe_bytes(self, path: Path) -> int:
        """Of this file, as it is now."""
        return self._safe.get(path.stat().st_ino, 0)

    def _sync(self, handle: int) -> None:
        self.syncs += 1
        self._safe[os.fstat(handle).st_ino] = os.fstat(handle).st_size

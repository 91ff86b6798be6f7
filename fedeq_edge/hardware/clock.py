"""Seconds as the device would count them.

A real device is judged by wall time: that is what a round's deadline is made of. Emulated devices share
the host's cores, so wall time would measure the neighbours; for them the process's own CPU time,
multiplied by the board's slowdown, stands for the seconds that the board would have taken. CPU time adds
up over threads: an emulated device must compute on one thread, as its slowdown is that of a single core.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

Clock = Callable[[], float]
"""Monotonic device seconds from an arbitrary origin; a test passes its own."""


@dataclass(frozen=True, slots=True)
class DeviceClock:
    """A `Clock`: wall seconds on a real device, CPU seconds of this process times `slowdown` when emulating.

    slowdown: how many times slower the emulated board is than this host's core; 1.0 on the real device.
    shared: this process emulates a board at the host's own speed beside others, so wall time would mislead.
    """

    slowdown: float = 1.0
    shared: bool = False

    def __post_init__(self) -> None:
        if not self.slowdown > 0:
            raise ValueError(f"slowdown must be positive, got {self.slowdown}")

    @property
    def emulated(self) -> bool:
        """Whether seconds are computed rather than waited for."""
        return self.shared or self.slowdown != 1.0

    def __call__(self) -> float:
        """Device seconds now."""
        return time.process_time() * self.slowdown if self.emulated else time.perf_counter()

"""Robust fusion: what a contribution may do at most, and centres of a round that a lying minority cannot move far.

Theory of operation
-------------------
Every bound is fixed while a round is open: it depends on rounds that are closed, never on who came first.

`Screen` compares a contribution with the median norm of the last ones. With `robust = "clip"` a larger one is scaled
down to `clip` medians, and the client moves its dual by the very same scaled difference, so both hold the same nu.
The bound is relative, as d_i goes to 0 at the optimum: under an absolute one a liar who keeps its step would move H
without end. As the median shrinks, the way that is left to a liar is finite. So is that of an honest device that has
farther to go than most: a clipped fleet ends near its optimum, not at it. What liars have moved H by stays in it until
they are retired, which takes it out exactly. With `norm_limit` a larger contribution is refused instead.
As long as there is no median the contributions are measured and count nothing (factor 0). A first round taken at face
value would let a liar put any vector into H.

The direction bound is for a device that turns against a fleet on its way, as with swapped labels. Near an optimum of
duals the directions are noise, and honest devices are refused as often as others.

`fuse` is the coordinate-wise median or trimmed mean of a whole round (Yin, Chen, Ramchandran, Bartlett, ICML 2018,
arXiv 1803.01498). Each device counts once, whatever number of samples it claims. H would undo both, as it is a sum
over all duals; so they need the server "mean". They help where liars are few in every *cohort*, not only in the fleet.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.consensus.fixed import WHOLE, FloatVector, clip_factor
from fedeq_edge.consensus.methods import Method
from fedeq_edge.errors import ContributionError

Contributions = Callable[[], Iterable[tuple[str, FloatVector]]]
"""Yields (device, difference) of every contribution of the round, anew at each call, in any order."""

_NORMS_KEPT = 32
"""Older rounds leave the median when the younger ones hold this many norms: a quarter of liars is then rarely half."""
_NORMS_NEEDED = 8
"""Norms before a median counts, or one per member in a smaller fleet."""
_BLOCK_VALUES = 2**22
"""Values of a round held at once by `fuse`: 16 MiB of float32 beside the vectors (p,), for any number of devices."""


class Screen:
    """The bounds on single contributions that a method asks for, from the norms and the step of closed rounds."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._rounds: list[list[float]] = []
        self._median: float | None = None
        self._slack = 1.0
        self._step: NDArray[np.float64] | None = None

    @property
    def measuring(self) -> bool:
        """Whether contributions count nothing yet, as there is no median to compare them with."""
        return self._compares_norms and self._median is None

    def factor(self, device: str, difference: FloatVector, norm: float) -> int:
        """The share of `difference`, |d| = `norm`, that counts, in 1 / WHOLE.

        Raises ContributionError "norm_bound" or "direction_bound".
        """
        self._check_direction(device, difference, norm)
        if not self._compares_norms:
            return WHOLE
        if self._median is None:
            return 0
        self._check_norm(device, norm, self._median)
        return clip_factor(norm, self._method.clip * self._median) if self._method.robust == "clip" else WHOLE

    def close(self, norms: Iterable[float], step: FloatVector, *, members: int, majority: bool) -> None:
        """The next round is compared with these norms too, and with the direction of `step`, z_hat's last, (p,).

        majority: whether most of the cohort contributed. If not, the bounds may be what keeps it out, as when steps
        grow with a new learning rate: each such round doubles `norm_limit` until most are in again, and a step that
        few have made gives nobody a direction.
        """
        if self._compares_norms:
            self._keep(sorted(norm for norm in norms if norm > 0.0))  # a median of 0 would let nothing pass
            kept = [norm for round_ in self._rounds for norm in round_]
            enough = len(kept) >= min(_NORMS_NEEDED, max(members, 1))
            self._median = statistics.median(kept) if enough else None
            self._slack = 1.0 if majority else min(2.0 * self._slack, 2.0**30)
        if self._method.min_cosine is not None:
            self._step = step.astype(np.float64) if majority and step.any() else None

    def snapshot(self) -> tuple[dict[str, NDArray[np.float64]], dict[str, Any]]:
        """Arrays and scalars from which `restore` goes on bit for bit."""
        arrays = {} if self._step is None else {"fleet_step": self._step.copy()}
        return arrays, {"norms": [list(norms) for norms in self._rounds], "median": self._median, "slack": self._slack}

    def restore(self, arrays: dict[str, Any], scalars: dict[str, Any]) -> None:
        """What `snapshot` gave out is in force."""
        self._step = arrays.get("fleet_step")
        self._rounds = [list(norms) for norms in scalars["norms"]]
        self._median, self._slack = scalars["median"], scalars["slack"]

    @property
    def _compares_norms(self) -> bool:
        return self._method.robust == "clip" or self._method.norm_limit is not None

    def _keep(self, norms: list[float]) -> None:
        self._rounds = [*self._rounds, norms] if norms else self._rounds
        while sum(map(len, self._rounds[1:])) >= _NORMS_KEPT:
            del self._rounds[0]

    def _check_norm(self, device: str, norm: float, median: float) -> None:
        limit = self._method.norm_limit
        if limit is not None and norm > limit * self._slack * median:
            raise ContributionError(
                "norm_bound",
                f"device {device}: its step is {norm / median:.3g} times the fleet's median, "
                f"norm_limit allows {limit * self._slack:g}; did its training diverge?",
            )

    def _check_direction(self, device: str, difference: FloatVector, norm: float) -> None:
        least = self._method.min_cosine
        if least is None or self._step is None or norm == 0.0:
            return
        # np.sum instead of BLAS: its result does not depend on the number of threads
        cosine = float(np.sum(difference * self._step)) / (norm * math.sqrt(np.sum(self._step * self._step)))
        if cosine < least:
            raise ContributionError(
                "direction_bound",
                f"device {device}: cosine {cosine:.2f} between its step and the fleet's last one, "
                f"min_cosine is {least:g}; check its labels and sensors",
            )


def fuse(method: Method, contributions: Contributions, devices: Sequence[str], size: int) -> NDArray[np.float64]:
    """Coordinate-wise centre, (size,), of the differences of `devices`, each (size,), by `method.robust`.

    Sorted before it is averaged: the order of arrival does not matter. `contributions` is called once for each block of
    columns, and memory is O(size) beside the block. Raises ContributionError "not_contributed" where it yields others.
    """
    fused = np.empty(size)
    columns = max(1, _BLOCK_VALUES // len(devices))
    for start in range(0, size, columns):
        block = _block(contributions(), devices, slice(start, min(start + columns, size)))
        block.sort(axis=1)
        fused[start : start + columns] = _centre(method, block)
    return fused


def _block(
    contributions: Iterable[tuple[str, FloatVector]], devices: Sequence[str], columns: slice
) -> NDArray[np.floating]:
    names, parts = [], []
    for device, difference in contributions:
        names.append(device)
        parts.append(difference[columns].copy())  # a view would hold the whole vector
    if sorted(names) != sorted(devices):
        raise ContributionError(
            "not_contributed", f"the round holds contributions of {sorted(devices)}, but those of {sorted(names)} came"
        )
    return np.ascontiguousarray(np.stack(parts, axis=1))


def _centre(method: Method, block: NDArray[np.floating]) -> NDArray[np.float64]:
    count = block.shape[1]
    cut = (count - 1) // 2 if method.robust == "median" else math.floor(method.trim * count)
    centre: NDArray[np.float64] = block[:, cut : count - cut].mean(axis=1, dtype=np.float64)
    return centre

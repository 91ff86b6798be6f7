"""What has arrived since the last close, and whom the open round has asked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedeq_edge.consensus.fixed import ExactSum, FixedVector
from fedeq_edge.consensus.records import SQUARE_BITS, Arrival, PartialSum, Share
from fedeq_edge.errors import ContributionError


class OpenRound:
    """The sums of one round, of vectors (p,) with p = `size`, and whose contributions they hold.

    cohort: who was asked. S: sum omega_i step_i. weight: sum omega_i kappa_i 2^32. squares: sum omega_i kappa_i |d_i|^2
    in units of 2^-160. A contribution that it knows by itself is an `Arrival`; of a sum it knows the devices alone.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.clear()

    # ---- what it holds -------------------------------------------------------------------------------------

    @property
    def contributors(self) -> tuple[str, ...]:
        """Sorted, once per contribution."""
        return tuple(sorted([*(arrival.device for arrival in self._arrivals), *self._summed]))

    @property
    def late(self) -> tuple[str, ...]:
        """Those of the contributors that were not in the cohort."""
        return tuple(device for device in self.contributors if device not in self.cohort)

    @property
    def norms(self) -> Sequence[float]:
        """|d| of each arrival as it was sent."""
        return [math.sqrt(arrival.square) for arrival in self._arrivals]

    @property
    def has_majority(self) -> bool:
        """Whether most of the cohort contributed, or nobody was asked."""
        came = len(self.cohort.intersection(self.contributors))
        return 2 * came > len(self.cohort) or not self.cohort

    @property
    def primal_residual(self) -> float:
        """Root of the mean of |d_i|^2 with weights omega_i kappa_i; NaN for an empty round."""
        if not self.contributors:
            return math.nan
        return math.ldexp(math.sqrt(self.squares / self.weight), -SQUARE_BITS // 2)

    def partial(self) -> PartialSum:
        """All of it as one contribution."""
        return PartialSum(
            steps=self.S.values.copy(), weight=self.weight, squares=self.squares, devices=self.contributors
        )

    def arrival(self, device: str, penalty: int, square: float) -> Arrival:
        """The contribution with these figures. Raises ContributionError "not_contributed"."""
        for arrival in self._arrivals:
            if arrival.held and (arrival.device, arrival.penalty, arrival.square) == (device, penalty, square):
                return arrival
        raise ContributionError("not_contributed", f"device {device}: the open round holds no such contribution of it")

    def arrivals_of(self, device: str) -> int:
        """How many contributions of this device it holds, those included that can no longer be taken back."""
        return sum(arrival.device == device for arrival in self._arrivals)

    # ---- what changes it -----------------------------------------------------------------------------------

    def clear(self) -> None:
        """Nobody is asked and nothing has arrived."""
        self.cohort: frozenset[str] = frozenset()
        self.S = ExactSum(np.zeros(self._size, np.int64))
        self.weight = 0
        self.squares = 0
        self._arrivals: list[Arrival] = []
        self._summed: list[str] = []

    def add(self, arrival: Arrival, step: FixedVector, magnitude: int) -> None:
        """omega_i step_i counts, where no entry of `step` is larger than `magnitude`."""
        self.S.add(step, arrival.omega, magnitude)
        self.weight += arrival.weight
        self.squares += arrival.weighted_square
        self._arrivals.append(arrival)

    def take_back(self, arrival: Arrival, step: FixedVector, magnitude: int) -> None:
        """It is as if this had never been added."""
        self.S.add(step, -arrival.omega, magnitude)
        self.weight -= arrival.weight
        self.squares -= arrival.weighted_square
        self._arrivals.remove(arrival)

    def add_sum(self, partial: PartialSum, magnitude: int) -> None:
        """These contributions count, where no entry of their steps is larger than `magnitude`."""
        self.S.add(partial.steps, 1, magnitude)
        self.weight += partial.weight
        self.squares += partial.squares
        self._summed.extend(partial.devices)

    def settle(self, device: str) -> None:
        """What this device contributed stays and can no longer be taken back."""
        self._arrivals = [
            replace(arrival, held=False) if arrival.device == device else arrival for arrival in self._arrivals
        ]

    def gather(self, steps: FixedVector, shares: Mapping[str, Share]) -> None:
        """Its sums are those of the shares of these workers; steps: sum of theirs, (p,)."""
        self.S = ExactSum(steps)
        self.weight = sum(share.weight for share in shares.values())
        self.squares = sum(share.squares for share in shares.values())
        self._summed = [worker for worker, share in shares.items() if share.weight]

    # ---- storage -------------------------------------------------------------------------------------------

    def snapshot(self) -> tuple[dict[str, FixedVector], dict[str, Any]]:
        """Arrays and scalars from which `restore` goes on bit for bit. The order of arrivals leaves no trace."""
        scalars = {
            "weight": str(self.weight),
            "squares": str(self.squares),
            "cohort": sorted(self.cohort),
            "arrivals": [_fields(arrival) for arrival in sorted(self._arrivals)],
            "summed": sorted(self._summed),
        }
        return {"S": self.S.values.copy()}, scalars

    def restore(self, arrays: Mapping[str, Any], scalars: Mapping[str, Any]) -> None:
        """What `snapshot` gave out is in force."""
        self.S = ExactSum(arrays["S"])
        self.weight, self.squares = int(scalars["weight"]), int(scalars["squares"])
        self.cohort = frozenset(scalars["cohort"])
        self._arrivals = [Arrival(**fields) for fields in scalars["arrivals"]]
        self._summed = list(scalars["summed"])


def _fields(arrival: Arrival) -> dict[str, object]:
    """As `dataclasses.asdict`, which copies every value deeply: 0.14 ms a contribution."""
    return {name: getattr(arrival, name) for name in Arrival.__slots__}

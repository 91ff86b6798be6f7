"""What servers remember that ours is compared with: a velocity, or the last parameters of every member.

Ours needs neither (admm.py). Both are floating point: the exactness of the sums is a promise of the default alone.

- `server_momentum`: v <- beta v + step, z <- z_hat + v: FedAvgM (Hsu, Qi, Brown 2019, arXiv 1909.06335), server step 1.
- `server` "sums": z = A / R, A = sum over all members of omega_i (kappa_i theta_i + nu_i) with theta_i as it last came.
  Exact in its fixed points, slow where few take part (algorithm.md, section 4), and O(members p) of memory.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.consensus.fixed import FloatVector, scaled
from fedeq_edge.consensus.methods import Method
from fedeq_edge.consensus.records import Member


class ServerMemory:
    """Of vectors (p,) with p = `size`; what the method has no use for is not kept, and its calls do nothing."""

    def __init__(self, method: Method, size: int) -> None:
        self._beta = method.server_momentum
        self._sums = method.server == "sums"
        self._velocity = np.zeros(size)
        self._held: dict[str, FloatVector] = {}
        self._before: dict[str, FloatVector] = {}

    # ---- momentum ------------------------------------------------------------------------------------------

    def moved(self, step: NDArray[np.float64]) -> NDArray[np.float64]:
        """What z moves by, (p,), where the contributions ask for `step`."""
        if not self._beta:
            return step
        self._velocity = self._beta * self._velocity + step
        return self._velocity

    # ---- running sums --------------------------------------------------------------------------------------

    def join(self, device: str, z_hat: FloatVector) -> None:
        """`device` stands at z_hat, of which no copy is made."""
        if self._sums:
            self._held[device] = z_hat

    def put(self, device: str, z_hat: FloatVector, difference: NDArray[np.float64], factor: int) -> None:
        """It has come to theta_i = z_hat + difference factor / WHOLE in the open round.

        Of a contribution that comes late, z_hat of today stands for the one that it began from.
        """
        if self._sums:
            self._before.setdefault(device, self._held[device])
            self._held[device] = (z_hat + scaled(difference, factor)).astype(z_hat.dtype)

    def take_back(self, device: str) -> None:
        """It stands where it did before the open round."""
        if device in self._before:
            self._held[device] = self._before.pop(device)

    def drop(self, device: str) -> None:
        """It is forgotten."""
        self._held.pop(device, None)
        self._before.pop(device, None)

    def close(self) -> None:
        """What has come in the open round stays."""
        self._before.clear()

    def mean(self, members: Mapping[str, Member]) -> NDArray[np.float64]:
        """sum omega_i kappa_i theta_i / R, (p,), over all members; with H / R added it is A / R."""
        R = sum(member.omega * member.penalty for member in members.values())
        total = np.zeros(self._velocity.size)
        for device, member in members.items():
            total += (member.omega * member.penalty / R) * self._held[device]
        return total

    # ---- storage -------------------------------------------------------------------------------------------

    def snapshot(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Arrays and scalars from which `restore` goes on; none where nothing is kept."""
        arrays: dict[str, NDArray[Any]] = {"velocity": self._velocity.copy()} if self._beta else {}
        if not self._held:
            return arrays, {}
        # most members may share the vector at which they joined: each is stored once
        different = {id(theta): theta for theta in (*self._held.values(), *self._before.values())}
        row = {key: number for number, key in enumerate(different)}
        arrays["last"] = np.stack(list(different.values()))
        now, before = ({name: row[id(theta)] for name, theta in held.items()} for held in (self._held, self._before))
        return arrays, {"last": {"now": now, "before": before}}

    def restore(self, arrays: Mapping[str, Any], scalars: Mapping[str, Any]) -> None:
        """What `snapshot` gave out is in force."""
        if self._beta:
            self._velocity = arrays["velocity"].copy()
        if "last" in scalars:
            now, before = scalars["last"]["now"], scalars["last"]["before"]
            self._held = {device: arrays["last"][row] for device, row in now.items()}
            self._before = {device: arrays["last"][row] for device, row in before.items()}

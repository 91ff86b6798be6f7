"""Where a server keeps the duals of its members."""

from typing import Protocol

from fedeq_edge.consensus.fixed import FixedVector


class DualStore(Protocol):
    """Where the server keeps nu_i, one int64 vector (p,) per member. Vectors given or got are never changed in place.

    Only a server "fresh" uses one.
    """

    def get(self, device: str) -> FixedVector:
        """The vector that was put last, plus all steps since."""
        ...

    def put(self, device: str, nu: FixedVector) -> None:
        """Keep this vector in place of an earlier one."""
        ...

    def advance(self, device: str, step: FixedVector) -> None:
        """nu_i has moved by `step`."""
        ...

    def drop(self, device: str) -> None:
        """Forget this device's vector."""
        ...


class MemoryDuals:
    """Duals in memory, O(members p): for simulations and tests; a gateway keeps them on disk."""

    def __init__(self) -> None:
        self._duals: dict[str, FixedVector] = {}

    def get(self, device: str) -> FixedVector:
        """The vector that was put last, plus all steps since; KeyError without one."""
        return self._duals[device]

    def put(self, device: str, nu: FixedVector) -> None:
        """Keep this vector in place of an earlier one."""
        self._duals[device] = nu

    def advance(self, device: str, step: FixedVector) -> None:
        """nu_i has moved by `step`; KeyError without a vector."""
        self._duals[device] = self._duals[device] + step

    def drop(self, device: str) -> None:
        """Forget this device's vector; KeyError without one."""
        del self._duals[device]

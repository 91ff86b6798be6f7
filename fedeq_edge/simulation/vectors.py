"""Vectors of clients that are not at work: all of a kind in one file, so that memory does not grow with the fleet."""

import mmap
import os
import tempfile
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.consensus.fixed import FixedVector, dual_value, largest
from fedeq_edge.errors import StateError
from fedeq_edge.training.step import Vector

_NARROW: Final = 2**31
_ONE: Final = np.ones(1, np.int64)
Scalar = TypeVar("Scalar", bound=np.generic)


class VectorFile(Generic[Scalar]):
    """Vectors of one size and type by name, in a file of `folder` that has no name and ends with this process."""

    def __init__(self, folder: Path, size: int, dtype: type[Scalar]) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # as long as we are
        self._size, self._dtype = size, np.dtype(dtype)
        self._bytes = size * self._dtype.itemsize
        self._room_bytes = -(-self._bytes // mmap.PAGESIZE) * mmap.PAGESIZE  # half pages cost more
        self._slots: dict[str, int | None] = {}  # None: zeros, which take no room
        self._free: list[int] = []  # to write over what is there costs a quarter of a file that grows
        self._end = 0

    def __contains__(self, name: str) -> bool:
        return name in self._slots

    def get(self, name: str) -> NDArray[Scalar]:
        """The vector of this name, (size,), a new array; KeyError without one."""
        vector: NDArray[Scalar] = np.empty(self._size, self._dtype)
        if not self.read(name, vector):
            vector.fill(0)
        return vector

    def read(self, name: str, into: NDArray[Any]) -> bool:
        """Whether `into` (size,) holds the vector now; it is left alone where that is zeros. KeyError without one."""
        slot = self._slots[name]
        if slot is None:
            return False
        if os.preadv(self._file.fileno(), [into.view(np.uint8).data], slot * self._room_bytes) != self._bytes:
            raise StateError("simulation: a temporary file has become shorter; is its disk full?")
        return True

    def put(self, name: str, vector: NDArray[Any]) -> None:
        """Keep this vector."""
        slot = self._slots.get(name)
        if slot is None:
            slot = self._slots[name] = self._room()
        content = np.ascontiguousarray(vector, self._dtype).view(np.uint8).data
        if os.pwrite(self._file.fileno(), content, slot * self._room_bytes) != self._bytes:
            raise StateError("simulation: a temporary file cannot grow; make room, or choose another --out")

    def clear(self, name: str) -> None:
        """Zeros are kept."""
        self._slots.setdefault(name, None)
        self._give_back(name)
        self._slots[name] = None

    def drop(self, name: str) -> None:
        """There is no vector of this name; KeyError where there was none."""
        self._give_back(name)
        del self._slots[name]

    def close(self) -> None:
        """The file is gone."""
        self._file.close()

    def _room(self) -> int:
        if self._free:
            return self._free.pop()
        self._end += 1
        return self._end - 1

    def _give_back(self, name: str) -> None:
        slot = self._slots[name]
        if slot is not None:
            self._free.append(slot)


class FleetDuals:
    """nu_i of every member, (p,) int64: the DualStore of the server, and the clients' as well, who hold the same.

    One whose entries fit 32 bits, below 1/2 in the units of a gradient, is written as such: half the bytes.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._narrow = VectorFile(folder, size, np.int32)
        self._wide = VectorFile(folder, size, np.int64)
        self._held = np.empty(size, np.int32)
        self._reach: dict[str, int] = {}  # no entry of a narrow one is larger

    def get(self, device: str) -> FixedVector:
        """The vector that was put last, plus all steps since; KeyError without one."""
        if device in self._wide:
            return self._wide.get(device)
        return self._narrow.get(device).astype(np.int64)

    def value(self, device: str) -> Vector:
        """What `dual_value` makes of it in float32, (p,); KeyError without a vector."""
        if device in self._wide:
            return dual_value(self._wide.get(device), np.float32)
        if not self._narrow.read(device, self._held):
            return np.zeros(self._held.size, np.float32)
        value = self._held.astype(np.float32)  # rounded once, and a power of two moves no bit
        value *= np.float32(dual_value(_ONE, np.float32)[0])
        return value

    def put(self, device: str, nu: FixedVector) -> None:
        """Keep this vector in place of an earlier one."""
        most = largest(nu)
        file, other = (self._wide, self._narrow) if most >= _NARROW else (self._narrow, self._wide)
        if device in other:
            other.drop(device)
        self._reach[device] = most
        if most:
            file.put(device, nu)
        else:
            file.clear(device)

    def advance(self, device: str, step: FixedVector) -> None:
        """nu_i has moved by `step`; KeyError without a vector."""
        if device in self._wide:
            self.put(device, self._wide.get(device) + step)
        elif self._narrow.read(device, self._held):
            self._advance_narrow(device, step)
        else:
            self.put(device, step)

    def _advance_narrow(self, device: str, step: FixedVector) -> None:
        """The one that is held has moved by `step`, without a look at its entries as long as they must fit."""
        reach = self._reach[device] + largest(step)
        if reach >= _NARROW:
            self.put(device, self._held + step)
            return
        self._held += step.astype(np.int32)
        self._narrow.put(device, self._held)
        self._reach[device] = reach

    def drop(self, device: str) -> None:
        """Forget this device's vector; KeyError without one."""
        self._reach.pop(device, None)
        for file in (self._wide, self._narrow):
            if device in file:
                file.drop(device)
                return
        raise KeyError(device)

    def close(self) -> None:
        """Its files are gone."""
        self._narrow.close()
        self._wide.close()

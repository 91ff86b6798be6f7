"""nu of every member on disk: a vector as of some moment, and references to the contributions that moved it since.

Theory of operation
-------------------
An accepted contribution is in the log anyway (contributions.py), so the dual that it moves is not written again: the
device gains a reference to the record. `get` adds up the vector and the steps, which are computed from the records by
the arithmetic that moved the sums. That is seldom asked for: when a device retires, joins anew or changes its weight.
Now and then, at a snapshot, the references of a device are folded into a new vector.

What counts goes into the snapshot. A vector's file is never written twice between snapshots, not even by a device that
was dropped and came back. So after a crash the snapshot finds its vectors and records as it knew them, and replaying
the journal adds the references that followed. For the same reason a vector need not be on the disk before the
snapshot that names it: `settle` sees to that.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

from fedeq_edge.consensus.fixed import FixedVector, fraction_bits, move_dual, penalty_of
from fedeq_edge.errors import StateError, WireError
from fedeq_edge.storage.contributions import ContributionLog, Place, Record
from fedeq_edge.storage.files import damaged, read_sealed, sealed, sync, writing
from fedeq_edge.wire import coding, messages

# A device with more references is folded. Its vector takes 8 bytes a value; written at every ninth contribution
# it adds a fifth to the bytes of float32 contributions, and reading a dual costs nine decodings at most.
REFERENCES: Final = 8
# So is one whose oldest reference is so many files of the log behind: a device that is gone would keep them
FILES: Final = 32
_BITS: Final = fraction_bits(np.float32)  # what travels and is stored is float32


class Dual(msgspec.Struct, frozen=True, kw_only=True):
    """nu of one device, (length,): the vector with this version, 0 where there is none, and the records since."""

    length: int
    version: int = 0
    records: tuple[Place, ...] = ()


class DiskDuals:
    """nu_i of every member, (p,) int64: the DualStore of a gateway. Memory: a few numbers a member, no vector.

    known: what the snapshot says, which is what `known` was when it was taken.
    """

    def __init__(self, folder: Path, log: ContributionLog, known: Mapping[str, Dual]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._log = log
        self._known = dict(known)
        self._newest = {device: dual.version for device, dual in known.items()}
        self._unsynced: set[Path] = set()
        # Steps of contributions that are on their way to the log, oldest first; None: of a dual that is gone
        self._unstored: dict[str, list[FixedVector | None]] = {}

    @property
    def known(self) -> dict[str, Dual]:
        """What the next snapshot says, by device."""
        return dict(self._known)

    def get(self, device: str) -> FixedVector:
        """nu as it is now, a new vector; KeyError without one. Raises StateError where the disk lost a part of it."""
        dual = self._known[device]
        nu = self._vector(device, dual)
        for place in dual.records:
            _add_step(nu, self._record(device, place))
        for step in self._unstored.get(device, ()):
            if step is not None:
                nu += step
        return nu

    def put(self, device: str, nu: FixedVector) -> None:
        """Keep this vector in place of an earlier one."""
        version = 0
        if nu.any():
            version = self._newest[device] = self._newest.get(device, 0) + 1
            path = self._path(device, version)
            with writing(path), path.open("wb") as output:
                output.writelines(sealed(nu.astype("<i8").view(np.uint8).data))
            self._unsynced.add(path)
        self._known[device] = Dual(length=nu.size, version=version)
        self._forget_steps(device)

    def advance(self, device: str, step: FixedVector) -> None:
        """nu has moved by `step`, which stays in memory until `stored` or `settle`; KeyError without a vector."""
        if device not in self._known:
            raise KeyError(device)
        self._unstored.setdefault(device, []).append(step)

    def stored(self, device: str, place: Place) -> None:
        """The contribution behind the oldest step in memory is in the log there.

        Nothing happens where no step waits: a method without duals advances none.
        """
        steps = self._unstored.get(device)
        if not steps:
            return
        if steps.pop(0) is not None:
            dual = self._known[device]
            self._known[device] = msgspec.structs.replace(dual, records=(*dual.records, place))
        if not steps:
            del self._unstored[device]

    def drop(self, device: str) -> None:
        """Forget this device's vector; KeyError without one."""
        del self._known[device]
        self._forget_steps(device)

    def settle(self) -> None:
        """All that `known` names is on the disk, and steps without a record (a retraction) are part of a vector."""
        for device in self._to_fold():
            self.put(device, self.get(device))
        self._unstored.clear()
        with writing(self._folder):
            for path in sorted(self._unsynced):
                sync(path)
            if self._unsynced:
                sync(self._folder)
        self._unsynced.clear()

    def prune(self) -> None:
        """Delete every vector that `known`, which a snapshot holds now, does not name."""
        self._newest = {device: dual.version for device, dual in self._known.items()}
        kept = {self._path(device, dual.version).name for device, dual in self._known.items()}
        with writing(self._folder):
            for path in self._folder.iterdir():
                if path.name not in kept:
                    path.unlink()

    def files(self) -> set[int]:
        """Numbers of the log's files that `known` refers to."""
        return {place.file for dual in self._known.values() for place in dual.records}

    def _to_fold(self) -> set[str]:
        """At most an eighth of the members for their many references: a fleet in step would stop the gateway."""
        loose = {device for device, steps in self._unstored.items() if any(step is not None for step in steps)}
        long = sorted((dual.records[0], device) for device, dual in self._known.items() if self._is_long(dual))
        share = -(-len(self._known) // REFERENCES)
        return loose | {device for _, device in long[:share]}

    def _is_long(self, dual: Dual) -> bool:
        if not dual.records:
            return False
        return len(dual.records) > REFERENCES or dual.records[0].file < self._log.end.file - FILES

    def _forget_steps(self, device: str) -> None:
        if device in self._unstored:
            self._unstored[device] = [None] * len(self._unstored[device])

    def _vector(self, device: str, dual: Dual) -> FixedVector:
        if dual.version == 0:
            return np.zeros(dual.length, np.int64)
        path = self._path(device, dual.version)
        content = read_sealed(path)
        if content is None:
            raise StateError(f"dual of device {device} is missing ({path}); restore the folder from a backup")
        nu = np.frombuffer(content, "<i8").astype(np.int64)
        if nu.size != dual.length:
            raise damaged(path, f"it holds {nu.size} values of {dual.length}")
        return nu

    def _record(self, device: str, place: Place) -> Record:
        record = self._log.read(place)
        if record.device != device:
            raise StateError(
                f"{self._log.path(place.file)} is of another folder: at byte {place.offset} is a contribution of "
                f"{record.device}, expected {device}; restore the whole state folder from one backup"
            )
        return record

    def _path(self, device: str, version: int) -> Path:
        return self._folder / f"{device}.{version}"


def _add_step(nu: FixedVector, record: Record) -> None:
    """`nu` has moved by what it did when this contribution was accepted. Raises StateError where it is none."""
    try:
        received = messages.decode(record.blob)
        message = messages.contribution(received)
        difference = coding.decode(message.codec, received.body, message.length)
    except WireError as error:
        raise StateError(f"stored contribution of device {record.device} is damaged ({error})") from error
    move_dual(nu, difference, penalty_of(record.kappa), _BITS, record.factor)

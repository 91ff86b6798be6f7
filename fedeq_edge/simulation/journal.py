"""What jobs have come to: in a file beside the results, so that a run that was killed goes on where the file ends.

A run is a function of its experiment, its seed and the outcomes of its jobs, and an outcome is one of its job. So
nothing else needs to be kept: after a kill the run is played again from its beginning, each job answered from the
journal in place of training, and comes to the same state bit for bit; then it trains on. It costs what the protocol
costs, milliseconds a client and round. What was cheaper to come by than to keep is not kept, and done again.

Here outcomes also wait whose clients are slow: in memory while they are few, in a file beyond that.
"""

import os
import struct
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from msgspec.structs import replace

from fedeq_edge import structs
from fedeq_edge.errors import StateError
from fedeq_edge.protocol.state import NOTHING
from fedeq_edge.simulation import jobs
from fedeq_edge.simulation.jobs import Job, Outcome
from fedeq_edge.simulation.vectors import VectorFile
from fedeq_edge.training.step import Vector

_SIZES: Final = struct.Struct("<II")
_HELD_BYTES: Final = 32 * 2**20  # of differences in memory
_KEPT_S: Final = 1e-3  # to keep 100,000 parameters takes 0.2 to 0.7 ms of processor time


class Runner(Protocol):
    """Who does jobs: in this process, in others, or on other machines."""

    def hold(self, base: bytes, z: Vector) -> None:
        """Jobs with this base start from z."""
        ...

    def run(self, wanted: Iterable[Job]) -> Iterator[Outcome]:
        """The outcomes of these jobs, in their order; few of them lie in memory at any time."""
        ...


class Waiting:
    """Outcomes whose time has not come. size: of a difference, (size,) float32."""

    def __init__(self, folder: Path, size: int) -> None:
        self._file = VectorFile(folder, size, np.float32)
        self._outcomes: dict[int, Outcome] = {}
        self._held: OrderedDict[int, int] = OrderedDict()  # bytes of the differences that are in memory
        self._held_bytes = 0

    def put(self, outcome: Outcome) -> None:
        """This one waits."""
        self._outcomes[outcome.number] = outcome
        if outcome.result is not None:
            self._held[outcome.number] = outcome.result.difference.nbytes
            self._held_bytes += outcome.result.difference.nbytes
        while self._held_bytes > _HELD_BYTES:
            self._spill(*self._held.popitem(last=False))

    def take(self, number: int) -> Outcome:
        """The one of this job, which waits no longer."""
        outcome = self._outcomes.pop(number)
        if number in self._held:
            self._held_bytes -= self._held.pop(number)
        elif outcome.result is not None:
            outcome = _with(outcome, self._file.get(str(number)))
            self._file.drop(str(number))
        return outcome

    def close(self) -> None:
        """Its file is gone."""
        self._file.close()

    def _spill(self, number: int, size: int) -> None:
        outcome = self._outcomes[number]
        assert outcome.result is not None
        self._file.put(str(number), outcome.result.difference)
        self._outcomes[number] = _with(outcome, NOTHING)
        self._held_bytes -= size


class Journal:
    """A runner that remembers. path: the file; identity: of the run, bytes that a journal of another run lacks."""

    def __init__(self, runner: Runner, path: Path, identity: bytes) -> None:
        self._runner, self._path = runner, path
        self._offsets: dict[int, int] = {}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._end = self._open(identity)
        self.replayed = 0
        """Jobs that were answered from the file."""

    def hold(self, base: bytes, z: Vector) -> None:
        """Jobs with this base start from z."""
        self._runner.hold(base, z)

    def run(self, wanted: Iterable[Job]) -> Iterator[Outcome]:
        """The outcomes of these jobs, in their order."""
        order: deque[tuple[int, tuple[str, str, int]]] = deque()
        for found in self._runner.run(self._unknown(wanted, order)):
            yield from self._known(order, found.number)
            order.popleft()
            if found.cost_s >= _KEPT_S:
                self._append(found)
            yield found
        yield from self._known(order, None)

    def close(self) -> None:
        """The file is as it is, for another time."""
        os.close(self._file)

    def remove(self) -> None:
        """The run is over, nothing is to be resumed."""
        self.close()
        self._path.unlink()

    def _unknown(self, wanted: Iterable[Job], order: deque[tuple[int, tuple[str, str, int]]]) -> Iterator[Job]:
        """The jobs that are to be done; `order` has all of them."""
        for job in wanted:
            order.append((job.number, job.name))
            if job.number not in self._offsets:
                yield job

    def _known(self, order: deque[tuple[int, tuple[str, str, int]]], until: int | None) -> Iterator[Outcome]:
        """Those of `order` up to the job `until`, which are in the file."""
        while order and order[0][0] != until:
            number, name = order.popleft()
            found = self._read(self._offsets[number])
            if found.name != name:
                raise StateError(
                    f"{self._path}: job {number} is {found.name}, and this run asks for {name}; it is of another "
                    "version of fedeq-edge: delete it to start the run anew"
                )
            self.replayed += 1
            yield found

    def _append(self, found: Outcome) -> None:
        """A record: sizes of its two parts, the outcome without its difference, the difference as it is."""
        vector = NOTHING if found.result is None else found.result.difference
        content = structs.pack(_with(found, NOTHING))
        raw = np.ascontiguousarray(vector, "<f4").view(np.uint8).data
        size = _SIZES.size + len(content) + len(raw)
        written = os.pwritev(self._file, [_SIZES.pack(len(content), len(raw)), content, raw], self._end)
        if written < size:
            raise StateError(
                f"{self._path} cannot grow; make room on its disk, and run the same command again to go on"
            )
        self._offsets[found.number] = self._end
        self._end += size

    def _read(self, offset: int) -> Outcome:
        size, length = _SIZES.unpack(os.pread(self._file, _SIZES.size, offset))
        found = jobs.outcome(os.pread(self._file, size, offset + _SIZES.size))
        vector = np.empty(length // 4, np.float32)
        os.preadv(self._file, [vector.view(np.uint8).data], offset + _SIZES.size + size)
        return _with(found, vector)

    def _open(self, identity: bytes) -> int:
        """End of what is whole in the file; one of another run is begun anew."""
        if os.pread(self._file, len(identity), 0) != identity:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, identity, 0)
            return len(identity)
        size, offset = os.fstat(self._file).st_size, len(identity)
        while offset + _SIZES.size <= size:
            first, second = _SIZES.unpack(os.pread(self._file, _SIZES.size, offset))
            end = offset + _SIZES.size + first + second
            if end > size or first == 0:
                break
            number = jobs.outcome(os.pread(self._file, first, offset + _SIZES.size)).number
            self._offsets[number], offset = offset, end
        os.ftruncate(self._file, offset)
        return offset


def _with(found: Outcome, difference: Vector) -> Outcome:
    if found.result is None:
        return found
    return replace(found, result=replace(found.result, difference=difference))

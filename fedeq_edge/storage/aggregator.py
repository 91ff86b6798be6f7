"""An aggregator's folder: snapshot, contributions, duals, history and status."""

import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from numpy.typing import NDArray

from fedeq_edge.consensus.fixed import WHOLE, fixed_penalty
from fedeq_edge.errors import StateError
from fedeq_edge.protocol.state import AggregatorState
from fedeq_edge.storage.contributions import FIRST, ContributionLog, Place, Record
from fedeq_edge.storage.duals import DiskDuals, Dual
from fedeq_edge.storage.files import damaged, load, read_sealed, save, sealed, write_atomically
from fedeq_edge.storage.status import History, write_status

_KEY: Final = "privacy.key"
_KEY_BYTES: Final = 32


class _Saved(msgspec.Struct, frozen=True, kw_only=True):
    """scalars: as JSON, since msgpack has no integers beyond 64 bits and the sums' weights are. held: how much of
    the log this snapshot holds. counted: (device, round, where) of what counts in the open round.
    """

    state: AggregatorState
    arrays: dict[str, NDArray[Any]]
    scalars: str
    duals: dict[str, Dual]
    held: Place
    counted: list[tuple[str, int, Place]]


class AggregatorFolder:
    """An aggregator's memory. audit: keep every contribution for ever, instead of those that something still needs.

    Raises StateError where the folder is damaged, or a part of it older than another.
    """

    def __init__(self, folder: Path, *, audit: bool = False) -> None:
        self._folder = folder
        self._audit = audit
        self._saved = saved = load(folder / "snapshot", _Saved)
        self._log = ContributionLog(folder / "contributions", saved.held if saved else FIRST)
        self.duals = DiskDuals(folder / "duals", self._log, saved.duals if saved else {})
        self._counted = {(device, number): place for device, number, place in saved.counted} if saved else {}
        self._counted |= {(record.device, record.round): place for place, record in self._log.journal()}
        self._history = History(folder)

    def snapshot(self) -> tuple[AggregatorState, dict[str, Any]] | None:
        """State and consensus snapshot as the folder was opened, None in a new folder."""
        if self._saved is None:
            return None
        return self._saved.state, {"arrays": self._saved.arrays, "scalars": json.loads(self._saved.scalars)}

    def privacy_key(self) -> bytes:
        """The secret of a private federation, made with a new folder.

        Raises StateError where an older folder has lost it: fresh noise on sums that are out would take it off them.
        """
        key = privacy_key(self._folder)
        if key is None and self._saved is not None:
            raise StateError(f"{self._folder / _KEY} is gone; restore the whole folder from a backup, or begin another")
        if key is None:
            key = secrets.token_bytes(_KEY_BYTES)
            write_atomically(self._folder / _KEY, b"".join(sealed(key)), mode=0o600)
        return key

    def journal(self) -> Iterator[tuple[str, bytes]]:
        """(device, blob) of the contributions since the snapshot, in the order in which they were accepted.

        Fold each one in before you ask for the next: that is how its step of the dual finds its record again.
        """
        for place, record in self._log.journal():
            yield record.device, record.blob
            self.duals.stored(record.device, place)

    def store(self, device: str, round_number: int, kappa: float, blob: bytes, *, factor: int = WHOLE) -> None:
        """The contribution is kept over a kill of this process, and with the next `commit` over a power cut.

        kappa, factor: with what it counts; the difference in the blob is scaled by factor / 65536.
        """
        record = Record(device=device, round=round_number, kappa=fixed_penalty(kappa), factor=factor, blob=blob)
        place = self._log.append(record)
        self._counted[device, round_number] = place
        self.duals.stored(device, place)

    def commit(self) -> None:
        """All that was stored is on the disk and may be acknowledged; one fdatasync, none where nothing is new."""
        self._log.commit()

    def find(self, device: str, round_number: int) -> bytes | None:
        """The blob of a contribution that counts in the open round, None where it is not among those."""
        place = self._counted.get((device, round_number))
        return None if place is None else self._log.read(place).blob

    def take_snapshot(self, state: AggregatorState, consensus: Mapping[str, Any]) -> None:
        """State and duals are on the disk, the journal is empty, and what nothing needs any more is gone."""
        self.commit()
        self.duals.settle()
        counting = {(device, number) for device, number, _ in state.accepted}
        self._counted = {key: place for key, place in self._counted.items() if key in counting}
        held = self._log.end
        saved = _Saved(
            state=state,
            arrays=consensus["arrays"],
            scalars=json.dumps(consensus["scalars"]),
            duals=self.duals.known,
            held=held,
            counted=[(device, number, place) for (device, number), place in self._counted.items()],
        )
        save(self._folder / "snapshot", saved)
        self._log.begin(held)
        self._prune()

    def _prune(self) -> None:
        self.duals.prune()
        if not self._audit:
            self._log.delete_all_but(self.duals.files() | {place.file for place in self._counted.values()})

    def record(self, line: Mapping[str, object]) -> None:
        """One more line in the history."""
        self._history.add(line)

    def write_status(self, status: Mapping[str, object]) -> None:
        """What `fedeq aggregator status` shows; readers never see half a file."""
        write_status(self._folder, status)


def privacy_key(folder: Path) -> bytes | None:
    """The secret in an aggregator's folder, None where there is none. Raises StateError where it is damaged."""
    key = read_sealed(folder / _KEY)
    if key is not None and len(key) != _KEY_BYTES:
        raise damaged(folder / _KEY, f"it holds {len(key)} bytes")
    return key

"""State on disk: atomic files with a checksum, an exclusive lock, a client's memory, an aggregator's journal.

Every file is written whole to a neighbour, flushed to the disk and renamed, so that after a power cut it is the old or
the new one. A damaged file is never silently replaced: it is named, and the operator decides.

An aggregator's folder:

    snapshot            the state when the open round began (protocol/aggregator.py, rule 2)
    journal/N-ID        the Nth contribution accepted; the next snapshot holds it, says so, and then deletes it
    duals/ID.VERSION    nu of each member; the snapshot says which version it means
    rounds.jsonl        history, one line a round and a report
    status.json         for people and programs that look
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedeq_edge import structs
from fedeq_edge.consensus.admm import Vector
from fedeq_edge.errors import StateError
from fedeq_edge.protocol.state import AggregatorState, ClientState

_MAGIC: Final = b"FDQS0001"
_DIGEST_BYTES: Final = 32
_LIMIT_BYTES: Final = 2**31  # a state file beyond this is not ours
_HISTORY: Final = "rounds.jsonl"
T = TypeVar("T")


def write_atomically(path: Path, content: bytes) -> None:
    """`path` holds `content`, on the disk, or what it held before. Raises StateError where the disk refuses."""
    neighbour = path.with_name(f".{path.name}.new")
    with _writing(path):
        with neighbour.open("wb") as output:
            output.write(content)
            output.flush()
            os.fsync(output.fileno())
        neighbour.replace(path)
        _sync_folder(path.parent)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StateError(f"cannot write {path}: {error.strerror}; free some space or choose another folder") from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(path: Path, value: object) -> None:
    """Write a struct with numpy vectors in it, with its checksum."""
    _write_sealed(path, structs.pack(value))


def load(path: Path, kind: type[T]) -> T | None:
    """What `save` wrote, None where there is no such file. Raises StateError where it is damaged."""
    content = _read_sealed(path)
    if content is None:
        return None
    try:
        return structs.unpack(content, kind)
    except msgspec.ValidationError as error:
        raise _damaged(path, str(error)) from error


def _write_sealed(path: Path, content: bytes) -> None:
    write_atomically(path, b"".join((_MAGIC, hashlib.sha256(content).digest(), content)))


def _read_sealed(path: Path) -> bytes | None:
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise _damaged(path, "it is too large")
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"state file {path} cannot be read: {error.strerror}; check its owner and its disk") from error
    start = len(_MAGIC) + _DIGEST_BYTES
    content = raw[start:]
    if raw[: len(_MAGIC)] != _MAGIC or hashlib.sha256(content).digest() != raw[len(_MAGIC) : start]:
        raise _damaged(path, "its checksum differs")
    return content


def _damaged(path: Path, why: str) -> StateError:
    return StateError(f"state file {path} is damaged ({why}); restore it from a backup, or delete it to start anew")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Path]:
    """`folder` exists and is ours alone until the end. Raises StateError where another process has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / "lock").open("w")
    except OSError as error:
        raise StateError(f"state folder {folder} cannot be used: {error.strerror}; check its path and owner") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StateError(
                f"state folder {folder} is in use by another process; stop it or use another folder"
            ) from error
        yield folder


class ClientFolder:
    """A device's memory of its federation, one file."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "client.state"

    def load(self) -> ClientState:
        """What was saved last, or a state without a federation."""
        return load(self._path, ClientState) or ClientState()

    def save(self, state: ClientState) -> None:
        """Keep this state."""
        save(self._path, state)


class DiskDuals:
    """nu_i of every member, one file each: the DualStore of a gateway, O(1) memory.

    A new dual is a new file; which version counts is in `versions`, which goes into the snapshot. So a crash between
    snapshots finds the duals as the snapshot knew them, and replaying the journal moves them again. So a version is
    never used twice between snapshots, not even by a device that was dropped and came back. `prune` after a snapshot
    deletes what nothing points to.
    """

    def __init__(self, folder: Path, versions: Mapping[str, int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.versions = dict(versions)
        self._newest = dict(versions)

    def get(self, device: str) -> Vector:
        """The vector that was put last; KeyError without one."""
        path = self._path(device, self.versions[device])
        content = _read_sealed(path)
        if content is None:
            raise StateError(f"dual of device {device} is missing ({path}); restore the folder from a backup")
        return np.frombuffer(content, "<f4").astype(np.float32)

    def put(self, device: str, nu: Vector) -> None:
        """Keep this vector in place of an earlier one."""
        version = self._newest.get(device, 0) + 1
        _write_sealed(self._path(device, version), nu.astype("<f4").tobytes())
        self.versions[device] = self._newest[device] = version

    def drop(self, device: str) -> None:
        """Forget this device's vector; KeyError without one."""
        del self.versions[device]

    def prune(self) -> None:
        """Delete every file that `versions` does not name."""
        self._newest = dict(self.versions)
        kept = {self._path(device, version).name for device, version in self.versions.items()}
        for path in self._folder.iterdir():
            if path.name not in kept:
                path.unlink()

    def _path(self, device: str, version: int) -> Path:
        return self._folder / f"{device}.{version}"


class _Saved(msgspec.Struct, frozen=True, kw_only=True):
    state: AggregatorState
    arrays: dict[str, NDArray[np.floating]]
    scalars: dict[str, Any]
    versions: dict[str, int]
    contributions: int  # how many there have been; a journal that a crash left behind holds some of them


class AggregatorFolder:
    """An aggregator's snapshot, journal, history and status."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._journal = folder / "journal"
        self._journal.mkdir(parents=True, exist_ok=True)
        self._saved = load(folder / "snapshot", _Saved)
        self.duals = DiskDuals(folder / "duals", self._saved.versions if self._saved else {})
        self._held = self._saved.contributions if self._saved else 0
        self._contributions = max((number for number, _, _ in self._entries()), default=self._held)
        self._history = folder / _HISTORY
        _end_with_a_line(self._history)

    def snapshot(self) -> tuple[AggregatorState, dict[str, Any]] | None:
        """State and consensus snapshot, None in a new folder."""
        if self._saved is None:
            return None
        return self._saved.state, {"arrays": self._saved.arrays, "scalars": self._saved.scalars}

    def journal(self) -> Iterator[tuple[str, bytes]]:
        """(device, blob) of the contributions since the snapshot, in the order in which they were accepted."""
        for number, device, path in self._entries():
            if number > self._held:
                yield device, path.read_bytes()

    def store(self, device: str, blob: bytes) -> None:
        """The contribution is on the disk."""
        write_atomically(self._journal / f"{self._contributions + 1}-{device}", blob)
        self._contributions += 1

    def take_snapshot(self, state: AggregatorState, consensus: Mapping[str, Any]) -> None:
        """The state is on the disk; the journal that led to it is gone."""
        saved = _Saved(
            state=state,
            arrays=consensus["arrays"],
            scalars=consensus["scalars"],
            versions=dict(self.duals.versions),
            contributions=self._contributions,
        )
        save(self._folder / "snapshot", saved)
        self._held = self._contributions
        with _writing(self._journal):
            for _, _, path in self._entries():
                path.unlink()
            self.duals.prune()

    def _entries(self) -> list[tuple[int, str, Path]]:
        names = [path.name.partition("-") for path in self._journal.glob("[0-9]*-*")]  # not a write's neighbour
        return sorted((int(number), device, self._journal / f"{number}-{device}") for number, _, device in names)

    def record(self, line: Mapping[str, object]) -> None:
        """One more line in the history."""
        with _writing(self._history), self._history.open("a") as output:
            output.write(json.dumps(finite(line)) + "\n")

    def write_status(self, status: Mapping[str, object]) -> None:
        """What `fedeq aggregator status` shows; readers never see half a file."""
        path = self._folder / "status.json"
        neighbour = path.with_name(".status.json.new")
        with _writing(path):
            neighbour.write_text(json.dumps(finite(status)))  # no fsync: a lost status is only an old one
            neighbour.replace(path)


def _end_with_a_line(path: Path) -> None:
    """Cut off the half line that a crash left at the end, before the next one is joined to it."""
    if path.exists():
        with _writing(path), path.open("r+b") as output:
            output.truncate(output.read().rfind(b"\n") + 1)


def history(folder: Path) -> list[dict[str, Any]]:
    """The lines of rounds.jsonl in an aggregator's folder so far, without one that is still being written.

    A line that an aggregator wrote again after a crash counts once.
    """
    try:
        text = (folder / _HISTORY).read_text()
    except FileNotFoundError:
        return []
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return list({(line["kind"], line["round"], line.get("device")): line for line in lines}.values())


def finite(value: object) -> object:
    """`value` for JSON: NaN and infinity, which JSON does not know, are null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value

"""Result files: JSON lines, one file a run.

header      all that it takes to run it again: experiment, seed, versions, digest of the data, what was resolved
round       one each: bytes on the wire in both directions, virtual seconds, loss, residual, K
evaluation  accuracy of all clients, every so many rounds
client      what each has come to; unseen: likewise, of those that took no part
wall        what it took on this machine: the one line that differs between two runs of the same
end         sums and means; a file without it is of a run that has not come to its end
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from fedeq_edge.consensus.methods import Method
from fedeq_edge.errors import ConfigError, StateError
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.simulation.experiment import Experiment
from fedeq_edge.storage.files import writing
from fedeq_edge.training.step import Plan

Line = dict[str, Any]
# NaN and infinity become null; numpy's scalars are no floats to it
_JSON = msgspec.json.Encoder(enc_hook=float)
_KINDS: Final[Mapping[str, type[msgspec.Struct]]] = {
    "experiment": Experiment,
    "plan": Plan,
    "method": Method,
    "schedule": Schedule,
}


class ResultFile:
    """A run's file, written anew line by line."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self._path = path
        with writing(path):
            self._file = path.open("wb")
        self.say(header)

    def say(self, line: Mapping[str, Any]) -> None:
        """One more line."""
        with writing(self._path):
            self._file.write(encoded(line))
            self._file.flush()

    def close(self) -> None:
        """The file is as whole as its last line says."""
        self._file.close()


@dataclass(frozen=True, slots=True)
class Result:
    """A run that has come to its end, as its file tells."""

    path: Path
    lines: Sequence[Line]

    def of_kind(self, kind: str) -> list[Line]:
        """The lines of one kind, in order."""
        return [line for line in self.lines if line["kind"] == kind]

    @property
    def header(self) -> Line:
        """What it was."""
        return self.lines[0]

    @property
    def end(self) -> Line:
        """What has come of it."""
        return self.lines[-1]


def encoded(line: Mapping[str, Any]) -> bytes:
    """The line as JSON, the same bytes for the same values."""
    return _JSON.encode(line) + b"\n"


def read(path: Path) -> Result:
    """A whole result. Raises StateError where the file is partial or something else."""
    lines = _lines(path)
    if not lines or lines[-1].get("kind") != "end":
        raise StateError(f"{path} is of a run that has not come to its end; run the same command again to go on")
    return Result(path, lines)


def finished(path: Path, header: Mapping[str, Any]) -> bool:
    """Whether the run with this header lies there, whole. Raises ConfigError where the file is of another run."""
    lines = _lines(path)
    if not lines:
        return False
    wanted, found = _identifying(header), _identifying(lines[0])
    differing = [key for key in sorted({*wanted, *found}) if wanted.get(key) != found.get(key)]
    if differing:
        raise ConfigError(
            f"{path} is of another run ({', '.join(differing)} differ); choose another --out, or remove it"
        )
    return bool(lines[-1].get("kind") == "end")


def identity(header: Mapping[str, Any]) -> bytes:
    """What makes a run this run: its header without other runs' seeds."""
    return msgspec.json.encode(_identifying(header), order="deterministic")


def completed(header: Mapping[str, Any]) -> Line:
    """A header where settings that an older version did not know have their defaults."""
    told = json.loads(encoded(header))
    return {**told, **{key: _completed(told.get(key), kind) for key, kind in _KINDS.items()}}


def _identifying(header: Mapping[str, Any]) -> Line:
    told = completed(header)
    if isinstance(told["experiment"], dict):
        told["experiment"].pop("seeds", None)
    return told


def _completed(table: Any, kind: type[msgspec.Struct]) -> Any:
    try:
        return msgspec.to_builtins(msgspec.convert(table, kind))
    except (ConfigError, msgspec.ValidationError):  # of a version that knew other keys
        return table


def _lines(path: Path) -> list[Line]:
    """The whole lines of a file, none where there is no file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    try:
        lines = [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
    except ValueError as error:
        raise StateError(f"{path} is no result of a simulation ({error}); choose another --out") from error
    return lines

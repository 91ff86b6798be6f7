"""What people and programs read of a federation: its history, one JSON line a round and a report, and its status."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from fedeq_edge.storage.files import writing

_HISTORY = "rounds.jsonl"
# NaN and infinity become null, as in `finite`; numpy's scalars are no floats to it
_JSON = msgspec.json.Encoder(enc_hook=float)


class History:
    """The history in an aggregator's folder, open for new lines."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _HISTORY
        self._end_with_a_line()

    def add(self, line: Mapping[str, object]) -> None:
        """One more line."""
        with writing(self._path), self._path.open("ab") as output:
            output.write(_JSON.encode(line) + b"\n")

    def _end_with_a_line(self) -> None:
        """Cut off the half line that a crash left at the end, before the next one is joined to it."""
        if self._path.exists():
            with writing(self._path), self._path.open("r+b") as output:
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


def write_status(folder: Path, status: Mapping[str, object]) -> None:
    """What `fedeq aggregator status` shows; readers never see half a file."""
    path = folder / "status.json"
    neighbour = path.with_name(".status.json.new")
    with writing(path):
        neighbour.write_bytes(_JSON.encode(status))  # no fsync: a lost status is only an old one
        neighbour.replace(path)

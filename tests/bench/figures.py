"""A measured number, as a row for people and a JSON line for programs, and the sections that measure them."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


class NotRun(Exception):  # noqa: N818  # no fault: something is not here
    """A section cannot be measured here; the text is one line, with the remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A goal is the most that counts as reached."""

    section: str
    name: str
    value: float
    goal: float | None = None
    detail: str = ""

    def show(self) -> None:
        """A row on stderr, a line on stdout."""
        verdict = "" if self.goal is None else f"{'<=' if self.value <= self.goal else '>'} {self.goal:g}"
        print(f"{self.section:11} {self.name:56} {self.value:10.4g} {verdict:>8}  {self.detail}", file=sys.stderr)
        print(json.dumps(asdict(self)), flush=True)


def measure(sections: Mapping[str, Callable[[], Iterable[Figure]]], chosen: Sequence[str]) -> None:
    """Every figure of the chosen sections is shown, of all of them when none is chosen.

    Exits with 2 before anything is measured where a name is no section, and with 1 at the end where one that was asked
    for by its name could not be measured.
    """
    unknown = [name for name in chosen if name not in sections]
    if unknown:
        print(f"no section {', '.join(unknown)}; choose from {', '.join(sections)}", file=sys.stderr)
        raise SystemExit(2)
    left_out = [name for name in chosen or sections if not _measured(name, sections[name])]
    if chosen and left_out:
        raise SystemExit(1)


def _measured(name: str, section: Callable[[], Iterable[Figure]]) -> bool:
    try:
        for figure in section():
            figure.show()
    except NotRun as reason:
        print(f"{name:11} not run: {reason}", file=sys.stderr)
        print(json.dumps({"section": name, "not_run": str(reason)}), flush=True)
        return False
    return True


def har_file() -> Path:
    """The data set on which federations are measured. Raises NotRun where it is not."""
    path = Path(os.environ.get("BENCH_DATA", "../shared/data")) / "har.npz"  # as in the Makefile
    if not path.is_file():
        raise NotRun(f"{path} does not exist; name the folder of har.npz with BENCH_DATA")
    return path

"""A measured number, as a row for people and a JSON line for programs."""

import json
import sys
from dataclasses import asdict, dataclass


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

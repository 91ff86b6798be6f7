"""What `fedeq doctor` finds: one finding and what mends it, and how looking goes on where one look fails."""

import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, Literal

import msgspec

from fedeq_edge.errors import FedEqError

Verdict = Literal["ok", "warn", "fail"]
Clock = Callable[[], float]
DAY_S: Final = 86_400.0


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One finding. name: what was looked at. remedy: the command that mends it, "" where all is well."""

    name: str
    saw: str
    verdict: Verdict = "ok"
    remedy: str = ""


def guarded(one: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """Its checks; where it cannot go on, that is one."""
    try:
        yield from one()
    except FedEqError as error:
        reason, _, remedy = str(error).partition("; ")
        yield Check(name="trouble", saw=reason, verdict="fail", remedy=remedy)
    except ModuleNotFoundError as error:
        remedy = "pip install 'fedeq-edge[fleet]', or [board] on a device"
        yield Check(name="trouble", saw=f"{error.name} is not installed", verdict="fail", remedy=remedy)
    except PermissionError as error:
        yield Check(name="trouble", saw=str(error), verdict="fail", remedy="run it as root, with sudo")
    except FileNotFoundError as error:
        saw = f"{error.filename} is missing"
        yield Check(name="trouble", saw=saw, verdict="fail", remedy="put it back from a backup")
    except (OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        saw = f"{type(error).__name__}: {error}"
        yield Check(name="trouble", saw=saw, verdict="fail", remedy="ask for help with: fedeq doctor --bundle FILE.zip")


def check(name: str, saw: str, *, fail: bool = False, warn: bool = False, remedy: str = "") -> Check:
    """A finding; the worse of `fail` and `warn` counts, and what is well needs no remedy."""
    verdict: Verdict = "fail" if fail else "warn" if warn else "ok"
    return Check(name=name, saw=saw, verdict=verdict, remedy="" if verdict == "ok" else remedy)


def said(command: Sequence[str]) -> str:
    """What a command printed, "" where there is no such command or it does not come back."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ended.stdout.strip()

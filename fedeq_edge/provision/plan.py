"""What a flash will do, does and did."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from fedeq_edge.provision.archive import Manifest
from fedeq_edge.provision.facts import Facts

if TYPE_CHECKING:
    from fedeq_edge.provision.ca import Authority

Sign = Callable[[], "Authority"]  # asked for only where something is to be signed: it may want a passphrase
Told = Callable[[str], None]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was done. seconds: it took."""

    name: str
    detail: str
    seconds: float


class Flashed(msgspec.Struct, frozen=True, kw_only=True):
    """How a flash ended. changed: false where everything was there already.

    heartbeat_s: from the beginning to the moment in which the agent was seen connected to its broker; None on a card,
    whose first boot is still to come.
    """

    device: str
    target: str
    version: str
    changed: bool
    heartbeat_s: float | None
    steps: list[Step]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a flash will do. digest: sha256 of the bundle. intended: what will be done, in the order of doing.

    occupant: another device that the target was prepared for, "" where there is none.
    """

    device: str
    target: str
    bundle: Path
    digest: str
    manifest: Manifest
    facts: Facts
    warnings: list[str]
    intended: list[str]
    data: Path | None
    occupant: str = ""


class Steps:
    """The steps done so far, each with its time. told: hears of every one when it begins."""

    def __init__(self, told: Told) -> None:
        self._told = told
        self._began = time.monotonic()
        self.done: list[Step] = []

    @contextmanager
    def __call__(self, name: str, detail: str = "") -> Iterator[None]:
        """The step is what happens inside."""
        self._told(f"{name} {detail}".rstrip())
        began = time.monotonic()
        yield
        self.done.append(Step(name=name, detail=detail, seconds=round(time.monotonic() - began, 3)))

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return round(time.monotonic() - self._began, 3)


class Way(Protocol):
    """How one kind of target is flashed. occupant: another device that it was prepared for, "" where there is none."""

    occupant: str

    def intended(self) -> list[str]:
        """What will be done."""
        ...

    def go(self, steps: Steps, sign: Sign) -> bool:
        """It is done; whether anything changed."""
        ...

"""Whatever happens to an aggregator's folder, its duals and its journal are those of a model in memory.

A kill keeps what the operating system was given. A power cut keeps what was synced, and of the rest some prefix, which
may have a hole in it.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from numpy.typing import NDArray

from fedeq_edge.consensus.fixed import WHOLE, FixedVector
from fedeq_edge.protocol.state import AggregatorState
from fedeq_edge.storage import AggregatorFolder, contributions, duals
from tests.storage.stored import KAPPA, Disk, blob_of, step_of

LENGTH = 3
DEVICES = st.sampled_from(("a", "b", "c-1"))
SEEDS = st.integers(0, 7)  # of the values: draws are few, so that histories become long
KINDS = st.sampled_from((("f32", WHOLE), ("int4", WHOLE), ("f32", 1), ("f32", 40_000)))
STATE = AggregatorState(run="r", status="running")
CONSENSUS: dict[str, Any] = {"arrays": {"H": np.arange(LENGTH)}, "scalars": {"weight": 3**60}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    device: str
    blob: bytes
    factor: int

    @property
    def step(self) -> FixedVector:
        return step_of(self.blob, factor=self.factor)


def values_of(seed: int) -> NDArray[np.float32]:
    """(LENGTH,), zeros for seed 0."""
    return (np.random.default_rng(seed).normal(size=LENGTH) * (seed > 0)).astype(np.float32)


class Histories(RuleBasedStateMachine):
    """An aggregator's folder beside what it must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.disk = Disk(self.patch)
        # small, so that a short history has several files and folds
        self.patch.setattr(contributions, "FILE_BYTES", 1200)
        self.patch.setattr(duals, "FILES", 3)
        self.patch.setattr(duals, "REFERENCES", 3)
        self.place = tempfile.TemporaryDirectory()
        self.root = Path(self.place.name)
        self.folder = AggregatorFolder(self.root)
        self.nu: dict[str, FixedVector] = {}
        self.nu_at_snapshot: dict[str, FixedVector] = {}
        self.journal: list[Stored] = []
        self.committed = 0
        self.rounds = 0
        for seed, device in enumerate(("a", "b")):
            self.joins(device, seed)

    def teardown(self) -> None:
        self.patch.undo()
        self.place.cleanup()

    # What an aggregator does

    @rule(device=DEVICES, seed=SEEDS)
    def joins(self, device: str, seed: int) -> None:
        nu = np.rint(values_of(seed) * 2.0**32).astype(np.int64)
        self.folder.duals.put(device, nu)
        self.nu[device] = nu

    @rule(device=DEVICES)
    def leaves(self, device: str) -> None:
        if device in self.nu:
            self.folder.duals.drop(device)
            del self.nu[device]

    @rule(times=st.integers(1, 4), seed=SEEDS, kind=KINDS)
    def everybody_contributes(self, times: int, seed: int, kind: tuple[str, int]) -> None:
        for number in range(times):
            for device in self.nu:
                self._store(self._accepted(device, seed + number, *kind))

    @rule(device=DEVICES, seed=SEEDS, comes_back=st.booleans())
    def leaves_while_its_contribution_is_on_its_way_to_the_disk(self, device: str, seed: int, comes_back: bool) -> None:
        if device in self.nu:
            stored = self._accepted(device, seed, "f32", WHOLE)
            self.leaves(device)
            if comes_back:
                self.joins(device, seed)
            self._store(stored)

    @rule()
    def commits(self) -> None:
        before = self.disk.syncs
        self.folder.commit()
        assert self.disk.syncs - before <= 1
        self.committed = len(self.journal)

    @rule()
    def takes_a_snapshot(self) -> None:
        self.folder.take_snapshot(STATE, CONSENSUS)
        self.nu_at_snapshot = dict(self.nu)
        self.journal, self.committed = [], 0
        assert {path.name for path in (self.root / "duals").iterdir()} == {
            f"{device}.{dual.version}" for device, dual in self.folder.duals.known.items() if dual.version
        }

    @rule(device=DEVICES, seed=SEEDS)
    def takes_a_contribution_back(self, device: str, seed: int) -> None:
        if device in self.nu:
            stored = self._accepted(device, seed, "f32", WHOLE)
            self._store(stored)
            self.folder.duals.advance(device, -stored.step)
            self.nu[device] = self.nu[device] - stored.step
            self.takes_a_snapshot()

    # What happens to it

    @rule()
    def is_killed(self) -> None:
        self._come_back(len(self.journal), len(self.journal))

    @rule(data=st.data())
    def loses_power(self, data: st.DataObject) -> None:
        for path in (self.root / "duals").iterdir():
            path.write_bytes(path.read_bytes()[: self.disk.safe_bytes(path)])
        for path in (self.root / "contributions").iterdir():
            self._forget(path, data)
        self._come_back(self.committed, len(self.journal))

    # What must be true

    @invariant()
    def every_dual_is_the_models(self) -> None:
        for device, nu in self.nu.items():
            np.testing.assert_array_equal(self.folder.duals.get(device), nu)
        assert self.folder.duals.known.keys() == self.nu.keys()

    def _accepted(self, device: str, seed: int, codec: str, factor: int) -> Stored:
        stored = Stored(device=device, blob=blob_of(values_of(seed), codec), factor=factor)
        self.folder.duals.advance(device, stored.step)
        self.nu[device] = self.nu[device] + stored.step
        self.every_dual_is_the_models()
        return stored

    def _store(self, stored: Stored) -> None:
        self.rounds += 1
        self.folder.store(stored.device, self.rounds, KAPPA, stored.blob, factor=stored.factor)
        self.journal.append(stored)

    def _forget(self, path: Path, data: st.DataObject) -> None:
        """A prefix of what was not synced is on the disk, zeros where a hole is."""
        content = bytearray(path.read_bytes())
        safe = self.disk.safe_bytes(path)
        end = data.draw(st.integers(safe, len(content)), "end")
        hole = data.draw(st.integers(safe, end), "hole")
        content[hole : min(hole + 60, end)] = bytes(min(hole + 60, end) - hole)
        path.write_bytes(content[:end])

    def _come_back(self, least: int, most: int) -> None:
        self.folder = AggregatorFolder(self.root)
        self.nu = dict(self.nu_at_snapshot)
        count = 0
        for device, blob in self.folder.journal():
            stored = self.journal[count]
            assert (device, blob) == (stored.device, stored.blob)
            if device in self.nu:
                self.folder.duals.advance(device, stored.step)
                self.nu[device] = self.nu[device] + stored.step
            count += 1
        assert least <= count <= most
        self.journal, self.committed = self.journal[:count], count
        saved = self.folder.snapshot()
        assert saved is None or saved[1]["scalars"] == CONSENSUS["scalars"]


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, derandomize=True, database=None
)

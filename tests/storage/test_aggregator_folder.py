"""An aggregator's folder: snapshot, journal, and what a crash between two of its steps leaves."""

from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from fedeq_edge.consensus.fixed import WHOLE
from fedeq_edge.errors import StateError
from fedeq_edge.protocol.state import AggregatorState
from fedeq_edge.storage import AggregatorFolder, audit_trail, contributions
from tests.storage.stored import KAPPA, Disk, blob_of, step_of


def fails(*_: object) -> NoReturn:
    raise OSError(28, "No space left on device")


def state_of(*accepted: tuple[str, int]) -> AggregatorState:
    return AggregatorState(run="r", status="running", accepted=[(device, number, 1) for device, number in accepted])


def consensus_of(value: float) -> dict[str, Any]:
    arrays = {"z": np.full(3, value), "H": np.full(3, 2**60, np.int64)}
    return {"arrays": arrays, "scalars": {"R": 7**40, "members": {"a": {"samples": 5, "quality": value}}}}


def store(folder: AggregatorFolder, device: str, round_number: int, blob: bytes) -> None:
    folder.store(device, round_number, KAPPA, blob)


def test_a_snapshot_comes_back_with_its_types(tmp_path: Path) -> None:
    state = state_of()
    state.issued = {3: {"a": 0.1}}
    AggregatorFolder(tmp_path).take_snapshot(state, consensus_of(1.5))
    saved = AggregatorFolder(tmp_path).snapshot()
    assert saved is not None
    loaded, consensus = saved
    assert loaded == state
    np.testing.assert_equal(consensus, consensus_of(1.5))
    assert (consensus["arrays"]["z"].dtype, consensus["arrays"]["H"].dtype) == (np.float64, np.int64)


def test_a_new_folder_has_neither_snapshot_nor_journal(tmp_path: Path) -> None:
    folder = AggregatorFolder(tmp_path)
    assert folder.snapshot() is None
    assert list(folder.journal()) == []
    folder.commit()


def test_the_journal_keeps_the_order_in_which_contributions_were_accepted(tmp_path: Path) -> None:
    folder = AggregatorFolder(tmp_path)
    stored = [(f"d-{number % 3}", bytes([number])) for number in range(12)]
    for number, (device, blob) in enumerate(stored[:7]):
        store(folder, device, number, blob)
    folder = AggregatorFolder(tmp_path)
    for number, (device, blob) in enumerate(stored[7:]):
        store(folder, device, number, blob)
    assert list(AggregatorFolder(tmp_path).journal()) == stored


def test_a_snapshot_empties_the_journal(tmp_path: Path) -> None:
    folder = AggregatorFolder(tmp_path)
    store(folder, "a", 1, b"1")
    folder.take_snapshot(state_of(), consensus_of(1.0))
    store(folder, "a", 2, b"2")
    assert list(AggregatorFolder(tmp_path).journal()) == [("a", b"2")]


def test_penalty_and_factor_of_a_contribution_are_those_it_counted_with(tmp_path: Path) -> None:
    folder = AggregatorFolder(tmp_path)
    blob = blob_of(np.array([1.0, -2.0, 0.3], np.float32))
    folder.duals.put("a", np.zeros(3, np.int64))
    folder.duals.advance("a", step_of(blob, 0.75, 1000))
    folder.store("a", 1, 0.75, blob, factor=1000)
    np.testing.assert_array_equal(folder.duals.get("a"), step_of(blob, 0.75, 1000))
    assert [(item.kappa, item.factor) for item in audit_trail(tmp_path)] == [(3 * 2**30, 1000)]
    store(folder, "a", 2, blob)
    assert list(audit_trail(tmp_path))[1].factor == WHOLE


def test_what_a_snapshot_counts_on_is_on_the_disk_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = AggregatorFolder(tmp_path)
    disk = Disk(monkeypatch)
    folder.duals.put("a", np.ones(3, np.int64))
    store(folder, "a", 1, b"1")
    whole = Path.replace

    def checked(self: Path, target: Path) -> Path:
        if target.name == "snapshot":
            for path in (tmp_path / "duals" / "a.1", tmp_path / "contributions" / "000001.log", self):
                assert disk.safe_bytes(path) == path.stat().st_size
        return whole(self, target)

    monkeypatch.setattr(Path, "replace", checked)
    folder.take_snapshot(state_of(), consensus_of(1.0))
    assert AggregatorFolder(tmp_path).snapshot() is not None


def test_a_snapshot_that_fails_leaves_the_old_one_and_its_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = AggregatorFolder(tmp_path)
    folder.duals.put("a", np.ones(3, np.int64))
    folder.take_snapshot(state_of(), consensus_of(1.0))
    folder.duals.put("a", np.full(3, 2))
    store(folder, "b", 1, b"1")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fails)
        with pytest.raises(StateError, match=r"cannot write .*snapshot: No space left"):
            folder.take_snapshot(state_of(), consensus_of(2.0))
    again = AggregatorFolder(tmp_path)
    saved = again.snapshot()
    assert saved is not None
    np.testing.assert_equal(saved[1], consensus_of(1.0))
    np.testing.assert_array_equal(again.duals.get("a"), np.ones(3))
    assert list(again.journal()) == [("b", b"1")]


def test_a_crash_between_a_snapshot_and_the_deletion_of_what_it_replaces_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contributions, "FILE_BYTES", 1)
    folder = AggregatorFolder(tmp_path)
    store(folder, "a", 1, b"1")
    store(folder, "b", 1, b"2")
    with monkeypatch.context() as patched:
        patched.setattr(contributions.ContributionLog, "delete_all_but", fails)
        with pytest.raises(OSError, match="No space"):
            folder.take_snapshot(state_of(), consensus_of(1.0))
    again = AggregatorFolder(tmp_path)
    assert again.snapshot() is not None
    assert list(again.journal()) == []
    store(again, "c", 1, b"3")
    assert list(AggregatorFolder(tmp_path).journal()) == [("c", b"3")]
    again.take_snapshot(state_of(), consensus_of(2.0))
    assert list((tmp_path / "contributions").glob("*.log")) == []


def test_contributions_that_nothing_needs_are_deleted_unless_they_are_an_audit_trail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contributions, "FILE_BYTES", 1)
    for name, audit, kept in (("plain", False, []), ("audit", True, [b"0", b"1", b"2", b"3"])):
        folder = AggregatorFolder(tmp_path / name, audit=audit)
        for number in range(4):
            store(folder, "a", number, str(number).encode())
            folder.take_snapshot(state_of(), consensus_of(1.0))
        assert [item.blob for item in audit_trail(tmp_path / name)] == kept


def test_a_contribution_of_the_open_round_is_found_over_snapshots_and_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contributions, "FILE_BYTES", 1)
    folder = AggregatorFolder(tmp_path)
    store(folder, "a", 4, b"late")
    store(folder, "a", 5, b"on time")
    assert AggregatorFolder(tmp_path).find("a", 4) == b"late"
    folder.take_snapshot(state_of(("a", 4), ("a", 5)), consensus_of(1.0))
    store(folder, "b", 5, b"another")
    for opened in (folder, AggregatorFolder(tmp_path)):
        assert [opened.find(*key) for key in (("a", 4), ("a", 5), ("b", 5), ("b", 4))] == [
            b"late",
            b"on time",
            b"another",
            None,
        ]
    folder.take_snapshot(state_of(("b", 5)), consensus_of(1.0))
    assert (folder.find("a", 5), folder.find("b", 5)) == (None, b"another")
    folder.take_snapshot(state_of(), consensus_of(1.0))
    assert list((tmp_path / "contributions").glob("*.log")) == []

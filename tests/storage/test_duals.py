"""Duals on disk: vectors and references to what moved them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from fedeq_edge.consensus.fixed import FixedVector, fixed_penalty
from fedeq_edge.errors import StateError
from fedeq_edge.storage import DiskDuals, Record, contributions, duals
from fedeq_edge.storage.contributions import ContributionLog
from fedeq_edge.storage.duals import Dual
from fedeq_edge.wire import messages
from tests.storage.stored import KAPPA, Disk, blob_of, step_of

ONE = 2**32


class Kept:
    """A log and the duals beside it."""

    def __init__(self, root: Path, known: Mapping[str, Dual] | None = None) -> None:
        self.log = ContributionLog(root / "contributions")
        self.duals = DiskDuals(root / "duals", self.log, known or {})

    def contribute(self, device: str, value: float, *, length: int = 3, codec: str = "f32") -> FixedVector:
        """The step by which its dual has moved."""
        blob = blob_of(np.linspace(-value, value, length, dtype=np.float32), codec)
        step = step_of(blob)
        self.duals.advance(device, step)
        record = Record(device=device, round=1, kappa=fixed_penalty(KAPPA), blob=blob)
        self.duals.stored(device, self.log.append(record))
        return step


def vector(value: int, length: int = 3) -> FixedVector:
    return np.full(length, value * ONE, np.int64)


def test_a_dual_comes_back_as_it_was_put(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    nu = np.random.default_rng(0).integers(-(2**60), 2**60, size=7)
    kept.duals.put("a", vector(0, 7))
    kept.duals.put("a", nu)
    np.testing.assert_array_equal(kept.duals.get("a"), nu)
    np.testing.assert_array_equal(Kept(tmp_path, kept.duals.known).duals.get("a"), nu)
    for call in (kept.duals.get, kept.duals.drop, lambda device: kept.duals.advance(device, nu)):
        with pytest.raises(KeyError):
            call("b")


def test_a_dual_of_zeros_takes_no_file(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.duals.put("a", vector(0))
    assert list((tmp_path / "duals").iterdir()) == []
    np.testing.assert_array_equal(kept.duals.get("a"), vector(0))


@pytest.mark.parametrize("codec", ["f32", "int8"])
@pytest.mark.parametrize("length", [3, 8192, 20_000])
def test_a_dual_is_its_vector_and_the_steps_since(length: int, codec: str, tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.duals.put("a", vector(5, length))
    expected = vector(5, length)
    for number in range(3):
        expected = expected + kept.contribute("a", number + 0.7, length=length, codec=codec)
    np.testing.assert_array_equal(kept.duals.get("a"), expected)
    np.testing.assert_array_equal(Kept(tmp_path, kept.duals.known).duals.get("a"), expected)


def test_a_step_counts_before_its_contribution_is_stored(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.duals.put("a", vector(1))
    kept.duals.advance("a", vector(2))
    np.testing.assert_array_equal(kept.duals.get("a"), vector(3))


def test_accepting_a_contribution_writes_no_dual(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.duals.put("a", vector(0))
    for number in range(5):
        kept.contribute("a", number)
    kept.duals.settle()
    assert list((tmp_path / "duals").iterdir()) == []


def test_many_references_are_folded_into_a_vector_at_a_snapshot(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.duals.put("a", vector(0))
    for number in range(duals.REFERENCES):
        kept.contribute("a", number)
    kept.duals.settle()
    assert len(kept.duals.known["a"].records) == duals.REFERENCES
    kept.contribute("a", 1.0)
    expected = kept.duals.get("a")
    kept.duals.settle()
    assert kept.duals.known["a"] == Dual(length=3, version=1)
    np.testing.assert_array_equal(kept.duals.get("a"), expected)


def test_a_fleet_in_step_is_folded_an_eighth_at_a_time(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    devices = [f"d{number}" for number in range(20)]
    for device in devices:
        kept.duals.put(device, vector(0))
    folded = []
    for number in range(30):
        for device in devices:
            kept.contribute(device, number)
        kept.duals.settle()
        folded.append(sum(not dual.records for dual in kept.duals.known.values()))
    assert max(folded) == 3
    assert max(len(dual.records) for dual in kept.duals.known.values()) <= 2 * duals.REFERENCES


def test_a_device_that_stays_away_is_folded_so_that_its_file_can_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contributions, "FILE_BYTES", 1)
    kept = Kept(tmp_path)
    kept.duals.put("away", vector(0))
    kept.duals.put("here", vector(0))
    expected = kept.contribute("away", 1.0)
    for _ in range(duals.FILES + 2):
        kept.duals.put("here", vector(0))
        kept.contribute("here", 1.0)
        kept.duals.settle()
        kept.log.begin(kept.log.end)
    assert kept.duals.files() == {duals.FILES + 2}
    np.testing.assert_array_equal(kept.duals.get("away"), expected)


def test_duals_read_with_an_old_snapshot_are_as_it_knew_them(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    for device in ("a", "b"):
        kept.duals.put(device, vector(1))
        kept.contribute(device, 1.0)
    kept.duals.settle()
    kept.duals.prune()
    known, expected = kept.duals.known, kept.duals.get("a")
    kept.duals.put("a", vector(2))
    kept.contribute("a", 1.0)
    kept.duals.drop("b")
    kept.duals.put("b", vector(5))  # came back, under another version than it left with
    for device in ("a", "b"):
        np.testing.assert_array_equal(Kept(tmp_path, known).duals.get(device), expected)


def test_vectors_are_on_the_disk_when_they_are_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    kept = Kept(tmp_path)
    kept.duals.put("a", vector(1))
    path = tmp_path / "duals" / "a.1"
    assert disk.safe_bytes(path) == 0
    kept.duals.settle()
    assert disk.safe_bytes(path) == path.stat().st_size
    before = disk.syncs
    kept.duals.settle()
    assert disk.syncs == before


def test_pruning_leaves_what_counts_and_nothing_else(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    for value in range(1, 5):
        kept.duals.put("a", vector(value))
        kept.duals.put("a-1", vector(value))
    kept.duals.drop("a-1")
    kept.duals.prune()
    assert [path.name for path in (tmp_path / "duals").iterdir()] == ["a.4"]
    np.testing.assert_array_equal(kept.duals.get("a"), vector(4))


def test_a_vector_that_is_gone_damaged_or_of_another_length_is_named(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.duals.put("pi", vector(1))
    with pytest.raises(StateError, match=r"pi\.1 is damaged \(it holds 3 values of 4\)"):
        Kept(tmp_path, {"pi": Dual(length=4, version=1)}).duals.get("pi")
    path = tmp_path / "duals" / "pi.1"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StateError, match=r"pi\.1 is damaged"):
        kept.duals.get("pi")
    path.unlink()
    with pytest.raises(StateError, match="dual of device pi is missing"):
        kept.duals.get("pi")


def test_a_contribution_that_the_disk_damaged_is_named(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    kept.duals.put("pi", vector(0))
    kept.contribute("pi", 1.0)
    path = tmp_path / "contributions" / "000001.log"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StateError, match=r"000001.log is damaged \(the contribution at byte 16 differs\)"):
        kept.duals.get("pi")


@pytest.mark.parametrize(
    ("blob", "told"),
    [(b"FDQ1 no more", "of device pi is damaged"), (messages.encode(messages.Offline(boot="b")), "offline message")],
)
def test_a_record_that_holds_no_contribution_is_named(blob: bytes, told: str, tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    place = kept.log.append(Record(device="pi", round=1, kappa=1, blob=blob))
    with pytest.raises(StateError, match=told):
        Kept(tmp_path, {"pi": Dual(length=3, records=(place,))}).duals.get("pi")


def test_a_record_of_another_device_is_named(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    place = kept.log.append(Record(device="another", round=1, kappa=1, blob=b""))
    with pytest.raises(StateError, match=r"is of another folder: at byte 16 is a contribution of another, expected pi"):
        Kept(tmp_path, {"pi": Dual(length=3, records=(place,))}).duals.get("pi")

"""The log of contributions: what was committed is there or missed, what was not may be cut off."""

import logging
import os
from pathlib import Path
from typing import NoReturn

import pytest

from fedeq_edge.errors import StateError
from fedeq_edge.storage import Record, audit_trail, contributions
from fedeq_edge.storage.contributions import FIRST, ContributionLog, Place
from tests.storage.stored import Disk

HEAD = 16  # of a file: magic and mark
RECORD_HEAD = 46


def record(number: int, size: int = 40) -> Record:
    """The blob has a byte of every value, so that no damage goes unseen."""
    blob = bytes((number + position) % 256 for position in range(size))
    return Record(device=f"d-{number % 3}", round=number, kappa=2**31 + number, blob=blob, factor=1 + number)


def written(folder: Path, count: int, *, commits: tuple[int, ...] = ()) -> list[Place]:
    """Places of so many records in a new log; after those with these indices there is a commit."""
    log = ContributionLog(folder)
    places = []
    for number in range(count):
        places.append(log.append(record(number)))
        if number in commits:
            log.commit()
    return places


def found(folder: Path, start: Place = FIRST) -> list[Record]:
    return [record for _, record in ContributionLog(folder, start).journal()]


def test_records_come_back_as_they_were_in_their_order(tmp_path: Path) -> None:
    places = written(tmp_path, 7)
    log = ContributionLog(tmp_path)
    assert list(log.journal()) == [(place, record(number)) for number, place in enumerate(places)]
    assert [log.read(place) for place in reversed(places)] == [record(number) for number in reversed(range(7))]


def test_a_log_that_is_opened_again_goes_on(tmp_path: Path) -> None:
    written(tmp_path, 3)
    ContributionLog(tmp_path).append(record(3))
    assert found(tmp_path) == [record(number) for number in range(4)]


def test_the_journal_begins_where_the_snapshot_ends(tmp_path: Path) -> None:
    log = ContributionLog(tmp_path)
    log.append(record(0))
    held = log.end
    log.begin(held)
    log.append(record(1))
    assert [record for _, record in log.journal()] == [record(1)]
    assert found(tmp_path, held) == [record(1)]


def test_several_contributions_share_one_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = ContributionLog(tmp_path)
    log.append(record(0))
    disk = Disk(monkeypatch)
    for number in range(1, 9):
        log.append(record(number))
    assert disk.syncs == 0
    log.commit()
    assert disk.syncs == 1
    assert disk.safe_bytes(tmp_path / "000001.log") == (tmp_path / "000001.log").stat().st_size
    log.commit()
    assert disk.syncs == 1


def test_what_a_killed_process_left_is_safe_before_anything_is_said_about_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, 2)
    disk = Disk(monkeypatch)
    ContributionLog(tmp_path)
    assert disk.safe_bytes(tmp_path / "000001.log") == (tmp_path / "000001.log").stat().st_size


@pytest.mark.parametrize("cut", [1, RECORD_HEAD - 1, RECORD_HEAD, RECORD_HEAD + 3, RECORD_HEAD + 42])
def test_a_torn_tail_is_cut_off_and_told(cut: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    places = written(tmp_path, 3)
    path = tmp_path / "000001.log"
    path.write_bytes(path.read_bytes()[: places[2].offset + cut])
    with caplog.at_level(logging.WARNING):
        log = ContributionLog(tmp_path)
    assert [record for _, record in log.journal()] == [record(0), record(1)]
    assert path.stat().st_size == places[2].offset
    assert [item.__dict__["bytes"] for item in caplog.records] == [cut]
    log.append(record(3))
    assert found(tmp_path) == [record(0), record(1), record(3)]


def test_a_hole_before_whole_records_that_no_commit_had_reached_is_a_torn_tail(tmp_path: Path) -> None:
    places = written(tmp_path, 5, commits=(1,))
    zero(tmp_path / "000001.log", places[2].offset)
    assert found(tmp_path) == [record(0), record(1)]


def zero(path: Path, start: int) -> None:
    content = bytearray(path.read_bytes())
    content[start : start + 30] = bytes(30)
    path.write_bytes(content)


def test_every_damaged_byte_before_a_commit_is_refused_and_nothing_is_cut(tmp_path: Path) -> None:
    places = written(tmp_path, 3, commits=(0, 1))
    path = tmp_path / "000001.log"
    sound = path.read_bytes()
    for position in range(HEAD, places[2].offset):
        damaged = bytearray(sound)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(
            StateError, match=r"000001.log is damaged \(the contribution at byte \d+ differs\); restore"
        ):
            ContributionLog(tmp_path)
        assert path.read_bytes() == damaged


def test_a_damaged_beginning_is_refused(tmp_path: Path) -> None:
    written(tmp_path, 1)
    path = tmp_path / "000001.log"
    sound = path.read_bytes()
    for damaged in (b"FDQX" + sound[4:], sound[: HEAD - 1], b""):
        path.write_bytes(damaged)
        with pytest.raises(StateError, match=r"is damaged \(its beginning differs\)"):
            ContributionLog(tmp_path)


def test_no_blob_can_pass_for_a_record(tmp_path: Path) -> None:
    """A device sends records of a log, which claim that all before them was committed; the power fails meanwhile."""
    places = written(tmp_path / "another", 3, commits=(0, 1))
    content = (tmp_path / "another" / "000001.log").read_bytes()[places[1].offset :]
    log = ContributionLog(tmp_path / "log")
    log.append(record(0))
    torn = log.append(record(1))
    log.append(Record(device="liar", round=1, kappa=1, blob=content))
    zero(tmp_path / "log" / "000001.log", torn.offset)
    assert found(tmp_path / "log") == [record(0)]


def test_a_log_that_ends_before_its_snapshot_does_is_refused(tmp_path: Path) -> None:
    places = written(tmp_path, 2)
    path = tmp_path / "000001.log"
    start = Place(1, path.stat().st_size)
    path.write_bytes(path.read_bytes()[: places[1].offset])
    with pytest.raises(StateError, match=r"it has \d+ bytes of \d+ that its snapshot counts on"):
        ContributionLog(tmp_path, start)
    path.unlink()
    with pytest.raises(StateError, match=r"000001.log is missing; restore its whole state folder"):
        ContributionLog(tmp_path, start)


def test_a_log_that_is_newer_than_its_snapshot_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contributions, "FILE_BYTES", 1)
    log = ContributionLog(tmp_path)
    old = log.append(record(0))
    log.begin(log.end)
    log.append(record(1))
    with pytest.raises(StateError, match=r"000002.log is newer than the snapshot beside it"):
        ContributionLog(tmp_path, old)


def test_a_record_that_claims_more_bytes_than_there_are_costs_no_memory(tmp_path: Path) -> None:
    places = written(tmp_path, 1)
    path = tmp_path / "000001.log"
    content = bytearray(path.read_bytes())
    start = places[0].offset + 36  # the blob's length
    content[start : start + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert found(tmp_path) == []


def test_a_full_disk_is_named_and_what_was_half_written_is_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ContributionLog(tmp_path)
    log.append(record(0))
    whole = os.pwritev

    def half(handle: int, parts: tuple[bytes, ...], offset: int) -> int:
        return whole(handle, parts[:1], offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", half)
        with pytest.raises(StateError, match=r"cannot write .*000001.log: No space left on device; free some space"):
            log.append(record(1, size=400))
    assert found(tmp_path) == [record(0)]
    log.append(record(2))
    assert found(tmp_path) == [record(0), record(2)]


def test_a_disk_that_refuses_a_commit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = ContributionLog(tmp_path)
    log.append(record(0))

    def fails(_handle: int) -> NoReturn:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fails)
        with pytest.raises(StateError, match=r"cannot write .*000001.log: Input/output error"):
            log.commit()


def test_a_long_file_is_followed_by_another_at_a_snapshot_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contributions, "FILE_BYTES", 200)
    log = ContributionLog(tmp_path)
    places = [log.append(record(number)) for number in range(3)]
    log.begin(log.end)
    places += [log.append(record(3))]
    log.begin(log.end)
    places += [log.append(record(4))]
    assert [place.file for place in places] == [1, 1, 1, 2, 2]
    assert [log.read(place) for place in places] == [record(number) for number in range(5)]


def test_files_are_deleted_unless_something_needs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contributions, "FILE_BYTES", 1)
    log = ContributionLog(tmp_path)
    for number in range(4):
        log.append(record(number))
        log.begin(log.end)
    log.append(record(4))
    log.delete_all_but({2})
    assert sorted(path.name for path in tmp_path.glob("*.log")) == ["000002.log", "000005.log"]
    with pytest.raises(StateError, match=r"000001.log is missing"):
        log.read(Place(1, HEAD))


def test_a_file_that_nothing_needs_is_written_over_and_what_it_held_does_not_come_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = ContributionLog(tmp_path, file_bytes=1)
    for number in range(3):
        log.append(record(number))
    start = log.end
    log.begin(start)
    log.delete_all_but(())
    size = (tmp_path / "spare").stat().st_size
    log.append(record(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000002.log"]
    assert (tmp_path / "000002.log").stat().st_size == size
    with caplog.at_level(logging.WARNING):
        assert found(tmp_path, start) == [record(3)]
    assert not caplog.records
    assert (tmp_path / "000002.log").stat().st_size < size


def test_the_audit_trail_reads_all_files_while_an_aggregator_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contributions, "FILE_BYTES", 200)
    log = ContributionLog(tmp_path / "contributions")
    for number in range(6):
        log.append(record(number))
        log.begin(log.end)
    path = tmp_path / "contributions" / "000002.log"
    with path.open("ab") as output:
        output.write(b"half")
    assert list(audit_trail(tmp_path)) == [record(number) for number in range(6)]
    assert path.read_bytes().endswith(b"half")

"""A device's outbox: what a round leaves on the disk, and the state that comes of it after a crash at any point."""

import os
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fedeq_edge import storage
from fedeq_edge.consensus.fixed import WHOLE
from fedeq_edge.errors import StateError
from fedeq_edge.protocol.state import ClientState, Pending, settled
from fedeq_edge.storage import ClientFolder
from fedeq_edge.wire import chunks, coding, messages
from tests.protocol.fleet import METRICS

SIZE = 70
BEGUN = ClientState(run="r", head=np.zeros(2, np.float32))


def pending(number: int) -> Pending:
    """The contribution of one round."""
    difference = np.random.default_rng(number).normal(size=SIZE).astype(np.float32)
    message = messages.Contribution(
        run="r", round=number, boot="b", base=bytes(32), samples=5, codec="int8", length=SIZE, metrics=METRICS
    )
    blob = messages.encode(message, coding.encode("int8", difference))
    return Pending(round=number, kappa=0.5, blob=blob, transfer=chunks.digest(blob))


def head(number: int) -> np.ndarray:
    return np.full(2, number, np.float32)


def same(found: ClientState, expected: ClientState) -> None:
    np.testing.assert_equal(msgspec.structs.asdict(found), msgspec.structs.asdict(expected))


def test_rounds_come_back_out_of_the_log(tmp_path: Path) -> None:
    folder, state = ClientFolder(tmp_path), BEGUN
    folder.save(state)
    for number, factor in ((1, WHOLE), (2, WHOLE // 3), (3, 0)):
        folder.keep(pending(number), head(number))
        state = msgspec.structs.replace(state, pending=pending(number), head=head(number))
        same(ClientFolder(tmp_path).load(), state)
        folder.settle(accepted=True, factor=factor)
        state = settled(state, accepted=True, factor=factor)
        same(ClientFolder(tmp_path).load(), state)
    assert state.accepted_round == 3
    assert state.nu.any()


def test_a_refused_contribution_moves_nothing(tmp_path: Path) -> None:
    folder = ClientFolder(tmp_path)
    folder.save(BEGUN)
    folder.keep(pending(1), head(1))
    folder.settle(accepted=False)
    same(ClientFolder(tmp_path).load(), msgspec.structs.replace(BEGUN, head=head(1)))


def test_a_state_written_whole_ends_the_log(tmp_path: Path) -> None:
    folder = ClientFolder(tmp_path)
    folder.save(BEGUN)
    folder.keep(pending(1), head(1))
    folder.settle(accepted=True)
    state = folder.load()
    folder.save(state)
    folder.keep(pending(2), head(2))
    expected = msgspec.structs.replace(state, pending=pending(2), head=head(2))
    same(ClientFolder(tmp_path).load(), expected)


def test_a_power_cut_takes_a_verdict_at_most_and_never_what_was_settled_before(tmp_path: Path) -> None:
    folder = ClientFolder(tmp_path)
    folder.save(BEGUN)
    folder.keep(pending(1), head(1))
    folder.settle(accepted=True)
    folder.keep(pending(2), head(2))
    before = ClientFolder(tmp_path).load()
    (log,) = (tmp_path / "outbox").iterdir()
    length = log.stat().st_size
    folder.settle(accepted=True)
    for cut in range(length, log.stat().st_size):
        os.truncate(log, cut)
        found = ClientFolder(tmp_path).load()
        assert found.pending is not None
        same(found, before)


def test_a_round_writes_its_contribution_once_and_no_state(tmp_path: Path) -> None:
    folder = ClientFolder(tmp_path)
    folder.save(msgspec.structs.replace(BEGUN, z=np.zeros(SIZE, np.float32), nu=np.zeros(SIZE, np.int64)))
    written = (tmp_path / "client.state").stat().st_mtime_ns
    for number in range(1, 4):
        folder.keep(pending(number), head(number))
        folder.settle(accepted=True)
    assert (tmp_path / "client.state").stat().st_mtime_ns == written
    (log,) = (tmp_path / "outbox").iterdir()
    assert log.stat().st_size < 3 * (len(pending(1).blob) + 300)


@pytest.mark.parametrize("blob", [b"", b"\xff" * 40])
def test_a_record_that_is_no_contribution_is_named(blob: bytes, tmp_path: Path) -> None:
    folder = ClientFolder(tmp_path)
    folder.save(BEGUN)
    folder._log.append(storage.Record(device="pending", round=7, kappa=1, blob=blob))
    with pytest.raises(StateError, match="the contribution for round 7 is damaged"):
        folder.load()

"""Vectors and outcomes of clients that are not at work: in files, and the same when they come back."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fedeq_edge.consensus.fixed import dual_value
from fedeq_edge.simulation import journal
from fedeq_edge.simulation.jobs import Job, Outcome
from fedeq_edge.simulation.journal import Journal, Waiting
from fedeq_edge.simulation.vectors import FleetDuals, VectorFile
from fedeq_edge.training.step import Budget, LocalResult

SIZE = 1000


def outcome(number: int, cost_s: float = 1.0) -> Outcome:
    difference = np.random.default_rng(number).standard_normal(SIZE).astype(np.float32)
    result = LocalResult(
        difference=difference,
        head=np.zeros(3, np.float32),
        loss=0.5,
        residual=0.1,
        backward_residual=0.1,
        budget=Budget(forward=2, adjoint=1),
        steps=1,
        seconds=1.0,
        reduced=False,
        accuracy_consensus=0.5,
    )
    return Outcome(number=number, name=("train", f"d{number}", 0), result=result, cost_s=cost_s)


def difference(found: Outcome) -> np.ndarray:
    assert found.result is not None
    return found.result.difference


def test_a_vector_comes_back_as_it_was_put_and_room_is_used_again(tmp_path: Path) -> None:
    kept = VectorFile(tmp_path, SIZE, np.float32)
    rng = np.random.default_rng(0)
    for turn in range(5):
        vectors = {f"{turn}-{number}": rng.standard_normal(SIZE).astype(np.float32) for number in range(3)}
        for name, vector in vectors.items():
            kept.put(name, vector)
        for name, vector in vectors.items():
            np.testing.assert_array_equal(kept.get(name), vector)
            kept.drop(name)
    assert kept._end == 3
    with pytest.raises(KeyError):
        kept.get("4-0")
    kept.close()


@pytest.mark.parametrize("high", [3, 30, 40])
def test_duals_are_sums_of_their_steps_of_any_size(high: int, tmp_path: Path) -> None:
    duals = FleetDuals(tmp_path, SIZE)
    steps = np.random.default_rng(0).integers(-(2**high), 2**high, (4, SIZE))
    duals.put("a", np.zeros(SIZE, np.int64))
    duals.put("b", np.zeros(SIZE, np.int64))
    for step in steps:
        duals.advance("a", step)
        np.testing.assert_array_equal(duals.value("a"), dual_value(duals.get("a"), np.float32))
    np.testing.assert_array_equal(duals.get("a"), steps.sum(axis=0))
    assert not duals.value("b").any()
    assert not duals.get("b").any()
    duals.put("a", np.zeros(SIZE, np.int64))
    assert not duals.get("a").any()
    duals.put("a", steps[0] << 20)
    np.testing.assert_array_equal(duals.get("a"), steps[0] << 20)
    duals.drop("a")
    with pytest.raises(KeyError):
        duals.get("a")
    duals.close()


def test_outcomes_beyond_the_memory_for_them_wait_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_HELD_BYTES", 3 * 4 * SIZE)
    waiting = Waiting(tmp_path, SIZE)
    for number in range(10):
        waiting.put(outcome(number))
    assert len(waiting._held) == 3
    for number in (5, 9, 0, 7, 1, 2, 3, 4, 6, 8):
        np.testing.assert_array_equal(difference(waiting.take(number)), difference(outcome(number)))
    waiting.close()


class Counting:
    """A runner that says what it was asked for."""

    def __init__(self, cost_s: float = 1.0) -> None:
        self.asked: list[int] = []
        self._cost_s = cost_s

    def hold(self, base: bytes, z: np.ndarray) -> None:
        pass

    def run(self, wanted: Iterable[Job]) -> Iterator[Outcome]:
        for job in wanted:
            self.asked.append(job.number)
            yield outcome(job.number, self._cost_s if job.number % 2 else 0.0)


def test_what_was_cheap_is_done_again_and_the_rest_is_read_in_order(tmp_path: Path) -> None:
    wanted = [Job(number=n, kind="train", device=f"d{n}", round=0, base=b"z") for n in range(7)]
    first, again = Counting(), Counting()
    for runner in (first, again):
        kept = Journal(runner, tmp_path / "run.journal", b"identity")
        found = list(kept.run(wanted))
        assert [one.number for one in found] == list(range(7))
        for one in found:
            np.testing.assert_array_equal(difference(one), difference(outcome(one.number)))
        kept.close()
    assert first.asked == list(range(7))
    assert again.asked == [0, 2, 4, 6]
    assert kept.replayed == 3


def test_a_journal_of_another_run_is_begun_anew(tmp_path: Path) -> None:
    wanted = [Job(number=1, kind="train", device="d1", round=0, base=b"z")]
    for identity in (b"one run....", b"another run"):
        runner = Counting()
        kept = Journal(runner, tmp_path / "run.journal", identity)
        list(kept.run(wanted))
        kept.close()
        assert runner.asked == [1]

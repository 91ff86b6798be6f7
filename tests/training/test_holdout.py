from dataclasses import replace

import numpy as np
import pytest

from fedeq_edge.data.npz import ClientData
from fedeq_edge.errors import ConfigError
from fedeq_edge.training.holdout import drawn_by_class, held_out


def numbered(labels: np.ndarray) -> ClientData:
    """Samples that are their own row number; the test part is -1."""
    x = np.arange(len(labels), dtype=np.float32)[:, None]
    return ClientData(x_train=x, y_train=labels, x_test=-np.ones((5, 1), np.float32), y_test=np.zeros(5, np.int64))


LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), (40, 20, 7, 2)))


def test_training_and_validation_are_a_partition_of_the_training_part_and_the_test_part_is_gone() -> None:
    cut = held_out(numbered(LABELS), 0.2, seed=1)
    rows = np.concatenate([cut.x_train[:, 0], cut.x_test[:, 0]])
    assert sorted(rows) == list(range(len(LABELS)))
    assert np.array_equal(LABELS[cut.x_test[:, 0].astype(int)], cut.y_test)
    assert np.array_equal(LABELS[cut.x_train[:, 0].astype(int)], cut.y_train)


def test_every_class_gives_its_share_up_to_one() -> None:
    for seed in range(20):
        counts = np.bincount(held_out(numbered(LABELS), 0.2, seed=seed).y_test, minlength=4)
        assert np.all(np.abs(counts - 0.2 * np.array([40, 20, 7, 2])) < 1.0)
        assert counts.sum() in (13, 14)  # of 13.8


def test_the_same_seed_cuts_alike_and_another_does_not() -> None:
    first, again, other = (held_out(numbered(LABELS), 0.3, seed=seed).x_test for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert first.shape != other.shape or not np.array_equal(first, other)


def test_classes_too_small_for_a_sample_of_their_own_take_turns() -> None:
    singles = np.arange(10)
    drawn = sum(drawn_by_class(singles, 0.2, np.random.default_rng(seed)) for seed in range(50))
    assert np.min(drawn) > 0


def test_one_sample_at_least_stays_to_train_on() -> None:
    for seed in range(10):
        assert len(held_out(numbered(np.zeros(2, np.int64)), 0.99, seed=seed).y_train) == 1
        assert len(held_out(numbered(np.zeros(1, np.int64)), 0.5, seed=seed).y_train) == 1


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_that_leaves_a_part_empty_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        held_out(numbered(LABELS), share, seed=0)


def test_of_a_recording_the_last_rows_of_each_class_are_held_out_and_their_neighbours_are_in_neither_part() -> None:
    labels = np.repeat(np.arange(3), (10, 20, 1))
    cut = held_out(numbered(labels), 0.2, seed=0, ordered=True)
    assert cut.x_test[:, 0].tolist() == [8, 9, 26, 27, 28, 29]
    assert cut.x_train[:, 0].tolist() == [*range(7), *range(10, 25), 30]
    assert np.array_equal(labels[cut.x_test[:, 0].astype(int)], cut.y_test)


def test_of_a_recording_the_first_row_stays_to_train_on() -> None:
    cut = held_out(numbered(np.zeros(2, np.int64)), 0.9, seed=0, ordered=True)
    assert cut.x_train[:, 0].tolist() == [0]
    assert cut.x_test[:, 0].tolist() == [1]


def test_what_the_file_gives_for_validation_is_held_out_and_no_share_of_the_rest() -> None:
    marks = np.arange(len(LABELS)) % 9 == 0
    cut = held_out(replace(numbered(LABELS), validation=marks), 0.5, seed=0, ordered=True)
    assert cut.x_test[:, 0].tolist() == np.flatnonzero(marks).tolist()
    assert cut.x_train[:, 0].tolist() == np.flatnonzero(~marks).tolist()
    assert cut.validation is None

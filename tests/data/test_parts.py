import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedeq_edge.data.archives import Samples
from fedeq_edge.data.parts import NEITHER, TEST, TRAIN, VALIDATION, keeps_official, parted

PROPERTIES = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def people(sizes: list[int], labels: int, *, windows: bool = False, official: np.ndarray | None = None) -> Samples:
    """Person i has sizes[i] samples, their labels in runs of equal length; as windows, a run is one recording."""
    y = np.concatenate([np.sort(np.arange(size) % labels) for size in sizes])
    client = np.repeat(np.arange(len(sizes)), sizes)
    same = (np.diff(y, prepend=-1) == 0) & (np.diff(client, prepend=-1) == 0)
    return Samples(
        x=np.zeros((y.size, 1), np.float32),
        y=y,
        classes=tuple(str(label) for label in range(labels)),
        client=client,
        official_test=official,
        follows=same if windows else None,
    )


def shares(parts: np.ndarray) -> list[int]:
    return [int((parts == part).sum()) for part in (TRAIN, VALIDATION, TEST, NEITHER)]


def test_independent_samples_are_parted_seven_to_one_to_two_for_each_person() -> None:
    parts = parted(people([100, 50], labels=5), official=False, rng=np.random.default_rng(0))
    assert shares(parts[:100]) == [70, 10, 20, 0]
    assert shares(parts[100:]) == [35, 5, 10, 0]


@PROPERTIES
@given(size=st.integers(5, 200), labels=st.integers(1, 20), seed=st.integers(0, 50))
def test_everyone_with_five_samples_has_all_parts_and_each_label_its_share(size: int, labels: int, seed: int) -> None:
    samples = people([size], labels)
    parts = parted(samples, official=False, rng=np.random.default_rng(seed))
    assert min(shares(parts)[:3]) >= 1
    for label in np.unique(samples.y):
        mine = parts[samples.y == label]
        assert abs((mine == TEST).sum() - 0.2 * mine.size) < 2
        assert abs((mine == VALIDATION).sum() - 0.1 * mine.size) < 2


@PROPERTIES
@given(sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5), labels=st.integers(1, 6), seed=st.integers(0, 50))
def test_no_two_parts_share_measurements(sizes: list[int], labels: int, seed: int) -> None:
    samples = people(sizes, labels, windows=True)
    parts = parted(samples, official=False, rng=np.random.default_rng(seed))
    assert samples.follows is not None
    for row in np.flatnonzero(samples.follows):
        assert parts[row] == parts[row - 1] or NEITHER in (parts[row], parts[row - 1])


def test_windows_are_parted_in_time_and_few_are_given_up() -> None:
    parts = parted(people([200], labels=2, windows=True), official=False, rng=np.random.default_rng(0))
    one_label = parts[:100].tolist()
    assert one_label == [TRAIN] * 69 + [NEITHER] + [VALIDATION] * 9 + [NEITHER] + [TEST] * 20


def test_labels_with_a_window_or_two_are_tested_on_some_people() -> None:
    samples = people([1] * 300, labels=1, windows=True)
    parts = parted(samples, official=False, rng=np.random.default_rng(0))
    assert 40 <= (parts == TEST).sum() <= 80
    assert (parts == TRAIN).sum() > 150


def test_the_authors_test_part_is_kept_where_everyone_is_in_both() -> None:
    official = np.arange(100) % 4 == 0
    samples = people([50, 50], labels=3, official=official)
    assert keeps_official(samples, natural=True)
    parts = parted(samples, official=True, rng=np.random.default_rng(0))
    assert ((parts == TEST) == official).all()
    assert shares(parts)[1] == pytest.approx(7, abs=1)


def test_other_test_people_are_clients_too_but_test_those_that_are_made() -> None:
    samples = people([50, 50], labels=3, official=np.arange(100) >= 50)
    assert not keeps_official(samples, natural=True)
    assert keeps_official(samples, natural=False)
    assert not keeps_official(people([10], labels=2), natural=False)


def test_taking_rows_away_keeps_track_of_what_overlaps() -> None:
    samples = people([6], labels=1, windows=True)
    assert samples.follows is not None
    assert samples.follows.tolist() == [False, True, True, True, True, True]
    fewer = samples.take(np.array([0, 1, 3, 4]))
    assert fewer.follows is not None
    assert fewer.follows.tolist() == [False, True, False, True]

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedeq_edge.data.partition import by_labels, dirichlet, label_sets
from fedeq_edge.errors import DataError

Y = np.random.default_rng(0).integers(0, 10, size=1000)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(clients=st.integers(1, 40), labels=st.integers(1, 10), seed=st.integers(0, 100))
def test_every_label_is_on_the_same_number_of_clients_or_one_more(clients: int, labels: int, seed: int) -> None:
    sets = label_sets(clients, labels, 10, seed=seed)
    assert all(len(set(chosen)) == labels for chosen in sets)
    counts = np.bincount(np.concatenate(sets), minlength=10)
    assert counts.max() - counts.min() <= 1


def test_label_shards_are_disjoint_of_the_size_asked_for_and_of_their_labels_alone() -> None:
    sets = label_sets(6, 3, 10, seed=1)
    parts = by_labels(Y, sets, per_client=50, seed=1)
    assert [part.size for part in parts] == [50] * 6
    assert np.unique(np.concatenate(parts)).size == 300
    for part, labels in zip(parts, sets, strict=True):
        counts = np.bincount(Y[part], minlength=10)[list(labels)]
        assert counts.sum() == 50
        assert counts.max() - counts.min() <= 1


def test_without_a_size_every_sample_of_a_held_label_is_shared_out_equally() -> None:
    parts = by_labels(Y, [(0, 1), (1, 2), (1,)], per_client=None, seed=2)
    assert sorted(np.concatenate(parts)) == list(np.flatnonzero(Y <= 2))
    ones = [int((Y[part] == 1).sum()) for part in parts]
    assert max(ones) - min(ones) <= 1


def test_more_samples_than_a_label_has_are_refused() -> None:
    with pytest.raises(DataError, match=r"label 0 has \d+ samples, but its 1 clients ask for 500"):
        by_labels(Y, [(0,)], per_client=500, seed=0)


def test_a_partition_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(DataError, match="from 1 to 10 labels"):
        label_sets(3, 11, 10, seed=0)
    with pytest.raises(DataError, match="alpha 0"):
        dirichlet(Y, 3, alpha=0.0, seed=0)


def test_a_dirichlet_split_holds_every_sample_once_and_is_the_more_uneven_the_smaller_alpha() -> None:
    def unevenness(alpha: float) -> float:
        parts = dirichlet(Y, 8, alpha=alpha, seed=3)
        assert sorted(np.concatenate(parts)) == list(range(Y.size))
        shares = [np.bincount(Y[part], minlength=10) / part.size for part in parts]
        return float(np.std(shares, axis=0).mean())

    assert unevenness(0.1) > 2 * unevenness(1.0) > 4 * unevenness(100.0)


def test_a_dirichlet_split_keeps_to_the_smallest_size_or_says_that_it_cannot() -> None:
    assert min(part.size for part in dirichlet(Y, 10, alpha=0.3, smallest=20, seed=4)) >= 20
    with pytest.raises(DataError, match="raise alpha"):
        dirichlet(Y, 10, alpha=0.3, smallest=101, seed=4)


def test_the_same_seed_gives_the_same_split() -> None:
    for first, second in zip(dirichlet(Y, 5, alpha=0.5, seed=5), dirichlet(Y, 5, alpha=0.5, seed=5), strict=True):
        assert (first == second).all()

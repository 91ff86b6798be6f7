import numpy as np
import pytest

from fedeq_edge.training.neighbours import SHARES, Neighbours, hits, mixed


def memory(count: int = 40, *, nearest: int = 7, scale: float = 0.7, seed: int = 0) -> Neighbours:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, 5)).astype(np.float32)
    return Neighbours(features=features, labels=rng.integers(0, 4, count), classes=4, nearest=nearest, scale=scale)


def queries(seed: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(11, 5)).astype(np.float32)


@pytest.mark.parametrize(("nearest", "scale"), [(1, 1.0), (7, 0.7), (40, 2.0), (100, 1.0)])
def test_chances_are_those_of_a_sorted_list_of_distances(nearest: int, scale: float) -> None:
    stored = memory(nearest=nearest, scale=scale)
    for query, found in zip(queries(), stored.chances(queries()), strict=True):
        distances = np.linalg.norm(stored.features.astype(float) - query, axis=1)
        votes = np.zeros(4)
        for row in sorted(range(40), key=lambda row: distances[row])[:nearest]:
            votes[stored.labels[row]] += np.exp(-distances[row] / scale)
        assert found == pytest.approx(votes / votes.sum(), abs=1e-5)


def test_queries_far_from_everything_still_have_chances() -> None:
    chances = memory(scale=1e-3).chances(np.float32(1e4) * queries())
    assert chances.sum(axis=1) == pytest.approx(np.ones(11), abs=1e-6)


def test_a_share_of_nothing_is_the_model_and_of_one_the_neighbours() -> None:
    votes, model = memory().chances(queries()), memory(seed=2).chances(queries())
    assert np.array_equal(mixed(0.0, votes, model), model)
    assert np.array_equal(mixed(1.0, votes, model), votes)


def test_the_share_is_none_where_the_model_is_always_right_and_large_where_it_knows_nothing() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 80)
    features = (3.0 * np.eye(4, 5)[labels] + 0.3 * rng.normal(size=(80, 5))).astype(np.float32)
    stored = Neighbours(features=features, labels=labels, classes=4, nearest=5, scale=1.0)
    right, wrong = np.eye(4, dtype=np.float32)[labels], np.eye(4, dtype=np.float32)[(labels + 1) % 4]
    assert stored.best_share(right) == 0.0
    assert stored.best_share(wrong) in SHARES[5:]
    assert hits(mixed(stored.best_share(wrong), stored.chances(features), wrong), labels) > 0.9


def test_a_device_with_a_single_sample_mixes_nothing() -> None:
    stored = memory(1)
    assert stored.best_share(np.full((1, 4), 0.25, np.float32)) == 0.0

import math

import numpy as np
import pytest

from fedeq_edge.errors import SolverError
from fedeq_edge.training import refit


def clusters(seed: int = 0) -> tuple[refit.Matrix, np.ndarray]:
    """60 samples of 3 classes with 5 features, not separable."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), 20)
    centres = generator.normal(size=(3, 5))
    return (centres[labels] + generator.normal(size=(60, 5))).astype(np.float32), labels


def zeros(classes: int = 3, features: int = 5) -> np.ndarray:
    return np.zeros(classes * (features + 1), dtype=np.float32)


def test_the_gradient_is_that_of_the_decayed_cross_entropy() -> None:
    features, labels = clusters()
    head = np.random.default_rng(1).normal(size=18).astype(np.float32)

    def objective(vector: np.ndarray) -> float:
        return refit.cross_entropy(features, labels, vector) + refit.DECAY * float((vector**2).sum())

    def slope(index: int) -> float:
        nudge = np.zeros(18)
        nudge[index] = 1e-4
        return (objective(head + nudge) - objective(head - nudge)) / 2e-4

    expected = [slope(index) for index in range(18)]
    found = refit._gradients(features, labels, np.stack([zeros(), head]), np.full((2, 60), 1 / 60, np.float32))
    np.testing.assert_allclose(found[1], expected, atol=1e-5)


def test_a_refit_lowers_the_loss_and_leaves_the_given_head_alone() -> None:
    features, labels = clusters()
    start = zeros()
    fitted = refit.fit_head(features, labels, start, steps=50, rate=0.05)
    assert refit.cross_entropy(features, labels, fitted) < 0.7 * refit.cross_entropy(features, labels, start)
    assert not start.any()
    assert fitted.dtype == np.float32


def test_a_long_refit_of_one_class_stays_finite() -> None:
    features, _ = clusters()
    fitted = refit.fit_head(features, np.zeros(60, dtype=np.int64), zeros(), steps=2000, rate=0.1)
    assert np.isfinite(fitted).all()
    assert refit.accuracy(features, np.zeros(60, dtype=np.int64), fitted) == 1.0


def test_a_class_that_the_device_never_saw_loses_its_bias() -> None:
    features, labels = clusters()
    seen = labels < 2
    fitted = refit.fit_head(features[seen], labels[seen], zeros(), steps=100, rate=0.05)
    assert fitted[-1] < min(fitted[-3], fitted[-2])


def test_few_samples_are_pulled_to_the_head_that_came_and_many_are_not() -> None:
    features, labels = clusters()
    start = np.random.default_rng(3).normal(size=18).astype(np.float32)

    def moved(times: int, pull: float) -> float:
        many = np.tile(features[:3], (times, 1)), np.tile(labels[:3], times)
        fitted = refit.fit_head(*many, start, steps=400, rate=0.05, pull=pull)
        return float(np.linalg.norm(fitted - start))

    assert moved(1, 10.0) < 0.1 * moved(1, 0.0)
    assert moved(10, 10.0) == pytest.approx(moved(1, 1.0), rel=1e-3)  # tau / n is what counts
    assert moved(10_000, 10.0) > 0.9 * moved(1, 0.0)


def test_scores_far_apart_do_not_overflow() -> None:
    features, labels = clusters()
    assert np.isfinite(refit.cross_entropy(features * 1e4, labels, np.ones(18, dtype=np.float32)))


def test_accuracy_without_samples_is_not_a_number() -> None:
    assert np.isnan(refit.accuracy(np.zeros((0, 5), dtype=np.float32), np.zeros(0, dtype=np.int64), zeros()))


@pytest.mark.parametrize("steps", [0, 1])
def test_as_many_steps_as_asked_for_are_made(steps: int) -> None:
    features, labels = clusters()
    moved = refit.fit_head(features, labels, zeros(), steps=steps, rate=0.01)
    # Adam's first step has the size of the rate wherever there is a gradient; balanced classes leave the biases none
    np.testing.assert_allclose(np.abs(moved[:15]), 0.01 * steps, rtol=1e-3)


def noisy(samples: int, signal: float) -> tuple[refit.Matrix, np.ndarray, np.ndarray]:
    """Samples of 3 classes, of whose 40 features the first 3 tell the class, and a head that reads these alone."""
    generator = np.random.default_rng(5)
    labels = generator.integers(0, 3, samples)
    features = generator.normal(size=(samples, 40)).astype(np.float32)
    features[np.arange(samples), labels] += signal
    head = zeros(features=40)
    head[[0, 41, 82]] = 1.5
    return features, labels, head


def test_a_head_that_fits_already_stays_where_many_features_would_mislead_it() -> None:
    features, labels, head = noisy(samples=60, signal=2.0)
    assert refit.best_pull(features, labels, head, steps=100, rate=0.05) >= 10.0
    kept, moved = (refit.fit_head(features, labels, head, steps=100, rate=0.05, pull=pull) for pull in (None, 0.1))
    assert float(np.linalg.norm(kept - head)) < 0.3 * float(np.linalg.norm(moved - head))


def test_weak_evidence_changes_nothing() -> None:
    features, labels, head = noisy(samples=9, signal=2.0)
    assert refit.best_pull(features, labels, head, steps=20, rate=0.01) == refit.USUAL


def test_a_head_of_other_labels_is_fitted_anew() -> None:
    features, labels, head = noisy(samples=300, signal=2.0)
    turned = (labels + 1) % 3
    assert refit.best_pull(features, turned, head, steps=100, rate=0.05) <= 10.0
    fitted = refit.fit_head(features, turned, head, steps=100, rate=0.05, pull=None)
    assert refit.accuracy(features, turned, head) < 0.3
    assert refit.accuracy(features, turned, fitted) > 0.85


def test_what_is_chosen_by_a_part_of_many_samples_is_fitted_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, head = noisy(samples=300, signal=2.0)
    turned = (labels + 1) % 3
    monkeypatch.setattr(refit, "MOST_SAMPLES", 90)
    pull = refit.best_pull(features, turned, head, steps=100, rate=0.05)
    assert pull <= 10.0
    chosen, set_for_all = (
        refit.fit_head(features, turned, head, steps=100, rate=0.05, pull=given) for given in (None, pull)
    )
    np.testing.assert_array_equal(chosen, set_for_all)


@pytest.mark.parametrize("pull", [None, 0.1])
def test_a_feature_that_is_not_finite_is_refused(pull: float | None) -> None:
    features, labels, head = noisy(samples=30, signal=2.0)
    features[7, 3] = np.inf
    with pytest.raises(SolverError, match="a feature is not finite"):
        refit.fit_head(features, labels, head, steps=5, rate=0.05, pull=pull)


@pytest.mark.parametrize("samples", [1, 2])
def test_too_few_samples_to_choose_by_are_fitted_as_usual(samples: int) -> None:
    features, labels, head = noisy(samples=samples, signal=2.0)
    fitted, usual = (refit.fit_head(features, labels, head, steps=9, rate=0.01, pull=pull) for pull in (None, 0.1))
    np.testing.assert_array_equal(fitted, usual)


def test_an_infinite_pull_keeps_the_head_as_it_came() -> None:
    features, labels, head = noisy(samples=300, signal=6.0)
    kept = refit.fit_head(features, labels, head, steps=100, rate=0.5, pull=math.inf)
    np.testing.assert_array_equal(kept, head)
    assert kept is not head


def test_no_memory_bound_changes_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, head = noisy(samples=50, signal=0.5)
    together = refit.fit_head(features, labels, head, steps=50, rate=0.05, pull=None)
    assert float(np.abs(together - head).max()) > 0.0
    monkeypatch.setattr(refit, "_AT_ONCE", 1)
    one_by_one = refit.fit_head(features, labels, head, steps=50, rate=0.05, pull=None)
    np.testing.assert_allclose(one_by_one, together, atol=1e-6)


def test_every_label_is_in_every_fold() -> None:
    labels = np.repeat(np.arange(4), 6)
    folds = refit._folds(labels)
    assert all(sorted(folds[labels == label]) == [0, 0, 1, 1, 2, 2] for label in range(4))

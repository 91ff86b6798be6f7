"""Fit a head to cached equilibrium features: softmax regression in numpy, for every backend.

The features of a fixed theta cost one solve per sample; each step after that is two small matrix products.
A head is flat, (h,) float32: weight (classes, features) in C order, then bias (classes,).
"""

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.errors import SolverError
from fedeq_edge.training.backend import DIVERGED_REMEDY
from fedeq_edge.training.holdout import drawn_by_class
from fedeq_edge.training.step import Vector

Matrix = NDArray[np.float32]
Labels = NDArray[np.int64]

# Adam's usual memories (Kingma and Ba, ICLR 2015).
FIRST_MOMENT, SECOND_MOMENT, SMALLEST = 0.9, 0.999, 1e-8
# Separable classes have no finite optimum: a little decay keeps a long refit from growing the head without end.
DECAY = 1e-4
USUAL: Final = 0.1
PULLS: Final = (100.0, 10.0, 1.0, USUAL)
EVIDENCE: Final = 3.0  # nats: odds of 20 to 1, strong by Kass and Raftery (JASA 1995)
FOLDS: Final = 3
MOST_SAMPLES: Final = 2000  # to choose by: half a minute on the slowest board
_AT_ONCE: Final = 1 << 20  # numbers of several heads that may lie in memory at a time, some ten times over


def logits(features: Matrix, head: Vector) -> Matrix:
    """(n, classes) of features (n, f)."""
    weight, bias = _split(head, features.shape[1])
    scores: Matrix = features @ weight.T + bias
    return scores


def cross_entropy(features: Matrix, labels: Labels, head: Vector) -> float:
    """Mean negative log-likelihood of labels (n,), in nats."""
    likely = chances(features, head)
    return float(-np.log(np.maximum(likely[np.arange(len(labels)), labels], np.finfo(np.float32).tiny)).mean())


def chances(features: Matrix, head: Vector) -> Matrix:
    """(n, classes) softmax of the logits of features (n, f)."""
    return _softmax(logits(features, head))


def accuracy(features: Matrix, labels: Labels, head: Vector) -> float:
    """Share of labels (n,) that are hit, NaN for n = 0."""
    return float((logits(features, head).argmax(axis=1) == labels).mean()) if len(labels) else float("nan")


def fit_head(
    features: Matrix, labels: Labels, head: Vector, *, steps: int, rate: float, pull: float | None = 0.0
) -> Vector:
    """A head fitted to features (n, f) and labels (n,) by `steps` full-batch Adam steps of size `rate` from `head`.

    pull: tau >= 0 of a term tau / (2 n) |fitted - head|^2, that is of a normal prior of variance 1 / tau around `head`:
    few samples leave it where it was, many have their way. None: chosen for these samples (`best_pull`).
    Classes that the device never saw lose their bias, which is how its label prior enters. `head` is not changed.
    Raises SolverError where a feature is not finite.
    """
    if not np.isfinite(features).all():
        raise SolverError(f"refit: a feature is not finite; {DIVERGED_REMEDY}")
    if pull is None:
        pull = best_pull(features, labels, head, steps=steps, rate=rate)
    if math.isinf(pull):
        return head.copy()
    everyone = np.ones((1, len(labels)), np.float32)
    fitted: Vector = _fit(features, labels, head, everyone, np.array([pull], np.float32), steps=steps, rate=rate)[0]
    return fitted


def best_pull(features: Matrix, labels: Labels, head: Vector, *, steps: int, rate: float) -> float:
    """Of `PULLS`, and infinity for the head as it came, what predicts best the samples that a refit has not seen.

    By cross-validation over `FOLDS` parts of at most `MOST_SAMPLES`, alike in their labels. Few samples say little:
    `USUAL` it is, unless another makes them more likely by `EVIDENCE`. A head that was trained on this device has seen
    all of them, which speaks for it as it came.
    No single tau would do: images of a MNIST writer want 0.1, 450 CIFAR-10 images of five classes 10 to 100, for 4
    points of accuracy. Weaker ones gained nothing on digits, HAR and MNIST.
    """
    if len(labels) < FOLDS:
        return USUAL
    if len(labels) > MOST_SAMPLES:
        chosen = drawn_by_class(labels, MOST_SAMPLES / len(labels), np.random.default_rng(0))
        features, labels = features[chosen], labels[chosen]
    folds = _folds(labels)
    among = np.array([fold for _ in PULLS for fold in range(FOLDS)])
    fitted = _fit(
        features,
        labels,
        head,
        (folds != among[:, None]).astype(np.float32),
        np.repeat(np.array(PULLS, np.float32), FOLDS),
        steps=steps,
        rate=rate,
    )
    lost = dict.fromkeys(PULLS, 0.0)
    for fold, pull, candidate in zip(among, np.repeat(PULLS, FOLDS).tolist(), fitted, strict=True):
        held = folds == fold
        lost[pull] += cross_entropy(features[held], labels[held], candidate) * int(held.sum())
    lost[math.inf] = cross_entropy(features, labels, head) * len(labels)
    best = min(lost, key=lambda pull: (lost[pull], -pull))
    return best if lost[USUAL] - lost[best] > EVIDENCE else USUAL


def _folds(labels: Labels) -> NDArray[np.int64]:
    """(n,) in 0 .. FOLDS - 1, n >= FOLDS: each label's samples are dealt out in turn, in an order by lot."""
    order = np.lexsort((np.random.default_rng(0).random(labels.size), labels))
    folds = np.empty(labels.size, np.int64)
    folds[order] = np.arange(labels.size) % FOLDS
    return folds


def _fit(
    features: Matrix, labels: Labels, head: Vector, weights: Matrix, pulls: Vector, *, steps: int, rate: float
) -> Matrix:
    """(m, h): heads fitted from `head`, each to samples weighted by a row of weights (m, n), with its pull of (m,).

    All at once: with few samples it is the calls that cost. No more of them than bounded memory holds.
    """
    most = max(1, _AT_ONCE // max(len(labels) * _classes(features.shape[1], head), head.size))
    parts = [slice(first, first + most) for first in range(0, len(pulls), most)]
    return np.concatenate(
        [_fit_together(features, labels, head, weights[part], pulls[part], steps=steps, rate=rate) for part in parts]
    )


def _fit_together(
    features: Matrix, labels: Labels, head: Vector, weights: Matrix, pulls: Vector, *, steps: int, rate: float
) -> Matrix:
    fitted: Matrix = np.repeat(head[None], len(pulls), axis=0)
    shares = weights / weights.sum(axis=1, keepdims=True)
    strengths = (pulls / weights.sum(axis=1))[:, None]
    first, second = np.zeros_like(fitted), np.zeros_like(fitted)
    for step in range(1, steps + 1):
        gradient = _gradients(features, labels, fitted, shares) + strengths * (fitted - head)
        first += (1.0 - FIRST_MOMENT) * (gradient - first)
        second += (1.0 - SECOND_MOMENT) * (gradient**2 - second)
        spread = np.sqrt(second / (1.0 - SECOND_MOMENT**step)) + SMALLEST
        fitted -= rate / (1.0 - FIRST_MOMENT**step) * first / spread
    return fitted


def _classes(features: int, head: Vector) -> int:
    return int(head.size // (features + 1))


def _split(head: Vector, features: int) -> tuple[Matrix, Vector]:
    classes = _classes(features, head)
    return head[:-classes].reshape(classes, features), head[-classes:]


def _softmax(scores: Matrix) -> Matrix:
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    chances: Matrix = shifted / shifted.sum(axis=-1, keepdims=True)
    return chances


def _gradients(features: Matrix, labels: Labels, heads: Matrix, shares: Matrix) -> Matrix:
    """(m, h): of the cross-entropy of samples that count by shares (m, n), plus DECAY |head|^2, at heads (m, h)."""
    many, classes = len(heads), _classes(features.shape[1], heads[0])
    weight = heads[:, :-classes].reshape(many * classes, -1)
    scores = (features @ weight.T).reshape(len(labels), many, classes) + heads[:, -classes:]
    errors = _softmax(scores)
    errors[np.arange(len(labels)), :, labels] -= 1.0
    errors *= shares.T[:, :, None]
    slopes = errors.reshape(len(labels), -1).T @ features
    gradients: Matrix = np.concatenate([slopes.reshape(many, -1), errors.sum(axis=0)], axis=1)
    gradients += 2.0 * DECAY * heads
    return gradients

"""Fit a head to cached equilibrium features: softmax regression in numpy, for every backend.

The features of a fixed theta cost one solve per sample; each step after that is two small matrix products.
A head is flat, (h,) float32: weight (classes, features) in C order, then bias (classes,).
"""

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.training.step import Vector

Matrix = NDArray[np.float32]

# Adam's usual memories (Kingma and Ba, ICLR 2015).
FIRST_MOMENT, SECOND_MOMENT, SMALLEST = 0.9, 0.999, 1e-8
# Separable classes have no finite optimum: a little decay keeps a long refit from growing the head without end.
DECAY = 1e-4


def logits(features: Matrix, head: Vector) -> Matrix:
    """(n, classes) of features (n, f)."""
    weight, bias = _split(head, features.shape[1])
    scores: Matrix = features @ weight.T + bias
    return scores


def cross_entropy(features: Matrix, labels: NDArray[np.int64], head: Vector) -> float:
    """Mean negative log-likelihood of labels (n,), in nats."""
    likely = chances(features, head)
    return float(-np.log(np.maximum(likely[np.arange(len(labels)), labels], np.finfo(np.float32).tiny)).mean())


def chances(features: Matrix, head: Vector) -> Matrix:
    """(n, classes) softmax of the logits of features (n, f)."""
    return _softmax(logits(features, head))


def accuracy(features: Matrix, labels: NDArray[np.int64], head: Vector) -> float:
    """Share of labels (n,) that are hit, NaN for n = 0."""
    return float((logits(features, head).argmax(axis=1) == labels).mean()) if len(labels) else float("nan")


def fit_head(
    features: Matrix, labels: NDArray[np.int64], head: Vector, *, steps: int, rate: float, pull: float = 0.0
) -> Vector:
    """A head fitted to features (n, f) and labels (n,) by `steps` full-batch Adam steps of size `rate` from `head`.

    pull: tau >= 0 of a term tau / (2 n) |fitted - head|^2, that is of a normal prior of variance 1 / tau around `head`:
    few samples leave it where it was, many have their way.
    Classes that the device never saw lose their bias, which is how its label prior enters. `head` is not changed.
    """
    fitted = head.copy()
    first, second = np.zeros_like(fitted), np.zeros_like(fitted)
    for step in range(1, steps + 1):
        gradient = _gradient(features, labels, fitted) + np.float32(pull / len(labels)) * (fitted - head)
        first += (1.0 - FIRST_MOMENT) * (gradient - first)
        second += (1.0 - SECOND_MOMENT) * (gradient**2 - second)
        spread = np.sqrt(second / (1.0 - SECOND_MOMENT**step)) + SMALLEST
        fitted -= rate / (1.0 - FIRST_MOMENT**step) * first / spread
    return fitted


def _split(head: Vector, features: int) -> tuple[Matrix, Vector]:
    classes = head.size // (features + 1)
    return head[:-classes].reshape(classes, features), head[-classes:]


def _softmax(scores: Matrix) -> Matrix:
    shifted = np.exp(scores - scores.max(axis=1, keepdims=True))
    chances: Matrix = shifted / shifted.sum(axis=1, keepdims=True)
    return chances


def _gradient(features: Matrix, labels: NDArray[np.int64], head: Vector) -> Vector:
    """Of the mean cross-entropy plus DECAY |head|^2, (h,)."""
    errors = _softmax(logits(features, head))
    errors[np.arange(len(labels)), labels] -= 1.0
    errors /= len(labels)
    weight = (errors.T @ features).reshape(-1)
    gradient: Vector = np.concatenate([weight, errors.sum(axis=0)])
    gradient += 2.0 * DECAY * head
    return gradient

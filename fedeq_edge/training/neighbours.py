"""kNN-Per: the shared model's answers mixed with those of the nearest training samples, in its own feature space.

    chances = share * neighbours + (1 - share) * model
    neighbours_c ~ sum over the k nearest of [y = c] exp(-d / scale)

Source: Marfoq, Neglia, Kameni, Vidal, "Personalized federated learning through local memorization", ICML 2022,
arXiv 2111.09360, equations 6 and 8. numpy only, no training.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.training.backend import Labels, Matrix
from fedeq_edge.training.holdout import drawn_by_class

SHARES = tuple(step / 10 for step in range(11))
"""The grid of the paper's experiments."""
# Of the training samples, as a fold: small enough that the neighbours of the rest are those of all.
_HELD_OUT = 0.2
_SEED = 0  # any: devices differ by their data


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """A device's training samples. features: (n, f), n >= 1; labels: (n,). nearest: k >= 1, or n where that is less."""

    features: Matrix
    labels: Labels
    classes: int
    nearest: int
    scale: float

    def chances(self, queries: Matrix) -> Matrix:
        """(m, classes) of queries (m, f), rows that add up to 1."""
        distances = self._distances(queries)
        k = min(self.nearest, self.labels.size)
        rows = np.argpartition(distances, k - 1, axis=1)[:, :k]
        near = np.take_along_axis(distances, rows, axis=1)
        # relative to the nearest, or far queries would underflow to 0 / 0
        weights = np.exp((near.min(axis=1, keepdims=True) - near) / self.scale)
        votes = np.zeros((len(queries), self.classes), dtype=np.float32)
        np.add.at(votes, (np.arange(len(queries))[:, None], self.labels[rows]), weights)
        chances: Matrix = votes / votes.sum(axis=1, keepdims=True)
        return chances

    def _distances(self, queries: Matrix) -> NDArray[np.float64]:
        """(m, n) Euclidean, in double: the difference of large squares is what is small here."""
        ours, theirs = self.features.astype(np.float64), queries.astype(np.float64)
        squares = (theirs**2).sum(axis=1)[:, None] - 2.0 * theirs @ ours.T + (ours**2).sum(axis=1)
        distances: NDArray[np.float64] = np.sqrt(np.maximum(squares, 0.0))
        return distances

    def best_share(self, model: Matrix) -> float:
        """The share in SHARES that answers best for held-out training samples, the least of equals.

        model: (n, classes), the model's chances for the training samples. The model was trained on all of them, which
        favours it: a small share means little.
        """
        held = drawn_by_class(self.labels, _HELD_OUT, np.random.default_rng(_SEED))
        if not held.any():
            return 0.0
        rest = Neighbours(
            features=self.features[~held],
            labels=self.labels[~held],
            classes=self.classes,
            nearest=self.nearest,
            scale=self.scale,
        )
        votes = rest.chances(self.features[held])
        right = [hits(mixed(share, votes, model[held]), self.labels[held]) for share in SHARES]
        return SHARES[int(np.argmax(right))]


def mixed(share: float, votes: Matrix, model: Matrix) -> Matrix:
    """(m, classes) chances: `share` of the neighbours', the rest of the model's."""
    return (share * votes + (1.0 - share) * model).astype(np.float32)


def hits(chances: Matrix, labels: Labels) -> float:
    """Share of labels (m,), m >= 1, that are the likeliest."""
    return float((chances.argmax(axis=1) == labels).mean())

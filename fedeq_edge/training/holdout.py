"""What is chosen (settings, K, a mixture) is chosen on training data held out from training, never on the test part."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.data.npz import ClientData
from fedeq_edge.errors import ConfigError


def held_out(data: ClientData, share: float, *, seed: int, ordered: bool = False) -> ClientData:
    """`data` with the test part replaced by `share` of its training part, by class, and training on the rest.

    Where the data come with validation rows, it is those instead of a share. The test part is not in the result, so
    nobody can choose on it. At least one sample stays to train on; a client with a single one has none to choose by.
    The same seed gives the same split.
    ordered: rows are as they were recorded. Neighbours are alike then, or overlap, and a split by lot asks for what
    training has seen (HAR: 0.99 where the test part says 0.95), so the last rows of each label are held out.
    Raises ConfigError for a share outside (0, 1).
    """
    if not 0.0 < share < 1.0:
        raise ConfigError(f"validation is {share}; give a share of the training data between 0 and 1")
    x, y = data.x_train, data.y_train
    if data.validation is not None:
        chosen, kept = data.validation, ~data.validation
    elif ordered:
        chosen, kept = last_by_class(y, share)
    else:
        chosen = drawn_by_class(y, share, np.random.default_rng(seed))
        kept = ~chosen
    return replace(data, x_train=x[kept], y_train=y[kept], x_test=x[chosen], y_test=y[chosen], validation=None)


def last_by_class(labels: NDArray[np.int64], share: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(n,) bool each: the last `share` of each label's rows, rounded, and the others.

    A row right before a chosen one is in neither: windows of a recording overlap. Of a label with too few rows to
    choose one, all are kept; the very first row always is.
    """
    chosen = np.zeros(labels.size, dtype=np.bool_)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        chosen[rows[rows.size - round(share * rows.size) :]] = True
    chosen[:1] = False
    kept = ~chosen
    kept[:-1] &= ~chosen[1:]
    kept[:1] = True
    return chosen, kept


def drawn_by_class(labels: NDArray[np.int64], share: float, generator: np.random.Generator) -> NDArray[np.bool_]:
    """(n,) bool: `share` of the rows, of each label that many up to one; not all of them.

    Systematic sampling over the rows in order of label, ties by lot: classes too small for a sample of their own
    take turns, where rounding per class would leave all of them out.
    """
    order = np.lexsort((generator.random(labels.size), labels))
    marks = np.floor(share * np.arange(labels.size + 1) + generator.random())
    chosen = np.zeros(labels.size, dtype=np.bool_)
    chosen[order[np.diff(marks) > 0.0]] = True
    if chosen.all():
        chosen[order[:1]] = False
    return chosen

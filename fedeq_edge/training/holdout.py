"""What is chosen (settings, K, a mixture) is chosen on training data held out from training, never on the test part."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.data.npz import ClientData
from fedeq_edge.errors import ConfigError


def held_out(data: ClientData, share: float, *, seed: int) -> ClientData:
    """`data` with the test part replaced by `share` of its training part, by class, and training on the rest.

    The test part is not in the result, so nobody can choose on it. At least one sample stays to train on; a client
    with a single one has none to choose by. The same seed gives the same split. Where the data has an order (a
    recording), neighbours in it are alike: cut the last segments instead.
    Raises ConfigError for a share outside (0, 1).
    """
    if not 0.0 < share < 1.0:
        raise ConfigError(f"validation is {share}; give a share of the training data between 0 and 1")
    chosen = drawn_by_class(data.y_train, share, np.random.default_rng(seed))
    x, y = data.x_train, data.y_train
    return replace(data, x_train=x[~chosen], y_train=y[~chosen], x_test=x[chosen], y_test=y[chosen])


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

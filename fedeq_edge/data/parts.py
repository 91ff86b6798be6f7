"""Which samples of a person are for training, for validation (to choose settings by) and for the final test.

Shares 7 : 1 : 2, each label alike as well as its count allows. Neighbouring windows of a recording share measurements,
so theirs are parted in time, with a window left out where two parts meet: otherwise a test would ask for what training
has seen. Authors' own test parts are kept, wherever they fit the clients.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.data.archives.samples import Rows, Samples, neighbours

TRAIN: Final = 0
VALIDATION: Final = 1
TEST: Final = 2
NEITHER: Final = -1
NAMES: Final = ("train", "validation", "test")
# What ten samples of one label become, spread so that five of them already have one of each.
_CYCLE: Final = np.array([TRAIN, TRAIN, TEST, TRAIN, VALIDATION, TRAIN, TRAIN, TEST, TRAIN, TRAIN], dtype=np.int8)
_SHARES: Final = {VALIDATION: 0.1, TEST: 0.2}
_FEWEST: Final = {VALIDATION: 5, TEST: 3}  # samples of a label, from which on it is in that part for sure

Parts = NDArray[np.int8]


def keeps_official(samples: Samples, *, natural: bool) -> bool:
    """Whether the authors' test part is the test part of the clients.

    It is, unless clients are the people of the set and the authors' test people are others: then those are clients
    too, and the column official_test tells them from the rest.
    """
    if samples.official_test is None:
        return False
    if not natural or samples.client is None:
        return True
    tested, trained = (np.unique(samples.client[rows]) for rows in (samples.official_test, ~samples.official_test))
    return np.intersect1d(tested, trained).size > trained.size // 2


def parted(samples: Samples, *, official: bool, rng: np.random.Generator) -> Parts:
    """(N,) TRAIN, VALIDATION, TEST or NEITHER. official: the authors' test part is TEST, and nothing else is."""
    parts = np.full(samples.y.size, NEITHER, np.int8)
    for rows in rows_by_owner(samples.client, samples.y.size):
        mine = rows
        if official and samples.official_test is not None:
            tested = samples.official_test[rows]
            parts[rows[tested]], mine = TEST, rows[~tested]
        parts[mine] = _of_person(samples.y[mine], neighbours(samples.follows, mine), tested=not official, rng=rng)
    return parts


def rows_by_owner(owner: NDArray[np.generic] | None, count: int) -> list[Rows]:
    """Ascending rows of each owner, in the owners' order; all in one where nobody owns them."""
    if owner is None:
        return [np.arange(count)]
    ranks = np.unique(owner, return_inverse=True)[1]
    order = np.argsort(ranks, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(ranks[order])) + 1)


def _of_person(
    y: NDArray[np.int64], follows: NDArray[np.bool_] | None, *, tested: bool, rng: np.random.Generator
) -> Parts:
    if follows is None:
        return _dealt(y, tested=tested, rng=rng)
    parts = np.full(y.size, TRAIN, np.int8)
    for label in np.unique(y):
        rows = np.flatnonzero(y == label)
        tests, checks = (_size(rows.size, part, rng) for part in (TEST, VALIDATION))
        tests *= tested
        parts[rows[rows.size - tests - checks :]] = VALIDATION
        parts[rows[rows.size - tests :]] = TEST
    return _with_gaps(parts, follows)


def _size(count: int, part: int, rng: np.random.Generator) -> int:
    """Samples of a label in a part; where too few for all parts, by lot, so that over all people the share holds."""
    share = _SHARES[part] * count
    return max(round(share), 1) if count >= _FEWEST[part] else int(share + rng.random())


def _dealt(y: NDArray[np.int64], *, tested: bool, rng: np.random.Generator) -> Parts:
    """Parts by lot: labels in random order, the samples of each shuffled, dealt out by the cycle."""
    parts = np.empty(y.size, np.int8)
    if y.size:
        order = np.lexsort((rng.random(y.size), rng.permutation(y.max() + 1)[y]))
        cycle = _CYCLE if tested else np.where(_CYCLE == TEST, TRAIN, _CYCLE)
        parts[order] = np.resize(cycle, y.size)
    return parts


def _with_gaps(parts: Parts, follows: NDArray[np.bool_]) -> Parts:
    """Where a window and the next share measurements and are in two parts, the one of lesser use is in NEITHER."""
    kept = parts.copy()
    meet = follows[1:] & (parts[1:] != parts[:-1])
    first_is_less = parts[:-1] < parts[1:]
    kept[:-1][meet & first_is_less] = NEITHER
    kept[1:][meet & ~first_is_less] = NEITHER
    return kept

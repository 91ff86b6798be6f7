"""Which rows and clients of a file are taken."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.errors import DataError

LARGEST_CLASS: Final = 9999
"""A labels array or class list beyond this is some other column (an id, a time) taken for labels."""


def parse_classes(classes: str | Sequence[int]) -> list[int]:
    """Ascending labels of "0-5", "0,1,4", a mixture, or a sequence. Raises DataError for anything else."""
    if not isinstance(classes, str):
        return sorted(set(classes))
    chosen: set[int] = set()
    for part in classes.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise DataError(f'classes {classes!r} cannot be read at {part!r}; write "0-5" or "0,1,4"')
        low, high = int(first), int(last or first)
        if not low <= high <= LARGEST_CLASS:
            raise DataError(f"classes {classes!r}: {part.strip()!r} is no range within 0-{LARGEST_CLASS}")
        chosen.update(range(low, high + 1))
    return sorted(chosen)


def rows_of_classes(path: Path, labels: NDArray[np.int64], classes: list[int]) -> NDArray[np.bool_]:
    """(N,) whether a label is one of `classes`. Raises DataError, which names the file, where one does not occur."""
    known = np.unique(labels)
    missing = sorted(set(classes) - set(known.tolist()))
    if missing:
        raise DataError(f"{path}: no sample has class {missing[0]}; the labels are {', '.join(map(str, known[:20]))}")
    return np.isin(labels, classes)


def wholly_marked(ids: NDArray[np.generic], marked: NDArray[np.bool_]) -> NDArray[np.generic]:
    """The ids, ascending, all of whose rows are marked."""
    return np.setdiff1d(ids[marked], ids[~marked])


def some_clients(path: Path, names: NDArray[np.generic], clients: int | None, seed: int | None) -> NDArray[np.generic]:
    """So many of these ids, ascending: the first, or with a seed drawn by lot; all of them for None."""
    if names.size == 0:
        raise DataError(f"{path}: no row is left to any client; relax `where` and `classes`")
    if clients is not None and not 1 <= clients <= names.size:
        raise DataError(f"{path}: {clients} clients asked for, it has {names.size}; give 1 to {names.size}")
    if clients is None or seed is None:
        return names[:clients]
    drawn = np.random.default_rng(seed).permutation(names.size)[:clients]
    return names[np.sort(drawn)]

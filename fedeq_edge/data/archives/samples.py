"""What a reader of an archive gives: samples with labels, and whose they are."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.data.archives.source import Source

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """N samples. x: (N, ...) uint8 images, float32 signals, int16 codes. y: (N,) int64 places in `classes`.

    client: (N,) the person, writer or role, None where the set has none. official_test: (N,) the authors' test part.
    follows: (N,) whether a window shares measurements with the row before it; None where no two samples do.
    letters: more than 0 where x holds codes below it. notes: what was left out, for people.
    """

    x: NDArray[np.generic]
    y: NDArray[np.int64]
    classes: tuple[str, ...]
    client: NDArray[np.generic] | None = None
    official_test: NDArray[np.bool_] | None = None
    follows: NDArray[np.bool_] | None = None
    letters: int = 0
    notes: tuple[str, ...] = ()

    def take(self, rows: Rows) -> "Samples":
        """These rows alone, in ascending order."""
        return replace(
            self,
            x=self.x[rows],
            y=self.y[rows],
            client=None if self.client is None else self.client[rows],
            official_test=None if self.official_test is None else self.official_test[rows],
            follows=neighbours(self.follows, rows),
        )


def neighbours(follows: NDArray[np.bool_] | None, rows: Rows) -> NDArray[np.bool_] | None:
    """`follows` among these ascending rows alone, where the row before may be missing."""
    if follows is None:
        return None
    adjacent = np.diff(rows, prepend=-2) == 1
    among: NDArray[np.bool_] = follows[rows] & adjacent
    return among


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """How one kind of archive is known and read. holds: what must be in it, for people.

    variants: the choices within it, first the one taken if nobody chooses; empty where there is none.
    """

    kind: str
    holds: str
    fits: Callable[[Source], bool]
    read: Callable[[Source, str], Samples]
    variants: tuple[str, ...] = ()

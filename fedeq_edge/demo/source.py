"""What a fleet in one place tells of itself: names for its devices, and the statistics of its samples."""

from collections.abc import Mapping, Sequence

import numpy as np

from fedeq_edge.data.npz import ClientData
from fedeq_edge.errors import ConfigError
from fedeq_edge.wire.topics import check_identifier


def device_ids(names: Sequence[str]) -> list[str]:
    """The clients' names where all of them can be ids, and are unlike as such; else numbers in their order."""
    width = len(str(len(names)))
    ids = [f"client-{int(name):0{width}d}" if name.isdigit() else name.lower() for name in names]
    try:
        for device in ids:
            check_identifier(device, "client")
    except ConfigError:
        ids = []
    return ids if len(set(ids)) == len(names) else [f"client-{n:0{width}d}" for n in range(1, len(names) + 1)]


def statistics(fleet: Mapping[str, ClientData]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the training samples per channel (one value for all features of dense data).

    A real fleet takes them from what is known of its sensors; a demo has all the data in one place.
    """
    x = np.concatenate([data.x_train for data in fleet.values()])
    axes = (0, *range(2, x.ndim)) if x.ndim > 2 else None
    scale = np.maximum(x.std(axis=axes), 1e-3)  # a constant channel stays finite
    return tuple(map(float, np.atleast_1d(x.mean(axis=axes)))), tuple(map(float, np.atleast_1d(scale)))

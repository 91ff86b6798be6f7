"""Splitting one data set over clients that differ, the way federated learning is compared.

Every function returns index arrays into `y`, one per client, disjoint and in ascending order. The same seed gives
the same split.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.errors import DataError

Indices = NDArray[np.int64]


def label_sets(clients: int, labels_per_client: int, classes: int, *, seed: int) -> list[tuple[int, ...]]:
    """Which of the `classes` labels each client has: every label is on the same number of clients, or one more.

    Each client takes the labels that fewest before it have, ties by lot, so that sets overlap in many ways.
    """
    if clients < 1 or not 1 <= labels_per_client <= classes:
        raise DataError(
            f"{clients} clients with {labels_per_client} labels each; "
            f"give at least 1 client and from 1 to {classes} labels, as there are {classes} classes"
        )
    rng = np.random.default_rng(seed)
    holders = np.zeros(classes, dtype=np.int64)
    sets = []
    for _ in range(clients):
        chosen = np.lexsort((rng.random(classes), holders))[:labels_per_client]
        holders[chosen] += 1
        sets.append(tuple(sorted(chosen.tolist())))
    return sets


def by_labels(
    y: NDArray[np.integer], sets: Sequence[tuple[int, ...]], *, per_client: int | None, seed: int
) -> list[Indices]:
    """Client i holds samples of the labels sets[i] alone, `per_client` in all, the same of each label up to one.

    per_client None: every sample of a label that any client has, in equal parts among the clients that have it.
    Raises DataError when a label has fewer samples than its clients ask for.
    """
    rng = np.random.default_rng(seed)
    holders = {label: [i for i, labels in enumerate(sets) if label in labels] for label in sorted(set().union(*sets))}
    taken: list[list[Indices]] = [[] for _ in sets]
    for label, clients in holders.items():
        shuffled = rng.permutation(np.flatnonzero(y == label))
        if per_client is None:
            wanted = _equal_parts(shuffled.size, len(clients))
        else:
            wanted = [_quota(label, sets[client], per_client) for client in clients]
        if sum(wanted) > shuffled.size:
            raise DataError(
                f"label {label} has {shuffled.size} samples, but its {len(clients)} clients ask for {sum(wanted)}; "
                "ask for fewer samples per client or for more labels per client"
            )
        for client, part in zip(clients, np.split(shuffled, np.cumsum(wanted)), strict=False):
            taken[client].append(part)
    return [np.sort(np.concatenate(parts)) for parts in taken]


def dirichlet(y: NDArray[np.integer], clients: int, *, alpha: float, smallest: int = 1, seed: int) -> list[Indices]:
    """Each label is shared out by proportions drawn from Dirichlet(alpha): small alpha, unlike clients.

    Drawn again until every client has `smallest` samples; DataError when a hundred draws do not give that.
    Source: Hsu, Qi, Brown 2019, arXiv 1909.06335.
    """
    if clients < 1 or not alpha > 0:
        raise DataError(f"Dirichlet partition over {clients} clients with alpha {alpha}; give >= 1 and > 0")
    rng = np.random.default_rng(seed)
    for _ in range(100):  # a draw costs milliseconds; what a hundred do not reach is the wrong alpha
        parts = _draw(y, clients, alpha, rng)
        if min(part.size for part in parts) >= smallest:
            return parts
    raise DataError(
        f"no Dirichlet({alpha}) split of {y.size} samples gave each of {clients} clients {smallest} samples; "
        "raise alpha or take fewer clients"
    )


def iid(y: NDArray[np.integer], clients: int, *, seed: int) -> list[Indices]:
    """Each client holds as many samples as any other, or one more, whatever their labels."""
    if clients < 1:
        raise DataError(f"{clients} clients; give at least 1")
    shuffled = np.random.default_rng(seed).permutation(y.size)
    return [np.sort(part) for part in np.array_split(shuffled, clients)]


def alike(y: NDArray[np.integer], held: NDArray[np.integer], *, seed: int) -> list[Indices]:
    """Each client gets of every label what it already holds of it, in proportion: test samples for its training ones.

    held: (clients, classes) samples. A label that nobody holds goes to nobody.
    """
    rng = np.random.default_rng(seed)
    owner = np.full(y.size, -1, dtype=np.int64)
    for label in np.flatnonzero(held.sum(axis=0)):
        rows = rng.permutation(np.flatnonzero(y == label))
        clients = rng.permutation(len(held))  # or rounding would favour the same ones for each label
        shares = np.cumsum(held[clients, label])
        edges = np.rint(shares / shares[-1] * rows.size).astype(np.int64)
        owner[rows] = np.repeat(clients, np.diff(edges, prepend=0))
    return [np.flatnonzero(owner == client) for client in range(len(held))]


def _draw(y: NDArray[np.integer], clients: int, alpha: float, rng: np.random.Generator) -> list[Indices]:
    owner = np.empty(y.size, dtype=np.int64)
    for label in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == label))
        shares = np.cumsum(rng.dirichlet(np.full(clients, alpha)))
        middles = (np.arange(members.size) + 0.5) / members.size
        # the shares may add up to a rounding below 1
        owner[members] = np.minimum(np.searchsorted(shares, middles), clients - 1)
    return [np.flatnonzero(owner == client) for client in range(clients)]


def _equal_parts(total: int, parts: int) -> list[int]:
    """Sizes of `parts` parts of `total` that differ by at most one."""
    return [total // parts + (rank < total % parts) for rank in range(parts)]


def _quota(label: int, labels: tuple[int, ...], per_client: int) -> int:
    """Samples of `label` for a client with these labels, so that they add up to `per_client`."""
    return _equal_parts(per_client, len(labels))[labels.index(label)]

"""Public data sets as fleets: one .npz out of an archive and a partition.

The file holds x, y, client, split ("train", "validation", "test"), classes (names by label), provenance (JSON: source,
its digests, options, version) and, where the authors' test people are clients too, official_test. The same source,
options and version give the same bytes.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedeq_edge import __version__
from fedeq_edge.data.archives import Samples, Source, read
from fedeq_edge.data.archives.official import official_names
from fedeq_edge.data.choice import parse_classes, rows_of_classes
from fedeq_edge.data.npz import LARGEST_ARRAY_BYTES, save_columns
from fedeq_edge.data.options import Options
from fedeq_edge.data.partition import Indices, alike, by_labels, dirichlet, iid, label_sets
from fedeq_edge.data.parts import NAMES, TEST, TRAIN, VALIDATION, Parts, keeps_official, parted
from fedeq_edge.errors import ConfigError, DataError

_NOBODY: Final = -1


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """What was written. shape: of one sample. train, validation, test: samples.

    fewest, most: training samples of a client. left_out: people with too few samples. sha256: hex, by file.
    official: published names of those with a known checksum. notes: what the reader left out.
    """

    kind: str
    variant: str
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    clients: int
    train: int
    validation: int
    test: int
    fewest: int
    most: int
    left_out: int
    sha256: dict[str, str]
    official: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fleet:
    """names: (C,) of the clients. owner: (N,) place in `names`, or _NOBODY. parts: (N,) as of parts.py."""

    names: NDArray[np.generic]
    owner: NDArray[np.int64]
    parts: Parts
    left_out: int = 0

    def counts(self) -> NDArray[np.int64]:
        """(C, 3) samples of each client in each part."""
        held = (self.owner != _NOBODY) & (self.parts >= 0)
        places = self.owner[held] * len(NAMES) + self.parts[held]
        return np.bincount(places, minlength=self.names.size * len(NAMES)).reshape(-1, len(NAMES))


def prepare(path: Path, out: Path, options: Options) -> Prepared:
    """`out` is a fleet's .npz of the archive or folder at `path`, or what it was before.

    Raises DataError where the archive cannot be read or the partition cannot be made of it, ConfigError where the
    options do not fit the kind, StateError where `out` cannot be written; each with the remedy.
    """
    if out.exists() and path.exists() and out.samefile(path):
        raise ConfigError(f"--out {out} is the archive itself; choose another name")
    with Source(path) as source:
        reader, variant, samples = read(source, options.kind, options.variant)
    natural = options.partition == "natural"
    if natural and samples.client is None:
        raise ConfigError(
            f"{reader.kind} does not say whose a sample is; give --partition shards, dirichlet or iid, and --clients"
        )
    samples = _of_classes(path, samples, options.classes)
    official = keeps_official(samples, natural=natural)
    parts = parted(samples, official=official, rng=np.random.default_rng((options.seed, 1)))
    fleet = _of_people(path, samples, parts, options) if natural else _made(path, samples, parts, options)
    columns = _columns(path, samples, fleet, unseen=natural and not official)
    columns["provenance"] = np.array(_provenance(source, reader.kind, variant, options))
    save_columns(out, columns)
    return _told(reader.kind, variant, samples, fleet, source, columns["x"].shape[1:])


def _told(kind: str, variant: str, samples: Samples, fleet: _Fleet, source: Source, shape: tuple[int, ...]) -> Prepared:
    counts = fleet.counts()
    return Prepared(
        kind=kind,
        variant=variant,
        shape=shape,
        classes=samples.classes,
        clients=fleet.names.size,
        **dict(zip(NAMES, counts.sum(axis=0).tolist(), strict=True)),
        fewest=int(counts[:, TRAIN].min()),
        most=int(counts[:, TRAIN].max()),
        left_out=fleet.left_out,
        sha256={name: digest.sha256 for name, digest in source.digests.items()},
        official=official_names(source.digests),
        notes=samples.notes,
    )


def _of_classes(path: Path, samples: Samples, classes: str | None) -> Samples:
    """The samples of these labels, numbered from 0 in their order."""
    if classes is None:
        return samples
    labels = parse_classes(classes)
    kept = samples.take(np.flatnonzero(rows_of_classes(path, samples.y, labels)))
    return replace(kept, y=np.searchsorted(labels, kept.y), classes=tuple(samples.classes[label] for label in labels))


def _of_people(path: Path, samples: Samples, parts: Parts, options: Options) -> _Fleet:
    """Clients are the people of the set that have enough samples, or so many of them drawn by lot."""
    assert samples.client is not None  # `prepare` saw to it
    names, owner = np.unique(samples.client, return_inverse=True)
    counts = _Fleet(names=names, owner=owner, parts=parts).counts()
    fit = np.flatnonzero((counts.sum(axis=1) >= options.smallest) & (counts[:, TRAIN] > 0) & (counts[:, TEST] > 0))
    wanted = fit.size if options.clients is None else options.clients
    if not 1 <= wanted <= fit.size:
        raise DataError(
            f"{path}: {wanted} clients asked for, {fit.size} of {names.size} have {options.smallest} samples and some "
            "for the test; take fewer --clients or lower --smallest"
        )
    chosen = np.sort(np.random.default_rng((options.seed, 2)).permutation(fit)[:wanted])
    places = np.full(names.size, _NOBODY)
    places[chosen] = np.arange(wanted)
    return _Fleet(names=names[chosen], owner=places[owner], parts=parts, left_out=names.size - fit.size)


def _made(path: Path, samples: Samples, parts: Parts, options: Options) -> _Fleet:
    """Clients are made: training samples by the partition, the others in proportion to them."""
    assert options.clients is not None  # Options saw to it
    owner, classes = np.full(samples.y.size, _NOBODY), len(samples.classes)
    train = np.flatnonzero(parts == TRAIN)
    shares = [train[rows] for rows in _shared_out(path, samples.y[train], options.clients, classes, options)]
    held = np.stack([np.bincount(samples.y[rows], minlength=classes) for rows in shares])
    for client, rows in enumerate(shares):
        owner[rows] = client
    for part in (VALIDATION, TEST):
        rows = np.flatnonzero(parts == part)
        for client, mine in enumerate(alike(samples.y[rows], held, seed=options.seed + part)):
            owner[rows[mine]] = client
    fleet = _Fleet(names=np.arange(options.clients), owner=owner, parts=parts)
    _check_sizes(path, fleet.counts(), options)
    return fleet


def _shared_out(path: Path, y: NDArray[np.int64], clients: int, classes: int, options: Options) -> list[Indices]:
    if options.labels is not None:
        return _shards(path, y, label_sets(clients, options.labels, classes, seed=options.seed), classes, options.seed)
    if options.alpha is not None:
        return dirichlet(y, clients, alpha=options.alpha, smallest=options.smallest, seed=options.seed)
    return iid(y, clients, seed=options.seed)


def _shards(path: Path, y: NDArray[np.int64], sets: list[tuple[int, ...]], classes: int, seed: int) -> list[Indices]:
    """So many labels a client, each shared out equally among its clients: as in FedRep, Collins et al., ICML 2021."""
    holders = np.bincount(np.concatenate(sets), minlength=classes)
    there = np.bincount(y, minlength=classes)
    if not holders.all():
        raise DataError(
            f"{path}: {len(sets)} clients with {len(sets[0])} labels each leave some of {classes} classes to nobody; "
            "take more --clients or more --labels"
        )
    scarce = np.flatnonzero(there < holders)
    if scarce.size:
        raise DataError(
            f"{path}: label {scarce[0]} has {there[scarce[0]]} training samples for {holders[scarce[0]]} clients; "
            "take fewer --clients or fewer --labels"
        )
    return by_labels(y, sets, per_client=None, seed=seed)


def _check_sizes(path: Path, counts: NDArray[np.int64], options: Options) -> None:
    for part, least in ((TRAIN, options.smallest), (TEST, 1)):
        client = int(counts[:, part].argmin())
        if counts[client, part] < least:
            raise DataError(
                f"{path}: client {client} gets {counts[client, part]} {NAMES[part]} samples, fewer than {least}; "
                "take fewer --clients, or lower --smallest"
            )


def _columns(path: Path, samples: Samples, fleet: _Fleet, *, unseen: bool) -> dict[str, NDArray[np.generic]]:
    """The arrays of the file, client by client, each in the order of the source."""
    rows = np.flatnonzero((fleet.owner != _NOBODY) & (fleet.parts >= 0))
    rows = rows[np.argsort(fleet.owner[rows], kind="stable")]
    columns = {
        "x": _one_hot(path, samples.x[rows], samples.letters) if samples.letters else samples.x[rows],
        "y": samples.y[rows].astype(np.min_scalar_type(len(samples.classes))),
        "client": fleet.names[fleet.owner[rows]],
        "split": np.array(NAMES)[fleet.parts[rows]],
        "classes": np.array(samples.classes),
    }
    if unseen and samples.official_test is not None:
        columns["official_test"] = samples.official_test[rows]
    return columns


def _one_hot(path: Path, codes: NDArray[np.generic], letters: int) -> NDArray[np.uint8]:
    """(N, letters, length) of (N, length) codes, 255 where a place has that letter: it is read as 1."""
    size = math.prod(codes.shape) * letters
    if size > LARGEST_ARRAY_BYTES:
        raise DataError(
            f"{path}: {len(codes)} texts letter by letter take {size} bytes, the limit is {LARGEST_ARRAY_BYTES}; "
            "take fewer --clients, or --variant codes"
        )
    hot = np.zeros((codes.shape[0], letters, codes.shape[1]), np.uint8)
    np.put_along_axis(hot, codes[:, None].astype(np.int64), 255, axis=1)
    return hot


def _provenance(source: Source, kind: str, variant: str, options: Options) -> str:
    told: Mapping[str, object] = {
        "source": source.path.resolve().name,
        "kind": kind,
        "variant": variant,
        "digests": msgspec.to_builtins(dict(source.digests)),
        "options": msgspec.to_builtins(options),
        "version": __version__,
    }
    return json.dumps(told, sort_keys=True)

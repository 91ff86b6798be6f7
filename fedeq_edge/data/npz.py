"""The data that users bring: one .npz per device, or one for a whole fleet. Never pickles.

What comes out is the same for every source: x float32 with a channel axis, y int64 labels 0 to C-1 that mean the
same on all clients, and a training and a test part per client. Anything else is refused with a DataError that
names file, array, place and remedy.
"""

import difflib
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fedeq_edge.atomic import writing
from fedeq_edge.data.choice import LARGEST_CLASS, parse_classes, rows_of_classes, some_clients, wholly_marked
from fedeq_edge.errors import DataError

LARGEST_ARRAY_BYTES = 2 << 30
"""Per array, before reading: a few times the largest set of our studies; a zip of 1 MB can claim to hold 1 TB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientData:
    """One device's data. x_*: (n, ...) float32, images (n, channels, height, width). y_*: (n,) int64.

    validation: (n,) bool, the training rows that the file gives to choose settings by; None where it does not say.
    apart: whether a column of the file sets this client apart from the others.
    """

    x_train: NDArray[np.float32]
    y_train: NDArray[np.int64]
    x_test: NDArray[np.float32]
    y_test: NDArray[np.int64]
    validation: NDArray[np.bool_] | None = None
    apart: bool = False


def flattened(data: ClientData) -> ClientData:
    """The same client, its samples as vectors."""
    train, test = (x.reshape(len(x), math.prod(x.shape[1:])) for x in (data.x_train, data.x_test))
    return replace(data, x_train=train, x_test=test)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSummary:
    """Counts of one client. histogram: (classes,) training samples per label."""

    train: int
    test: int
    histogram: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSummary:
    """What a table about a fleet needs. shape: of one sample. classes: 1 + the largest label of anyone."""

    shape: tuple[int, ...]
    classes: int
    clients: Mapping[str, ClientSummary]


def load_client(path: Path, *, gaps: bool = False) -> ClientData:
    """The data of one device: arrays x (N, ...), y (N,), optional split (N,): True or "test" marks test rows.

    Without `split` every fifth row is a test row. Labels are taken as they are: they must mean the same on every
    device of a federation, which one file cannot show. gaps: samples may hold NaN or infinity, which no training takes.
    """
    with _opened(path) as archive:
        stored, y = archive.samples("x"), archive.labels("y")
        _same_length(path, {"x": stored, "y": y})
        test = archive.test_rows("split", y.size) if "split" in archive.names else _every_fifth(y.size)
    x = _as_samples(stored)
    if not gaps:
        _check_finite(path, "x", x, rows=np.arange(y.size))
    return _client(path, path.stem, x, y, test)


def save_client(path: Path, data: ClientData) -> None:
    """`path` holds the arrays x, y and split (bool), so that `load_client` gives these parts of `data` back."""
    split = np.repeat([False, True], [data.y_train.size, data.y_test.size])
    x, y = np.concatenate([data.x_train, data.x_test]), np.concatenate([data.y_train, data.y_test])
    with path.open("wb") as file:  # a name would get .npz appended
        np.savez_compressed(file, x=x, y=y, split=split)


def save_columns(path: Path, columns: Mapping[str, NDArray[np.generic]]) -> None:
    """`path` is an .npz of these arrays, the same bytes for the same arrays, or what it was before.

    Raises DataError for an array that could not be read back, StateError where the disk refuses.
    """
    for name, array in columns.items():
        if array.nbytes > LARGEST_ARRAY_BYTES:
            raise DataError(
                f"{path}: array {name!r} would have {array.nbytes} bytes, the limit is {LARGEST_ARRAY_BYTES}; "
                "take fewer --clients"
            )
    part = path.with_name(f".{path.name}.part")
    try:
        with writing(path):
            # Level 1: images hardly shrink further, and level 6 takes three times as long.
            with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
                for name, array in columns.items():
                    with file.open(f"{name}.npy", "w", force_zip64=True) as column:
                        npy.write_array(column, array, allow_pickle=False)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_text(path: Path, name: str) -> str | None:
    """The text of an array that is one, such as `provenance`; None where there is no such array."""
    with _opened(path) as archive:
        return archive.text(name) if name in archive.names else None


def column_names(path: Path) -> list[str]:
    """Names of the arrays in an .npz."""
    with _opened(path) as archive:
        return archive.names


def load_fleet(
    path: Path,
    *,
    x: str = "x",
    y: str = "y",
    client: str = "client",
    test: str | None = None,
    where: str | None = None,
    classes: str | Sequence[int] | None = None,
    clients: int | None = None,
    seed: int | None = None,
    apart: str | None = None,
) -> dict[str, ClientData]:
    """One client per value of the column `client`, in order of that value, named by it.

    x, y, client, test: names of arrays with one row per sample; test: True or "test" marks test rows (None: `split`
    if there is such a column, else every fifth row of a client). Rows that a text column marks "validation" are
    training rows, and told apart (`ClientData.validation`).
    where: a boolean column that chooses rows, "!name" the rows where it is false.
    classes: labels to keep, as [0, 1, 4] or "0-5" or "0,1,4". Labels become 0 to C-1 in ascending order, over the
    fleet as a whole. apart: as `where`, marks the rows of clients that are set apart; all of those are in the fleet.
    clients: so many of the others, the first ones, or with a seed drawn by lot.
    """
    with _opened(path) as archive:
        stored, labels, ids = archive.samples(x), archive.labels(y), archive.column(client)
        _same_length(path, {x: stored, y: labels, client: ids})
        keep = archive.chosen_rows(where, labels.size)
        besides = np.zeros_like(keep) if apart is None else archive.chosen_rows(apart, labels.size)
        column = test or ("split" if "split" in archive.names else None)
        marked = None if column is None else archive.test_rows(column, labels.size)
        checks = None if column is None else archive.validation_rows(column)
    if classes is not None:
        keep &= rows_of_classes(path, labels, parse_classes(classes))
    loners = wholly_marked(ids[keep], besides[keep])
    chosen = some_clients(path, np.setdiff1d(ids[keep], loners), clients, seed)
    keep &= np.isin(ids, np.concatenate([chosen, loners]))
    kept = np.flatnonzero(keep)
    values, ids = _as_samples(stored[kept]), ids[kept]
    _check_finite(path, x, values, rows=kept)
    ranks = np.unique(labels[kept], return_inverse=True)[1]
    fleet = {}
    for name, mine in _rows_by_value(ids):
        tests = _every_fifth(mine.size) if marked is None else marked[kept[mine]]
        client_data = _client(path, name, values[mine], ranks[mine].astype(np.int64), tests)
        held = None if checks is None else checks[kept[mine]][~tests]
        fleet[name] = replace(client_data, validation=held, apart=bool(np.isin(ids[mine[0]], loners)))
    return fleet


def describe(fleet: Mapping[str, ClientData]) -> FleetSummary:
    """Counts for a table, of a fleet that fits together.

    Raises DataError when there is no client, when the samples of two differ in shape, or when a label below the
    largest occurs on no client, as it does where devices number their classes differently.
    """
    shape = _common_shape(fleet)
    labels = np.unique(np.concatenate([part for data in fleet.values() for part in (data.y_train, data.y_test)]))
    classes = 1 + int(labels[-1])
    if labels.size < classes:
        absent = int(np.setdiff1d(np.arange(classes), labels)[0])
        raise DataError(
            f"labels reach {classes - 1}, but no client has label {absent}; number the classes from 0 alike"
        )
    summaries = {
        name: ClientSummary(
            train=data.y_train.size,
            test=data.y_test.size,
            histogram=tuple(np.bincount(data.y_train, minlength=classes).tolist()),
        )
        for name, data in fleet.items()
    }
    return FleetSummary(shape=shape, classes=classes, clients=summaries)


def _common_shape(fleet: Mapping[str, ClientData]) -> tuple[int, ...]:
    if not fleet:
        raise DataError("the fleet has no client; give at least one")
    first, shape = next((name, data.x_train.shape[1:]) for name, data in fleet.items())
    for name, data in fleet.items():
        if data.x_train.shape[1:] != shape:
            raise DataError(
                f"client {name}: samples of shape {data.x_train.shape[1:]}, but client {first} has {shape}; "
                "prepare all devices alike"
            )
    return shape


class _Archive:
    """An open .npz whose arrays are read one by one, each after its header was found harmless."""

    def __init__(self, path: Path, file: zipfile.ZipFile) -> None:
        self._path, self._file = path, file
        self.names = [name.removesuffix(".npy") for name in file.namelist() if name.endswith(".npy")]

    def samples(self, name: str) -> NDArray[np.generic]:
        """(N, ...) numbers as they are stored: converting waits until the rows are chosen."""
        array = self._read(name)
        if array.ndim < 2 or 0 in array.shape[1:] or array.dtype.kind not in "fiu":
            raise DataError(
                f"{self._path}: array {name!r} is {array.dtype} of shape {array.shape}; samples are numbers, (N, ...)"
            )
        return array

    def labels(self, name: str) -> NDArray[np.int64]:
        """(N,) int64 labels from 0 to LARGEST_CLASS."""
        array = self.column(name)
        if array.dtype.kind not in "iu" or (array.size and not (array.min() >= 0 and array.max() <= LARGEST_CLASS)):
            raise DataError(
                f"{self._path}: array {name!r} is no labels ({array.dtype}); give integers from 0 to {LARGEST_CLASS}"
            )
        return array.astype(np.int64)

    def column(self, name: str) -> NDArray[np.generic]:
        """(N,) of whatever type."""
        array = self._read(name)
        if array.ndim != 1:
            raise DataError(f"{self._path}: array {name!r} has shape {array.shape}; give one value per sample, (N,)")
        return array

    def text(self, name: str) -> str:
        """The text of an array that is one text."""
        array = self._read(name)
        if array.dtype.kind != "U" or array.ndim:
            raise DataError(f"{self._path}: array {name!r} is {array.dtype} of shape {array.shape}; give one text")
        return str(array)

    def test_rows(self, name: str, rows: int) -> NDArray[np.bool_]:
        """(rows,) bool: a bool column as it is, a text column where it says "test"."""
        column = self._column_of(name, rows, "bU", 'bool, or text with "test"')
        return column == "test" if column.dtype.kind == "U" else column.astype(np.bool_)

    def validation_rows(self, name: str) -> NDArray[np.bool_] | None:
        """(rows,) bool: where a text column says "validation"; None where it nowhere does."""
        column = self.column(name)
        checks = np.asarray(column == "validation") if column.dtype.kind == "U" else None
        return checks if checks is not None and checks.any() else None

    def chosen_rows(self, where: str | None, rows: int) -> NDArray[np.bool_]:
        """(rows,) bool of a `where` option; all rows without one."""
        if where is None:
            return np.ones(rows, dtype=np.bool_)
        chosen = self._column_of(where.removeprefix("!"), rows, "b", "bool").astype(np.bool_)
        return ~chosen if where.startswith("!") else chosen

    def _column_of(self, name: str, rows: int, kinds: str, wanted: str) -> NDArray[np.generic]:
        column = self.column(name)
        if column.dtype.kind not in kinds or column.size != rows:
            raise DataError(
                f"{self._path}: array {name!r} is {column.dtype} with {column.size} rows; give {wanted}, {rows} rows"
            )
        return column

    def _read(self, name: str) -> NDArray[np.generic]:
        if name not in self.names:
            spelt = {known.lower(): known for known in self.names}  # x for X is the usual slip
            nearest = difflib.get_close_matches(name.lower(), spelt, n=1, cutoff=0.4)
            hint = f", nearest is {spelt[nearest[0]]!r}" if nearest else ""
            raise DataError(f"{self._path}: no array {name!r}{hint}; it has {', '.join(self.names) or 'none'}")
        with _readable(self._path):
            self._check_header(name)
            with self._file.open(f"{name}.npy") as file:
                array: NDArray[np.generic] = npy.read_array(file, allow_pickle=False)
        return array

    def _check_header(self, name: str) -> None:
        """DataError for an array that could run code or fill the memory, before a byte of it is read."""
        with self._file.open(f"{name}.npy") as file:
            one = npy.read_magic(file) == (1, 0)
            shape, _, dtype = (npy.read_array_header_1_0 if one else npy.read_array_header_2_0)(file)
        if dtype.hasobject:
            raise DataError(
                f"{self._path}: array {name!r} holds Python objects, which could run code; "
                "save plain numbers, all samples of one shape"
            )
        size = math.prod(shape) * dtype.itemsize
        if size > LARGEST_ARRAY_BYTES:
            raise DataError(
                f"{self._path}: array {name!r} has {size} bytes, the limit is {LARGEST_ARRAY_BYTES}; "
                "split the file by clients"
            )


@contextmanager
def _opened(path: Path) -> Iterator[_Archive]:
    with _readable(path):
        file = zipfile.ZipFile(path)
    with file:
        yield _Archive(path, file)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What numpy and zipfile raise for a file that is absent, damaged or something else, as one DataError."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the path of an .npz") from None
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, RuntimeError) as error:
        raise DataError(f"{path}: not a readable .npz ({error}); write it with numpy.savez") from error


def _as_samples(stored: NDArray[np.generic]) -> NDArray[np.float32]:
    """float32; bytes are images: scaled from 0..255 to [0, 1], (N, H, W) becomes (N, 1, H, W)."""
    with np.errstate(over="ignore"):  # beyond float32 is infinity, which the caller refuses by its row
        x = stored.astype(np.float32)
    if stored.dtype != np.uint8:
        return x
    x /= np.float32(255)
    return x[:, None] if x.ndim == 3 else x


def _every_fifth(rows: int) -> NDArray[np.bool_]:
    """(rows,) bool: the test rows where nobody said which; regular, so that a class in a run is in both parts."""
    marked: NDArray[np.bool_] = np.arange(rows) % 5 == 4
    return marked


def _rows_by_value(ids: NDArray[np.generic]) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """(value, its ascending rows) in the values' order; sorted once, as there may be thousands of clients."""
    names, ranks = np.unique(ids, return_inverse=True)
    order = np.argsort(ranks, kind="stable")
    edges = np.flatnonzero(np.diff(ranks[order])) + 1
    return zip(map(str, names), np.split(order, edges), strict=True)


def _same_length(path: Path, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    lengths = {name: array.shape[0] for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise DataError(f"{path}: arrays differ in length ({found}); give one row per sample in each")


def _check_finite(path: Path, name: str, x: NDArray[np.float32], *, rows: NDArray[np.int64]) -> None:
    """rows: (N,) the row of the file that each row of x was."""
    bad = ~np.isfinite(x).all(axis=tuple(range(1, x.ndim)))
    if bad.any():
        raise DataError(
            f"{path}: array {name!r} has NaN or infinity in {int(bad.sum())} of {rows.size} rows, "
            f"first in row {rows[bad.argmax()]}; remove or repair those rows"
        )


def _client(path: Path, name: str, x: NDArray[np.float32], y: NDArray[np.int64], test: NDArray[np.bool_]) -> ClientData:
    for part, rows in (("training", int((~test).sum())), ("test", int(test.sum()))):
        if rows == 0:
            raise DataError(f"{path}: client {name} has no {part} rows of {y.size}; mark some, or leave the client out")
    return ClientData(x_train=x[~test], y_train=y[~test], x_test=x[test], y_test=y[test])

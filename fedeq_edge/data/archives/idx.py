"""MNIST and EMNIST: images and labels as idx files, gzipped or not.

Sources: LeCun, Cortes, Burges; Cohen et al., IJCNN 2017 (EMNIST). With QMNIST's label files (Yadav and Bottou,
NeurIPS 2019) beside MNIST's, the writer of each digit is known, and is the client.
"""

import math
import string
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.data.archives.samples import Reader, Samples
from fedeq_edge.data.archives.source import Source
from fedeq_edge.errors import DataError

EMNIST_SETS: Final = ("byclass", "bymerge", "balanced", "letters", "digits", "mnist")
_LETTERS: Final = string.ascii_uppercase
# The 47 classes where capitals and small letters that look alike are one; order of EMNIST's mapping files.
_MERGED: Final = tuple(string.digits + _LETTERS + "abdefghnqrt")
EMNIST_CLASSES: Final = {
    "byclass": tuple(string.digits + _LETTERS + string.ascii_lowercase),
    "bymerge": _MERGED,
    "balanced": _MERGED,
    "letters": tuple(_LETTERS),
    "digits": tuple(string.digits),
    "mnist": tuple(string.digits),
}
_TYPES: Final[dict[int, np.dtype[Any]]] = {8: np.dtype(np.uint8), 12: np.dtype(">i4")}
_WRITER_COLUMN: Final = 2  # of QMNIST's labels: class, series, writer, ...
_SIDE: Final = 28


def _array(source: Source, name: str, dimensions: int) -> NDArray[np.generic]:
    """The array of an idx file: two zero bytes, type, dimensions, their big-endian sizes, the values."""
    content = source.read(name)
    head = 4 + 4 * dimensions
    if len(content) < head or content[:2] != b"\0\0" or content[2] not in _TYPES or content[3] != dimensions:
        raise DataError(f"{source.path}: {name} is no idx file of {dimensions} dimensions; fetch it again, whole")
    shape = np.frombuffer(content[4:head], ">u4").tolist()
    kind = _TYPES[content[2]]
    if math.prod(shape) * kind.itemsize != len(content) - head:
        raise DataError(
            f"{source.path}: {name} claims {shape}, but has {len(content) - head} bytes; fetch it again, whole"
        )
    values: NDArray[np.generic] = np.frombuffer(content, kind, offset=head).reshape(shape)
    return values


def _pair(source: Source, prefix: str) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
    """Images (N, 28, 28) and labels (N,) of the files that begin with `prefix`."""
    images = _array(source, source.one(rf"{prefix}-images[-.]idx3-ubyte(?:\.gz)?"), 3)
    labels = _array(source, source.one(rf"{prefix}-labels[-.]idx1-ubyte(?:\.gz)?"), 1)
    if len(images) != len(labels) or images.shape[1:] != (_SIDE, _SIDE):
        raise DataError(
            f"{source.path}: {prefix} has images of shape {images.shape} and {len(labels)} labels; "
            f"expected {_SIDE} x {_SIDE} pixels and a label each"
        )
    return images, labels.astype(np.int64)


def _both(source: Source, train: str, test: str, classes: tuple[str, ...], first: int = 0) -> Samples:
    """The two parts one after the other; `first` is the number of the first class in the files."""
    (x, y), (x_test, y_test) = _pair(source, train), _pair(source, test)
    labels = np.concatenate([y, y_test]) - first
    if labels.size == 0 or labels.min() < 0 or labels.max() >= len(classes):
        raise DataError(f"{source.path}: labels beyond the {len(classes)} classes; fetch the archive again, whole")
    return Samples(
        x=np.concatenate([x, x_test]),
        y=labels,
        classes=classes,
        official_test=np.repeat([False, True], [y.size, y_test.size]),
    )


def _read_mnist(source: Source, _variant: str) -> Samples:
    samples = _both(source, "train", "t10k", tuple(string.digits))
    if not source.find(_QMNIST_TRAIN):
        return samples
    assert samples.official_test is not None
    test = int(samples.official_test.sum())
    writer = np.concatenate([_writers(source, _QMNIST_TRAIN, None), _writers(source, _QMNIST_TEST, test)])
    if writer.shape != samples.y.shape:
        raise DataError(f"{source.path}: {writer.size} writers for {samples.y.size} digits; take QMNIST's two files")
    return Samples(
        x=samples.x, y=samples.y, classes=samples.classes, client=writer, official_test=samples.official_test
    )


_QMNIST_TRAIN: Final = r"qmnist-train-labels-idx2-int(?:\.gz)?"
_QMNIST_TEST: Final = r"qmnist-test-labels-idx2-int(?:\.gz)?"


def _writers(source: Source, pattern: str, first: int | None) -> NDArray[np.int64]:
    """(first,) NIST numbers of the writers; QMNIST's test labels begin with MNIST's 10,000."""
    labels = _array(source, source.one(pattern), 2)
    return labels[:first, _WRITER_COLUMN].astype(np.int64)


def _read_emnist(source: Source, variant: str) -> Samples:
    found = [name for name in EMNIST_SETS if source.find(rf"emnist-{name}-train-images[-.]idx3-ubyte(?:\.gz)?")]
    if variant not in found:
        raise DataError(f"{source.path}: no EMNIST {variant} in it; choose --variant {' or '.join(found)}")
    samples = _both(
        source,
        f"emnist-{variant}-train",
        f"emnist-{variant}-test",
        EMNIST_CLASSES[variant],
        first=1 if variant == "letters" else 0,
    )
    # EMNIST's images are stored column by column.
    upright = np.ascontiguousarray(samples.x.swapaxes(1, 2))
    return Samples(x=upright, y=samples.y, classes=samples.classes, official_test=samples.official_test)


MNIST = Reader(
    kind="mnist",
    holds="MNIST's train-images-idx3-ubyte",
    fits=lambda source: bool(source.find(r"train-images[-.]idx3-ubyte(?:\.gz)?")),
    read=_read_mnist,
)
EMNIST = Reader(
    kind="emnist",
    holds="EMNIST's emnist-byclass-train-images-idx3-ubyte",
    fits=lambda source: bool(source.find(r"emnist-[a-z]{1,16}-train-images[-.]idx3-ubyte(?:\.gz)?")),
    read=_read_emnist,
    variants=EMNIST_SETS,
)

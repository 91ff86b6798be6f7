"""CIFAR-10 and CIFAR-100 in their binary version: records of one or two label bytes and 3 x 32 x 32 pixels.

Source: Krizhevsky 2009. The python version holds pickles, which can run code, and is refused.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.data.archives.samples import Reader, Samples
from fedeq_edge.data.archives.source import Source
from fedeq_edge.errors import DataError

_PIXELS: Final = 3 * 32 * 32
CIFAR10_CLASSES: Final = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_TRAIN_10: Final = r"data_batch_[1-5]\.bin"
_LABELS_100: Final = ("coarse", "fine")  # their order in a record


def refuse_pickles(source: Source) -> None:
    """DataError where it is the python version of either set."""
    for kind, folder, pattern in (
        ("10", "cifar-10-batches-py", r"cifar-10-batches-py/.*|data_batch_1"),
        ("100", "cifar-100-python", r"cifar-100-python/.*"),
    ):
        if source.path.name == folder or source.find(pattern):
            raise DataError(
                f"{source.path}: the python version of CIFAR-{kind} holds pickles, which could run code; "
                f"fetch cifar-{kind}-binary.tar.gz"
            )


def _records(source: Source, names: list[str], labels: int) -> NDArray[np.uint8]:
    """(N, labels + pixels) of the files, one after the other."""
    width = labels + _PIXELS
    tables = []
    for name in names:
        content = np.frombuffer(source.read(name), np.uint8)
        if content.size == 0 or content.size % width:
            raise DataError(
                f"{source.path}: {name} has {content.size} bytes, no multiple of {width}; fetch it again, whole"
            )
        tables.append(content.reshape(-1, width))
    return np.concatenate(tables)


def _read(source: Source, train: list[str], test: str, labels: int, column: int, classes: tuple[str, ...]) -> Samples:
    parts = [_records(source, train, labels), _records(source, [test], labels)]
    y = np.concatenate([part[:, column] for part in parts]).astype(np.int64)
    if y.max() >= len(classes):
        raise DataError(f"{source.path}: label {y.max()} of {len(classes)} classes; is this the binary version?")
    x = np.concatenate([part[:, labels:] for part in parts]).reshape(-1, 3, 32, 32)
    return Samples(x=x, y=y, classes=classes, official_test=np.repeat([False, True], [len(part) for part in parts]))


def _read_cifar10(source: Source, _variant: str) -> Samples:
    train = source.find(_TRAIN_10)
    if len(train) != 5:
        raise DataError(f"{source.path}: {len(train)} of the files data_batch_1.bin to _5.bin; fetch it again, whole")
    return _read(source, train, source.one(r"test_batch\.bin"), 1, 0, CIFAR10_CLASSES)


def _read_cifar100(source: Source, variant: str) -> Samples:
    named = source.find(rf"{variant}_label_names\.txt")
    count = 100 if variant == "fine" else 20
    names = source.text(named[0]).split() if named else [str(number) for number in range(count)]
    if len(names) != count:
        raise DataError(f"{source.path}: {named[0]} has {len(names)} names for {count} classes; fetch it again, whole")
    column = _LABELS_100.index(variant)
    return _read(source, [source.one(r"train\.bin")], source.one(r"test\.bin"), 2, column, tuple(names))


CIFAR10 = Reader(
    kind="cifar10",
    holds="CIFAR-10's data_batch_1.bin",
    fits=lambda source: bool(source.find(_TRAIN_10)),
    read=_read_cifar10,
)
CIFAR100 = Reader(
    kind="cifar100",
    holds="CIFAR-100's train.bin",
    fits=lambda source: bool(source.find(r"train\.bin")),
    read=_read_cifar100,
    variants=("fine", "coarse"),
)

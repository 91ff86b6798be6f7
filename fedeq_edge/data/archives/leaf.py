"""FEMNIST and Shakespeare as the LEAF benchmark writes them: json files of users with x and y.

Source: Caldas et al., arXiv 1812.01097. `source` is LEAF's data folder, or one json. Where it has train/ and test/
they are the official parts; else all of all_data/, or of every json.
"""

import re
from collections.abc import Callable
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedeq_edge.data.archives.idx import EMNIST_CLASSES
from fedeq_edge.data.archives.samples import Reader, Samples
from fedeq_edge.data.archives.source import Source
from fedeq_edge.errors import DataError

LETTERS: Final = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
"""LEAF's alphabet of 80; a code is a place in it, the space's for what is not in it."""
LENGTH: Final = 80
_SIDE: Final = 28
_HEAD_BYTES: Final = 8 << 20  # users and their sizes come before the data: 3,500 names are 0.1 MB
_NAME_BYTES: Final = 200

Parse = Callable[[bytes], tuple[NDArray[np.generic], NDArray[np.int64]]]


class _Leaf(msgspec.Struct):
    """A file; the data of each user stays text until its turn comes, because numbers as objects take 20 times more."""

    user_data: dict[str, msgspec.Raw]


class _Images(msgspec.Struct):
    x: list[list[float]]
    y: list[int]


class _Lines(msgspec.Struct):
    x: list[str]
    y: list[str]


def _pictures(raw: bytes) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
    """(n, 28, 28) uint8, white 255 as in LEAF, and labels."""
    user = msgspec.json.decode(raw, type=_Images)
    values, y = np.array(user.x, np.float32), np.array(user.y, np.int64)
    if values.shape != (y.size, _SIDE * _SIDE) or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"images of shape {values.shape} for {y.size} labels, not {_SIDE * _SIDE} values from 0 to 1")
    if y.size and not 0 <= y.min() <= y.max() < len(EMNIST_CLASSES["byclass"]):
        raise ValueError("labels beyond 0 to 61")
    return np.rint(values * 255).astype(np.uint8).reshape(-1, _SIDE, _SIDE), y


def _codes(text: str) -> NDArray[np.int16]:
    """(len(text),) places in LETTERS."""
    table = np.full(256, LETTERS.index(" "), np.int16)
    table[np.frombuffer(LETTERS.encode("ascii"), np.uint8)] = np.arange(len(LETTERS))
    return table[np.frombuffer(text.encode("latin-1", "replace"), np.uint8)]


def _speech(raw: bytes) -> tuple[NDArray[np.generic], NDArray[np.int64]]:
    """(n, 80) int16 codes of characters, and the code of the next one."""
    user = msgspec.json.decode(raw, type=_Lines)
    if len(user.x) != len(user.y) or {len(line) for line in user.x} - {LENGTH} or {len(char) for char in user.y} - {1}:
        raise ValueError(f"{len(user.x)} texts for {len(user.y)} characters, or texts not {LENGTH} characters long")
    return _codes("".join(user.x)).reshape(-1, LENGTH), _codes("".join(user.y)).astype(np.int64)


def _parts(source: Source) -> tuple[list[str], list[str]]:
    """Names of the files of the training and the test part; all in the first where nobody made parts."""
    train, test = source.find(r"train/[^/]+\.json"), source.find(r"test/[^/]+\.json")
    if train and test:
        return train, test
    return source.find(r"all_data/[^/]+\.json") or source.find(r"[^/]+\.json"), []


def _users(source: Source, names: list[str], parse: Parse) -> list[tuple[str, NDArray[np.generic], NDArray[np.int64]]]:
    """(user, x, y) of everyone in these files."""
    found = []
    for name in names:
        try:
            for user, raw in msgspec.json.decode(source.read(name), type=_Leaf).user_data.items():
                if len(user) > _NAME_BYTES:
                    raise ValueError(f"a user's name of {len(user)} characters")
                found.append((user, *parse(bytes(raw))))
        except (msgspec.DecodeError, ValueError, OverflowError, RecursionError) as error:
            raise DataError(f"{source.path}: {name} is no such LEAF file ({error}); make it again with LEAF") from None
    return found


def _read(source: Source, parse: Parse, classes: tuple[str, ...], **more: Any) -> Samples:
    train, test = (_users(source, names, parse) for names in _parts(source))
    if not sum(y.size for _, _, y in train):
        raise DataError(f"{source.path}: nobody in it has samples; make it again with LEAF")
    users = train + test
    sizes = [y.size for _, _, y in users]
    official = np.arange(sum(sizes)) >= sum(y.size for _, _, y in train)
    return Samples(
        x=np.concatenate([x for _, x, _ in users]),
        y=np.concatenate([y for _, _, y in users]),
        classes=classes,
        client=np.repeat([user for user, _, _ in users], sizes),
        official_test=official if test else None,
        **more,
    )


def _read_femnist(source: Source, _variant: str) -> Samples:
    return _read(source, _pictures, EMNIST_CLASSES["byclass"])


def _read_shakespeare(source: Source, variant: str) -> Samples:
    return _read(source, _speech, tuple(LETTERS), letters=len(LETTERS) if variant == "onehot" else 0)


def _holds(source: Source, first: str) -> bool:
    """Whether the first user's first x begins with that character: a list of numbers or a text."""
    names = _parts(source)[0]
    if not names:
        return False
    found = re.search(rb'"x"\s{0,9}:\s{0,9}\[\s{0,9}(.)', source.head(names[0], _HEAD_BYTES))
    return found is not None and found[1] == first.encode()


FEMNIST = Reader(
    kind="femnist", holds="LEAF's json with images", fits=lambda source: _holds(source, "["), read=_read_femnist
)
SHAKESPEARE = Reader(
    kind="shakespeare",
    holds="LEAF's json with texts",
    fits=lambda source: _holds(source, '"'),
    read=_read_shakespeare,
    variants=("codes", "onehot"),
)

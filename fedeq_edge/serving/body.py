"""Samples out of the body of a request: JSON or .npy, from whoever reaches the socket."""

import io
import math
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedeq_edge.errors import DataError

JSON, NPY = "application/json", "application/x-npy"
KINDS = (JSON, NPY)
_NUMBERS = "iuf"  # kinds of dtype


def samples(kind: str, raw: bytes) -> NDArray[np.float32]:
    """The numbers in `raw`, of any shape. kind: of `KINDS`. Raises DataError for what is not numbers.

    JSON knows no NaN: a sample with gaps goes as .npy.
    """
    values = _from_json(raw) if kind == JSON else _from_npy(raw)
    if values.dtype.kind not in _NUMBERS or not values.size:
        raise DataError(f"body: holds {values.dtype} of shape {values.shape}; send numbers")
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and spoils its own sample alone
        return values.astype(np.float32)


def _from_json(raw: bytes) -> NDArray[Any]:
    try:
        return np.asarray(msgspec.json.decode(raw))
    # Beside syntax errors: lists of unequal lengths, thousands of nested ones, integers beyond any machine's.
    except (msgspec.DecodeError, ValueError, RecursionError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"body: not a JSON list of numbers ({reason}); send [[...], ...], one list a sample") from error


def _from_npy(raw: bytes) -> NDArray[Any]:
    """numpy's own reader reserves what the header claims before it looks how much there is."""
    stream = io.BytesIO(raw)
    try:
        shape, fortran, dtype = _npy_header(stream)
    except (ValueError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"body: not an .npy file ({str(error).splitlines()[0]}); write it with numpy.save") from error
    left = len(raw) - stream.tell()
    if dtype.kind not in _NUMBERS or min(shape, default=1) < 0 or dtype.itemsize * math.prod(shape) != left:
        raise DataError(f"body: .npy says {dtype} of shape {shape}, and {left} bytes follow; send numbers, whole")
    return np.frombuffer(raw, dtype, offset=stream.tell()).reshape(shape, order="F" if fortran else "C")


def _npy_header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"version {version[0]}.{version[1]}; numpy writes 1.0 and 2.0 for numbers")

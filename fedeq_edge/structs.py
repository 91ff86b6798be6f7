"""Values with numpy vectors in them as msgpack bytes, for our own files and our own pipes (never for the network)."""

from typing import Any, TypeVar

import msgspec
import numpy as np

T = TypeVar("T")
_DTYPES = ("<f4", "<f8", "<i8")


def pack(value: object) -> bytes:
    """`value` as msgpack; a vector as [dtype, shape, bytes]."""
    return msgspec.msgpack.encode(value, enc_hook=_array_out)


def unpack(content: bytes | memoryview, kind: type[T]) -> T:
    """What `pack` made. Raises msgspec.ValidationError where it is not a `kind`."""
    return msgspec.msgpack.decode(content, type=kind, dec_hook=_array_in)


def _array_out(value: Any) -> object:
    if isinstance(value, np.ndarray):
        return [value.dtype.str, list(value.shape), value.tobytes()]
    raise TypeError(f"no way to pack a {type(value).__name__}")


def _array_in(_kind: type, raw: Any) -> Any:
    dtype, shape, data = raw
    if dtype not in _DTYPES:
        raise ValueError(f"vector of type {dtype}")
    return np.frombuffer(data, dtype).reshape(shape).copy()

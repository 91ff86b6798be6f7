"""Coding of float32 vectors: float32, float16, and integers with a scale per block of 64.

What travels is a *difference*, and both sides go on with what was decoded (algorithm.md section 4, "Coding of the
messages"): what a code leaves out stays in the problem and is met again in the next round.

An integer code of b bits holds q in [-L, L], L = 2^(b-1) - 1, with x ~ q * scale / L and scale the block's largest
magnitude, kept as the upper half of a float32 (bfloat16), rounded up so that |x| <= scale (values beyond the largest
finite scale, 3.39e38, are cut to it). Rounding is stochastic
(unbiased) when a generator is given and to nearest without one.
"""

import random
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.errors import LocalWireError, RemoteWireError

Codec = Literal["f32", "f16", "int8", "int4"]
Vector = NDArray[np.float32]
BLOCK: Final = 64  # values a scale: 0.25 bit a value
_SMALLEST_SCALE: Final = np.float32(2.0**-100)  # levels divided by it are still a float32
_LARGEST_SCALE: Final = np.uint32(0x7F7F)  # the next one is infinity, which every receiver refuses


@dataclass(frozen=True, slots=True)
class _Integer:
    bits: int

    @property
    def levels(self) -> int:
        return int(2 ** (self.bits - 1) - 1)


_INTEGERS: Final = {"int8": _Integer(8), "int4": _Integer(4)}
CODECS: Final[tuple[Codec, ...]] = ("f32", "f16", "int8", "int4")


def coded_bytes(codec: Codec, length: int) -> int:
    """Bytes that a vector of `length` values takes."""
    if codec == "f32":
        return 4 * length
    if codec == "f16":
        return 2 * length
    blocks = -(-length // BLOCK)
    return 2 * blocks + blocks * BLOCK * _INTEGERS[codec].bits // 8


def encode(codec: Codec, vector: Vector, rng: random.Random | None = None) -> bytes:
    """The vector as bytes, exactly `coded_bytes(codec, vector.size)`. Raises LocalWireError on NaN or infinity."""
    if not np.isfinite(vector).all():
        raise LocalWireError(f"vector of {vector.size} values holds NaN or infinity and is not sent")
    if codec == "f32":
        return vector.astype("<f4").tobytes()
    if codec == "f16":
        return np.clip(vector, -65504.0, 65504.0).astype("<f2").tobytes()
    integer = _INTEGERS[codec]
    blocks = _blocked(vector)
    scales = _scales_up(np.abs(blocks).max(axis=1))
    steps = blocks * (np.float32(integer.levels) / _as_float(scales))[:, None]
    quantised = np.clip(np.floor(steps + _noise(steps, rng)), -integer.levels, integer.levels).astype(np.int8)
    return scales.astype("<u2").tobytes() + _packed(quantised, integer.bits)


def decode(codec: Codec, body: bytes | memoryview, length: int) -> Vector:
    """The float32 vector, (length,), that these bytes stand for.

    Raises RemoteWireError where the size is not the codec's or a value is not finite; size is checked first.
    """
    expected = coded_bytes(codec, length)
    if len(body) != expected:
        raise RemoteWireError(f"{codec} vector of {length} values has {expected} bytes, got {len(body)}")
    if codec in ("f32", "f16"):
        vector = np.frombuffer(body, "<f4" if codec == "f32" else "<f2").astype(np.float32)
    else:
        vector = _decode_integers(_INTEGERS[codec], body, length)
    if not np.isfinite(vector).all():
        raise RemoteWireError(f"{codec} vector of {length} values holds NaN or infinity")
    return vector


def _decode_integers(integer: _Integer, body: bytes | memoryview, length: int) -> Vector:
    count = -(-length // BLOCK)
    scales = np.frombuffer(body, "<u2", count)
    quantised = _unpacked(np.frombuffer(body, np.uint8, offset=2 * count), integer.bits)
    with np.errstate(over="ignore", invalid="ignore"):  # a hostile scale may overflow; decode() refuses the result
        values = quantised.reshape(count, BLOCK) * (_as_float(scales) / np.float32(integer.levels))[:, None]
    return values.reshape(-1)[:length].astype(np.float32)


def _noise(steps: NDArray[np.floating], rng: random.Random | None) -> Vector:
    """Uniform in [0, 1), or 0.5 to round to nearest. Not numpy's generator: its import costs an agent 2.5 MB."""
    if rng is None:
        return np.full(1, 0.5, np.float32)
    words = np.frombuffer(rng.randbytes(2 * steps.size), "<u2")
    return (words.astype(np.float32) / np.float32(65536.0)).reshape(steps.shape)


def _blocked(vector: Vector) -> Vector:
    padded = np.zeros(-(-vector.size // BLOCK) * BLOCK, np.float32)
    padded[: vector.size] = vector
    return padded.reshape(-1, BLOCK)


def _scales_up(largest: Vector) -> NDArray[np.uint16]:
    """Upper half of each float32, rounded up, never zero."""
    bits = np.maximum(largest, _SMALLEST_SCALE).astype(np.float32).view(np.uint32)
    scales: NDArray[np.uint32] = np.minimum((bits + np.uint32(0xFFFF)) >> np.uint32(16), _LARGEST_SCALE)
    return scales.astype(np.uint16)


def _as_float(scales: NDArray[np.uint16]) -> Vector:
    return (scales.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _packed(quantised: NDArray[np.int8], bits: int) -> bytes:
    if bits == 8:
        return quantised.tobytes()
    nibbles = (quantised.reshape(-1) & 0x0F).astype(np.uint8)
    return (nibbles[0::2] | (nibbles[1::2] << 4)).tobytes()


def _unpacked(raw: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    if bits == 8:
        return raw.view(np.int8).astype(np.float32)
    nibbles = np.empty(raw.size * 2, np.int8)
    nibbles[0::2] = (raw & 0x0F).astype(np.int8)
    nibbles[1::2] = (raw >> 4).astype(np.int8)
    return np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.float32)

"""Coding of float32 vectors for the wire: a codec is a short text such as "int4", "int8+z" or "top5:int4".

    codec  = [ "top" percent ":" ] plain [ "+z" ]      percent: 0.1 to 49.9, no needless zeros
    plain  = "f32" | "f16" | "int8" | "int4" | "int2"

What travels is a *difference*, and both sides go on with what was decoded (algorithm.md section 4, "Coding of the
messages"): what a code leaves out stays in the problem and is met again in the next round.

    f32, f16    little-endian floats; f16 cuts values to its range of 65504
    int8, ...   integers with a scale per block of 64, rounded without bias (wire/integers.py)
    top5:...    the 5 % of the values, rounded up, that are largest in magnitude, and where they are (wire/positions.py)
    ...+z       deflated where that is shorter, behind a byte that says whether it is; floats byte plane by byte plane

Measured: bits a value, scales included, and the variance of what is lost over that of the vector. Gaussian and Laplace:
100,000 values; digits: differences of the digits model (8,546 values), up and down, in 12 rounds of 6 devices.

                bits                          noise
                Gaussian  Laplace  digits     Gaussian  digits
    f32+z       26.9      27.1     27.0       0         0
    f16+z       13.6      13.9     14.9       4e-8      4e-8
    int8        8.25      8.25     8.28       7e-5      1e-4
    int8+z      7.9       7.4      7.7
    int4        4.25      4.25     4.26       0.020     0.019
    int4+z      3.9       3.9      4.0
    int2        2.25      2.25     2.26       0.51      0.49
    int2+z      1.8       1.8      1.9
    top10:int8  1.30      1.30     1.35       0.56      0.34
    top10:int4  0.90      0.90     0.93       0.57      0.35
    top5:int4   0.50      0.50     0.52       0.72      0.50

So "+z" saves 4 to 12 % of int8, 7 to 9 % of int4, 16 to 20 % of int2 and 15 % of a full value, for about as much
processor time as coding takes; top-k it leaves as it is. What "top" leaves out is large and not zero in the mean: the
consensus still gets there (tests/consensus/test_coded_consensus.py), in more rounds.

Round stochastically on the way up: what a device lost is gone with theta_i, so it must be right in the mean (int2, to
the nearest, cost the digits model 0.7 points in round 5). Round to the nearest, without a generator, on the way down:
what z_hat did not take stays in z - z_hat at the server, and two bits down are stable only so.

Whoever decodes knows the length from the model, never from the message: the memory that decoding takes is bounded by
it, as zeros and what deflate packs cost a sender next to nothing.
"""

import difflib
import random
import re
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedeq_edge.errors import ConfigError, LocalWireError, RemoteWireError
from fedeq_edge.wire import integers, positions

Codec = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9.:+]+\Z", max_length=16)]
"""Text of a codec; `parse` says whether this version knows it."""
Vector = NDArray[np.float32]
CODECS: Final = ("f32", "f16", "int8", "int4", "int2", "top", "z")
"""Features of this version: what a codec is made of, and what a device announces at its birth."""
_TEXT: Final = re.compile(
    r"(?:top(?P<percent>(?!0:)(?:[1-4]?[0-9])(?:\.[1-9])?):)?(?P<plain>f32|f16|int8|int4|int2)(?P<packed>\+z)?"
)
_FLOATS: Final[dict[str, np.dtype[np.floating]]] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
}
_AS_IT_IS: Final = b"\0"
_DEFLATED: Final = b"\1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """A codec taken apart. plain: how a value is coded. tenths: of a percent of the values are sent, None for all."""

    plain: str
    tenths: int | None = None
    packed: bool = False

    @property
    def features(self) -> frozenset[str]:
        """What a version must have to speak it, of CODECS."""
        return frozenset({self.plain} | ({"top"} if self.tenths else set()) | ({"z"} if self.packed else set()))


@lru_cache(maxsize=64)
def parse(text: str) -> Code:
    """The code that `text` names. Raises ConfigError naming the grammar and what comes nearest."""
    match = _TEXT.fullmatch(text)
    if match is None:
        known = [*CODECS[:5], *(f"{plain}+z" for plain in CODECS[:5]), "top5:int8", "top5:int4+z"]
        nearest = difflib.get_close_matches(text, known, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f'codec "{text}" is unknown; the nearest is "{nearest}", and each is {", ".join(CODECS[:5])}, '
            'with "top5:" before it for the largest 5 % (0.1 to 49.9), with "+z" behind it to be deflated'
        )
    percent = match["percent"]
    tenths = None if percent is None else round(10 * float(percent))
    return Code(plain=match["plain"], tenths=tenths, packed=match["packed"] is not None)


def choose(preferences: Sequence[str], supported: Collection[str]) -> str | None:
    """The first of the codecs that the features `supported`, as another version announced them, suffice for."""
    return next((codec for codec in preferences if parse(codec).features <= set(supported)), None)


def largest_bytes(codec: str, length: int) -> int:
    """The most bytes that a vector of `length` values takes; all of them take as many without "top" and "+z"."""
    code = parse(codec)
    return _largest_inflated(code, length) + code.packed


def encode(codec: str, vector: Vector, rng: random.Random | None = None) -> bytes:
    """The vector, (length,), as bytes. rng: for stochastic rounding; without it integers are the nearest.

    Raises LocalWireError where a value is NaN, infinite, or beyond 2^120 and bound to be an integer.
    """
    code = parse(codec)
    largest = max(float(vector.max()), -float(vector.min()))  # not a number where a value is none
    if not largest <= (np.finfo(np.float32).max if code.plain in _FLOATS else integers.LARGEST):
        raise LocalWireError(
            f"vector of {vector.size} values holds NaN, infinity or {largest:g} and is not sent; did training diverge?"
        )
    body = _encode_values(code, vector, rng) if code.tenths is None else _encode_largest(code, vector, rng)
    return _deflated(body) if code.packed else body


def decode(codec: str, body: bytes | memoryview, length: int) -> Vector:
    """The float32 vector, (length,), that these bytes stand for; `length` >= 1 is the model's, not the sender's.

    Raises RemoteWireError where codec or bytes are none that `encode` makes of such a vector, or a value is not finite.
    No memory is taken for a body of the wrong size, nor for a deflated one beyond the size that it must have.
    """
    code = _announced(codec)
    if code.packed:
        body = _inflated(code, body, length)
    vector = _decode_values(code, body, length) if code.tenths is None else _decode_largest(code, body, length)
    if not np.isfinite(vector).all():
        raise RemoteWireError(f"{codec} vector of {length} values holds NaN or infinity")
    return vector


def _announced(codec: str) -> Code:
    try:
        return parse(codec)
    except ConfigError as error:
        raise RemoteWireError(str(error)) from error


# ---- all values --------------------------------------------------------------------------------------------


def _plain_bytes(code: Code, length: int) -> int:
    if code.plain in _FLOATS:
        return _FLOATS[code.plain].itemsize * length
    return integers.size(integers.GRIDS[code.plain], length)


def _encode_values(code: Code, vector: Vector, rng: random.Random | None) -> bytes:
    if code.plain not in _FLOATS:
        return integers.encode(integers.GRIDS[code.plain], vector, rng)
    floats = _FLOATS[code.plain]
    if floats.itemsize < vector.itemsize:
        limit = float(np.finfo(floats).max)
        vector = np.clip(vector, -limit, limit)
    raw = np.ascontiguousarray(vector, floats).view(np.uint8).reshape(-1, floats.itemsize)
    return (raw.T if code.packed else raw).tobytes()


def _decode_values(code: Code, body: bytes | memoryview, length: int) -> Vector:
    expected = _plain_bytes(code, length)
    if len(body) != expected:
        raise RemoteWireError(f"{code.plain} vector of {length} values has {expected} bytes, got {len(body)}")
    if code.plain not in _FLOATS:
        return integers.decode(integers.GRIDS[code.plain], body, length)
    floats = _FLOATS[code.plain]
    if code.packed:
        body = np.frombuffer(body, np.uint8).reshape(floats.itemsize, -1).T.tobytes()
    return np.frombuffer(body, floats).astype(np.float32)


# ---- the largest values ------------------------------------------------------------------------------------


def _kept(code: Code, length: int) -> int:
    """How many of `length` values are sent: integers only, so both sides agree."""
    return length if code.tenths is None else -(-length * code.tenths // 1000)


def _encode_largest(code: Code, vector: Vector, rng: random.Random | None) -> bytes:
    count = _kept(code, vector.size)
    where = np.sort(np.argpartition(np.abs(vector), vector.size - count)[vector.size - count :])
    return _encode_values(code, vector[where], rng) + positions.encode(where, vector.size)


def _decode_largest(code: Code, body: bytes | memoryview, length: int) -> Vector:
    count = _kept(code, length)
    values, where = memoryview(body)[: _plain_bytes(code, count)], memoryview(body)[_plain_bytes(code, count) :]
    found = positions.decode(where, count, length)
    vector = np.zeros(length, np.float32)
    vector[found] = _decode_values(code, values, count)
    return vector


# ---- deflated ----------------------------------------------------------------------------------------------


def _largest_inflated(code: Code, length: int) -> int:
    count = _kept(code, length)
    return _plain_bytes(code, count) + (0 if code.tenths is None else positions.largest_size(count, length))


def _deflated(body: bytes) -> bytes:
    """Huffman codes and runs alone: coded noise repeats nothing else, and looking for it took 3 to 7 times as long."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS, strategy=zlib.Z_RLE)
    deflated = packer.compress(body) + packer.flush()
    return _DEFLATED + deflated if len(deflated) < len(body) else _AS_IT_IS + body


def _inflated(code: Code, body: bytes | memoryview, length: int) -> bytes | memoryview:
    """What was deflated, or a byte more than it can be."""
    kind, rest = bytes(body[:1]), memoryview(body)[1:]
    if kind == _AS_IT_IS:
        return rest
    if kind != _DEFLATED:
        raise RemoteWireError(f"deflated vector of {length} values begins with {kind!r}, expected 0 or 1")
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = unpacker.decompress(rest, _largest_inflated(code, length) + 1)
    except zlib.error as error:
        raise RemoteWireError(f"deflated vector of {length} values cannot be read: {error}") from error
    if not unpacker.eof or unpacker.unused_data:
        raise RemoteWireError(f"deflated vector of {length} values does not end with its bytes")
    return inflated

"""One MQTT payload: a fixed frame, a small CBOR header, raw bytes.

    offset  size  field
    0       4     magic "FDQ1" (the major version of the protocol)
    4       1     kind: which message the header holds
    5       1     flags, zero
    6       2     header length, bytes (little endian, like all numbers here)
    8       4     body length, bytes
    12      4     CRC-32 of the frame before it and of the header
    16      ...   header (CBOR map), then body (raw tensor bytes)

Theory of operation. A payload comes from a device that may be broken or hostile, so every length is checked against
the bytes at hand and against a limit *before* anything is parsed or allocated: header at most 8 kB, CBOR nesting at
most 8, definite lengths only, no tags (they make regular expressions, cycles and numbers of 8 kB). Never pickle.
The CRC only tells a damaged header from a protocol error, so that the refusal can name the right one. A body is part
of a blob whose sha256 its transfer is named by, or leads to a consensus whose sha256 the header names; a CRC of it as
well would cost as much as all else that is done with it.
"""

import struct
import zlib
from typing import Final

import cbor2

from fedeq_edge.errors import LocalWireError, RemoteWireError

MAGIC: Final = b"FDQ1"
HEADER_LIMIT_BYTES: Final = (
    8192  # the largest header is a manifest, about 2 kB; one with a shift and scale per channel more
)
_NESTING_LIMIT: Final = 8  # a manifest nests three deep
_FIXED = struct.Struct("<4sBBHI")
_CHECKSUM = struct.Struct("<I")
FRAME_BYTES: Final = _FIXED.size + _CHECKSUM.size
_TAG: Final = -1


def _first_byte(byte: int) -> tuple[int, int, int, bool]:
    """(items held per argument, argument, bytes of argument that follow, whether it is a string) of an item.

    RFC 8949, section 3: three bits of major type, then five that are the argument or say how many bytes of it follow.
    An array of n holds n items, a map of n pairs 2n.
    """
    major, info = byte >> 5, byte & 31
    return {4: 1, 5: 2, 6: _TAG}.get(major, 0), info, {24: 1, 25: 2, 26: 4, 27: 8}.get(info, 0), major in (2, 3)


_FIRST_BYTES: Final = tuple(_first_byte(byte) for byte in range(256))


def pack(kind: int, header: dict[str, object], body: bytes | memoryview = b"") -> bytes:
    """The frame as bytes. Raises LocalWireError where the header is over its limit."""
    encoded = cbor2.dumps(header)
    if len(encoded) > HEADER_LIMIT_BYTES:
        raise LocalWireError(
            f"message header has {len(encoded)} bytes, at most {HEADER_LIMIT_BYTES}; shorten model.shift, model.scale"
        )
    fixed = _FIXED.pack(MAGIC, kind, 0, len(encoded), len(body))
    checksum = zlib.crc32(encoded, zlib.crc32(fixed))
    return b"".join((fixed, _CHECKSUM.pack(checksum), encoded, body))


def unpack(payload: bytes) -> tuple[int, object, memoryview]:
    """(kind, header, body) of one frame; the body is a view, not a copy. Raises RemoteWireError."""
    if len(payload) < FRAME_BYTES:
        raise RemoteWireError(f"payload has {len(payload)} bytes, a frame has at least {FRAME_BYTES}")
    magic, kind, _flags, header_bytes, body_bytes = _FIXED.unpack_from(payload)
    if magic != MAGIC:
        raise RemoteWireError(f"payload begins with {magic!r}, this version speaks {MAGIC!r}")
    if header_bytes > HEADER_LIMIT_BYTES:
        raise RemoteWireError(f"header claims {header_bytes} bytes, the limit is {HEADER_LIMIT_BYTES}")
    if FRAME_BYTES + header_bytes + body_bytes != len(payload):
        claimed = FRAME_BYTES + header_bytes + body_bytes
        raise RemoteWireError(f"frame claims {claimed} bytes but the payload has {len(payload)}")
    rest = memoryview(payload)[FRAME_BYTES:]
    if (
        zlib.crc32(rest[:header_bytes], zlib.crc32(payload[: _FIXED.size]))
        != _CHECKSUM.unpack_from(payload, _FIXED.size)[0]
    ):
        raise RemoteWireError("checksum differs: the payload was damaged on its way")
    return kind, _parse_header(bytes(rest[:header_bytes])), rest[header_bytes:]


def _parse_header(encoded: bytes) -> object:
    _check_items(encoded)
    try:
        return cbor2.loads(
            encoded,
            max_depth=_NESTING_LIMIT,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
        )
    except (cbor2.CBORError, ValueError, TypeError, OverflowError) as error:
        raise RemoteWireError(f"header is not the CBOR of this protocol: {error}") from error


def _check_items(encoded: bytes) -> None:
    """One CBOR item and nothing after it, without tags: its items lie one after the other, so no recursion is needed.

    Raises RemoteWireError. Lengths that are indefinite or beyond the end are left for cbor2 to refuse.
    """
    position, expected, length = 0, 1, len(encoded)
    while expected and position < length:
        held, argument, follow, string = _FIRST_BYTES[encoded[position]]
        if held == _TAG:
            raise RemoteWireError(f"header has a CBOR tag at byte {position}; this protocol uses none")
        position += 1
        if follow:
            argument = int.from_bytes(encoded[position : position + follow], "big")
            position += follow
        if string:
            position += argument
        expected += held * argument - 1
    if position < len(encoded):
        raise RemoteWireError(f"header has {len(encoded)} bytes but its CBOR ends at byte {position}")

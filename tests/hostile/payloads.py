"""Payloads that a broken or hostile device may send. Each maker takes a sound payload and returns the bad ones."""

import pickle
import random
import struct
import zlib
from collections.abc import Callable, Iterator

import cbor2

from fedeq_edge.wire import frame


def truncated(sound: bytes) -> Iterator[bytes]:
    """Cut short at every place in the frame's head, and at some in the rest."""
    yield from (sound[:size] for size in range(min(40, len(sound))))
    yield from (sound[:size] for size in range(40, len(sound), max(1, len(sound) // 20)))


def flipped(sound: bytes) -> Iterator[bytes]:
    """Every byte flipped, one at a time."""
    for position in range(len(sound)):
        broken = bytearray(sound)
        broken[position] ^= 0xFF
        yield bytes(broken)


def extended(sound: bytes) -> Iterator[bytes]:
    """With something behind it."""
    yield sound + b"\x00"
    yield sound + sound


def claiming(sound: bytes) -> Iterator[bytes]:
    """Claims of sizes that nobody should allocate, in the frame and in its CBOR."""
    for header_bytes, body_bytes in ((0xFFFF, 0), (0, 0xFFFFFFFF), (0xFFFF, 0xFFFFFFFF), (8192, 2**31)):
        yield struct.pack("<4sBBHII", b"FDQ1", sound[4], 0, header_bytes, body_bytes, 0) + sound[16:]
    for huge in (b"\x9b", b"\xbb", b"\x5b", b"\x7b"):
        yield with_header(sound[4], huge + b"\x7f" + b"\xff" * 7)


def pickled(sound: bytes) -> Iterator[bytes]:
    """A pickle, alone and as header and body of a frame: nobody may load it."""
    bomb = pickle.dumps(_Bomb())
    yield bomb
    yield with_header(sound[4], bomb)
    yield frame.pack(sound[4], {"transfer": bomb[:32].ljust(32), "index": bomb}, bomb)


def nothing_and_too_much(sound: bytes) -> Iterator[bytes]:
    """Zero bytes, and ten million."""
    yield b""
    yield bytes(10_000_000)
    yield random.Random(0).randbytes(10_000_000)
    yield with_header(sound[4], cbor2.dumps({"transfer": bytes(32), "index": 0, "size": 10_000_000}), bytes(10_000_000))


def nonsense(sound: bytes) -> Iterator[bytes]:
    """Sound frames with the wrong things in them, under every kind."""
    for kind in range(256):
        yield frame.pack(kind, {})
    for header in (b"\x80", b"\xf6", b"\xa1\x64boot\x80", b"\x81" * 8 + b"\x00"):
        yield with_header(sound[4], header)


def noise(sound: bytes) -> Iterator[bytes]:
    """Random bytes, with and without the magic."""
    rng = random.Random(1)
    for size in range(1, 200):
        yield rng.randbytes(size)
        yield b"FDQ1" + rng.randbytes(size)


def with_header(kind: int, header: bytes, body: bytes = b"") -> bytes:
    """A frame with any bytes as its header and a checksum that fits."""
    fixed = struct.pack("<4sBBHI", b"FDQ1", kind, 0, len(header), len(body))
    return fixed + struct.pack("<I", zlib.crc32(fixed + header + body)) + header + body


class _Bomb:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return exec, ("raise SystemExit('a pickle was loaded')",)


MAKERS: tuple[Callable[[bytes], Iterator[bytes]], ...] = (
    truncated,
    flipped,
    extended,
    claiming,
    pickled,
    nothing_and_too_much,
    nonsense,
    noise,
)

"""Masks: vectors of pseudo-random integers that a key stands for, and their packing into few bits.

The arithmetic is that of uint64, modulo 2^64. Reduction to `bits` happens once, when a vector is packed: congruent
modulo 2^64 is congruent modulo 2^bits. ChaCha20 (RFC 8439) makes the stream because it is fast without hardware help:
a Raspberry Pi 4 has no AES instructions.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

Words = NDArray[np.uint64]
_WORD_BYTES: Final = 8
# 64 kB of stream stay in the first caches, and a multiple of 8 values fills whole bytes at any width.
_SLAB: Final = 8192
_NONCE: Final = bytes(16)  # every key makes one stream and no more
_ZEROS: Final = memoryview(bytes(_SLAB * _WORD_BYTES))


def add_masks(words: Words, *, added: Sequence[bytes], subtracted: Sequence[bytes]) -> None:
    """`words`, (p,), have grown by the masks of the keys `added` less those `subtracted`, modulo 2^64, in place.

    Keys: 32 bytes each. A mask is a prefix of the same stream for every length.
    """
    streams = [(_stream(key), np.add) for key in added] + [(_stream(key), np.subtract) for key in subtracted]
    mask = np.empty(_SLAB, "<u8")
    for part in _slabs(words):
        for stream, combine in streams:
            stream.update_into(_ZEROS[: part.nbytes], mask.view(np.uint8).data)
            combine(part, mask[: part.size], out=part)


def pack(words: Words, bits: int) -> bytes:
    """The lowest `bits` of each word, one after the other without gaps; the last byte is filled up with zeros."""
    return b"".join(_packed(part, bits) for part in _slabs(words))


def unpack(packed: bytes, length: int, bits: int) -> Words:
    """The `length` words that `pack` was given, modulo 2^bits; `packed` has as many bytes as it made of them."""
    words = np.empty(length, np.uint64)
    content = np.frombuffer(packed, np.uint8)
    for index, part in enumerate(_slabs(words)):
        start = index * _SLAB * bits // 8
        part[:] = _unpacked(content[start : start + -(-part.size * bits // 8)], part.size, bits)
    return words


def centred(words: Words, bits: int) -> NDArray[np.int64]:
    """The integers from -2^(bits-1) to 2^(bits-1) - 1 that are congruent to `words` modulo 2^bits."""
    unused = np.uint64(64 - bits)
    signed: NDArray[np.int64] = (words << unused).view(np.int64) >> unused.astype(np.int64)
    return signed


def _stream(key: bytes) -> Any:
    return Cipher(ChaCha20(key, _NONCE), mode=None).encryptor()


def _slabs(words: Words) -> Iterator[Words]:
    return (words[start : start + _SLAB] for start in range(0, words.size, _SLAB))


def _packed(part: Words, bits: int) -> bytes:
    little = part.astype("<u8", copy=False)
    if bits == 64:
        return little.tobytes()
    flags = np.unpackbits(little.view(np.uint8).reshape(-1, _WORD_BYTES), axis=1, count=bits, bitorder="little")
    return np.packbits(flags, bitorder="little").tobytes()


def _unpacked(content: NDArray[np.uint8], size: int, bits: int) -> NDArray[np.unsignedinteger]:
    if bits == 64:
        return content.view("<u8")
    flags = np.unpackbits(content, count=size * bits, bitorder="little").reshape(size, bits)
    words = np.zeros((size, _WORD_BYTES), np.uint8)
    words[:, : -(-bits // 8)] = np.packbits(flags, axis=1, bitorder="little")
    return words.reshape(-1).view("<u8")

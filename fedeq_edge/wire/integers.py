"""Vectors as integers of 8, 4 or 2 bits with a scale per block of 64, rounded without bias.

    a code of b bits holds c in 0..top and stands for (2 c - top) / top * scale

scale is the largest magnitude of the block as the upper half of a float32 (bfloat16), rounded up. Rounding is
stochastic where a generator is given: the expectation of what is decoded is what was encoded, to 2^-16 of a step.

    int8   top 254: 255 levels, zero among them
    int4   top 15, int2 top 3: an even number of levels, none of them zero, of rotated blocks

Theory of operation
-------------------
With so few levels the code's own noise decides whether the consensus converges. Its variance over that of the signal,
on differences of the digits model: 1.3 for levels -1, 0, 1, and such a federation diverges; 0.86 for four levels; 0.49
for four levels of rotated blocks, whatever the distribution, as a rotated block looks Gaussian. For int4 the same step
takes the noise from 0.031 to 0.019. (Suresh et al., ICML 2017, arXiv 1611.00429, rotate whole vectors.)

A block is rotated by a 64 x 64 Hadamard matrix whose rows are signed by a bent function, so that single spikes and
periodic blocks, a constant one included, all become flat. Client and server must decode the same bits on any
processor: a rotated block is a sum of 64 integers below 2^8, which float32 holds exactly in whatever order and
with whatever fusing a BLAS adds them.
"""

import random
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]

BLOCK: Final = 64  # values a scale: 0.25 bit a value
LARGEST: Final = 2.0**120  # 64 values below it have a sum, and a scale, that is a finite float32
_SLAB: Final = 512  # blocks coded at a time: what lies between fits in a processor's cache, and memory stays bounded
_SMALLEST: Final = np.float32(2.0**-100)  # levels divided by it are a float32; what is smaller is coded as 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What the codes of one width stand for. top: the largest code; rotated: whether blocks are."""

    bits: int
    top: int
    rotated: bool


GRIDS: Final = {
    "int8": Grid(bits=8, top=254, rotated=False),
    "int4": Grid(bits=4, top=15, rotated=True),
    "int2": Grid(bits=2, top=3, rotated=True),
}


def size(grid: Grid, length: int) -> int:
    """Bytes that a vector of `length` values takes: blocks are sent whole."""
    return -(-length // BLOCK) * (2 + BLOCK * grid.bits // 8)


def encode(grid: Grid, vector: Vector, rng: random.Random | None) -> bytes:
    """All scales, then all codes, of a vector of magnitudes up to LARGEST, (length,). rng: None rounds to nearest."""
    scales, codes = [], []
    for start in range(0, vector.size, _SLAB * BLOCK):
        blocks = _blocked(vector[start : start + _SLAB * BLOCK])
        if grid.rotated:
            blocks = _product(blocks, _ROTATION / np.float32(8.0))  # orthogonal; divided first, so no sum overflows
        halves = _scales(blocks)
        scales.append(halves.astype("<u2").tobytes())
        codes.append(_packed(_codes(grid, blocks, halves, rng), grid.bits))
    return b"".join(scales + codes)


def decode(grid: Grid, body: bytes | memoryview, length: int) -> Vector:
    """The vector, (length,), of exactly `size(grid, length)` bytes; not finite where a hostile scale is not."""
    count = -(-length // BLOCK)
    scales = _as_float(np.frombuffer(body, "<u2", count))
    packed = np.frombuffer(body, np.uint8, offset=2 * count).reshape(count, -1)
    blocks = np.empty((count, BLOCK), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # a hostile scale; the caller refuses the result
        steps = scales / np.float32(8 * grid.top if grid.rotated else grid.top)
        for start in range(0, count, _SLAB):
            slab = slice(start, start + _SLAB)
            levels = _levels(grid, packed[slab])
            np.multiply(_product(levels, _ROTATION.T) if grid.rotated else levels, steps[slab, None], out=blocks[slab])
    return blocks.reshape(-1)[:length]


def _rotation() -> Vector:
    """H with H H^T = 64 I, entries 1 and -1, (64, 64)."""
    bits = (np.arange(BLOCK)[:, None] >> np.arange(6)) & 1
    bent = (bits[:, 0::2] & bits[:, 1::2]).sum(axis=1)
    return np.where((bent[:, None] + bits @ bits.T) % 2, -1.0, 1.0).astype(np.float32)


_ROTATION: Final = _rotation()


def _product(blocks: Vector, matrix: Vector) -> Vector:
    """Each block times the matrix, 64 blocks at a time.

    OpenBLAS wakes its threads for products of more than 2^18 terms, and their waiting for each other cost 10 to 70
    times the processor time of the product itself where other work had the cores.
    """
    product = np.empty_like(blocks)
    for start in range(0, len(blocks), BLOCK):
        np.matmul(blocks[start : start + BLOCK], matrix, out=product[start : start + BLOCK])
    return product


def _blocked(vector: Vector) -> Vector:
    if vector.size % BLOCK == 0 and vector.dtype == np.float32:
        return vector.reshape(-1, BLOCK)
    padded = np.zeros(-(-vector.size // BLOCK) * BLOCK, np.float32)
    padded[: vector.size] = vector
    return padded.reshape(-1, BLOCK)


def _scales(blocks: Vector) -> NDArray[np.uint16]:
    """Upper half of each block's largest magnitude as float32, rounded up; 0 where that is below the smallest.

    Magnitudes are ordered as their bits are, and numpy reduces short rows of integers twice as fast as of floats.
    """
    largest: NDArray[np.uint32] = np.maximum.reduce(blocks.view(np.uint32) & np.uint32(0x7FFFFFFF), axis=1)
    largest[largest < _SMALLEST.view(np.uint32)] = 0
    return ((largest + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)


def _as_float(scales: NDArray[np.uint16]) -> Vector:
    return (scales.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _codes(grid: Grid, blocks: Vector, scales: NDArray[np.uint16], rng: random.Random | None) -> NDArray[np.uint8]:
    """floor(c + noise) of the exact c in [0, top], (blocks * 64,), in units of 2^-16: integers are fast in place."""
    one = np.float32(65536.0)
    unit = np.divide(grid.top / 2, _as_float(scales), out=np.zeros(scales.size, np.float32), where=scales > 0)
    exact = blocks * (unit * one)[:, None]
    exact += np.where(scales > 0, grid.top / 2 * one, np.float32(0.0))[:, None]  # of nothing, codes 0, deflated well
    np.clip(exact, 0.0, np.float32(grid.top) * one, out=exact)
    codes = exact.reshape(-1).astype(np.int32)
    codes += _noise(codes.size, rng)
    codes >>= 16
    return codes.astype(np.uint8)


def _noise(size: int, rng: random.Random | None) -> NDArray[np.int32] | int:
    """Uniform in [0, 2^16) for each value, or a half. The values of a message share their lower byte: half the draws.

    Not numpy's generator: its import costs an agent 2.5 MB.
    """
    if rng is None:
        return 1 << 15
    noise = np.frombuffer(rng.randbytes(size), np.uint8).astype(np.int32)
    noise <<= 8
    noise |= rng.getrandbits(8)
    return noise


def _packed(codes: NDArray[np.uint8], bits: int) -> bytes:
    """The codes, the first in the lowest bits of its byte."""
    a_byte = 8 // bits
    packed = codes[0::a_byte].copy()
    for place in range(1, a_byte):
        packed |= codes[place::a_byte] << np.uint8(place * bits)
    return packed.tobytes()


def _levels(grid: Grid, packed: NDArray[np.uint8]) -> Vector:
    """2 c - top of every code of these blocks, (blocks, 64)."""
    if grid.bits == 8:
        return np.float32(2.0) * packed - np.float32(grid.top)
    levels: Vector = np.take(_LEVELS[grid.bits], packed, axis=0).reshape(-1, BLOCK)
    return levels


def _table(grid: Grid) -> Vector:
    """2 c - top of the codes in each byte, (256, codes a byte)."""
    shifts = np.arange(0, 8, grid.bits)
    codes: NDArray[np.int64] = (np.arange(256)[:, None] >> shifts) & (2**grid.bits - 1)
    return (2 * codes - grid.top).astype(np.float32)


_LEVELS: Final = {grid.bits: _table(grid) for grid in GRIDS.values() if grid.bits < 8}

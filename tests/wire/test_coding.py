"""Coding of vectors: exact sizes, bounded and unbiased rounding, nothing that is not a number in either direction."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedeq_edge.errors import LocalWireError, RemoteWireError
from fedeq_edge.wire.coding import BLOCK, CODECS, Codec, coded_bytes, decode, encode

LEVELS = {"int8": 127, "int4": 7}
LENGTHS = (1, 2, 63, 64, 65, 127, 128, 1000)


def step_of(codec: Codec, vector: np.ndarray) -> np.ndarray:
    """The distance between neighbouring codes for each value: scale / L, the scale being at most 2^-7 too large."""
    padded = np.zeros(-(-vector.size // BLOCK) * BLOCK)
    padded[: vector.size] = np.abs(vector)
    scale = np.maximum(padded.reshape(-1, BLOCK).max(axis=1), 2.0**-100) * (1 + 2.0**-7)
    return np.repeat(scale, BLOCK)[: vector.size] / LEVELS[codec]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    ("codec", "block_bytes"), [("f32", 4 * BLOCK), ("f16", 2 * BLOCK), ("int8", BLOCK + 2), ("int4", BLOCK // 2 + 2)]
)
def test_a_coded_vector_has_exactly_the_announced_size(codec: Codec, block_bytes: int, length: int) -> None:
    body = encode(codec, np.ones(length, np.float32))
    assert len(body) == coded_bytes(codec, length)
    if length % BLOCK == 0:
        assert len(body) == block_bytes * (length // BLOCK)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("length", LENGTHS)
def test_zero_stays_zero(codec: Codec, length: int) -> None:
    zero = np.zeros(length, np.float32)
    for rng in (None, random.Random(0)):
        np.testing.assert_array_equal(decode(codec, encode(codec, zero, rng), length), zero)


values = hnp.arrays(
    np.float32, st.integers(1, 200), elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(values, st.sampled_from(["int8", "int4"]), st.integers(0, 2**32))
def test_an_integer_code_is_off_by_less_than_a_step_and_by_half_of_one_to_nearest(
    vector: np.ndarray, codec: Codec, seed: int
) -> None:
    step = step_of(codec, vector) * (1 + 1e-5)
    nearest = decode(codec, encode(codec, vector), vector.size)
    drawn = decode(codec, encode(codec, vector, random.Random(seed)), vector.size)
    assert (np.abs(nearest.astype(np.float64) - vector) <= 0.5 * step).all()
    assert (np.abs(drawn.astype(np.float64) - vector) <= step).all()


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(values)
def test_float32_is_exact_and_float16_has_eleven_bits(vector: np.ndarray) -> None:
    np.testing.assert_array_equal(decode("f32", encode("f32", vector), vector.size), vector)
    clipped = np.clip(vector, -65504, 65504)
    half = decode("f16", encode("f16", vector), vector.size)
    assert (np.abs(half - clipped) <= np.maximum(np.abs(clipped) * 2.0**-11, 2.0**-25)).all()


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_stochastic_rounding_is_unbiased(codec: Codec) -> None:
    vector = np.random.default_rng(0).normal(size=BLOCK).astype(np.float32)
    draws = 4000
    rng = random.Random(1)
    total = np.zeros(BLOCK)
    for _ in range(draws):
        total += decode(codec, encode(codec, vector, rng), BLOCK)
    # Five standard errors of a rounding whose standard deviation is at most half a step
    assert (np.abs(total / draws - vector) < 5 * 0.5 * step_of(codec, vector) / np.sqrt(draws)).all()


@pytest.mark.parametrize("codec", CODECS)
def test_the_same_seed_gives_the_same_bytes(codec: Codec) -> None:
    vector = np.random.default_rng(0).normal(size=300).astype(np.float32)
    assert encode(codec, vector, random.Random(7)) == encode(codec, vector, random.Random(7))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_not_sent(codec: Codec, value: float) -> None:
    vector = np.ones(70, np.float32)
    vector[69] = value
    with pytest.raises(LocalWireError, match="vector of 70 values holds NaN or infinity"):
        encode(codec, vector)


@pytest.mark.parametrize(("codec", "dtype"), [("f32", "<f4"), ("f16", "<f2")])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_not_taken(codec: Codec, dtype: str, value: float) -> None:
    with pytest.raises(RemoteWireError, match="holds NaN or infinity"):
        decode(codec, np.array([1.0, value], dtype).tobytes(), 2)


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("scale", [0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF])
def test_a_hostile_scale_is_refused(codec: Codec, scale: int) -> None:
    body = bytearray(encode(codec, np.ones(BLOCK, np.float32)))
    body[:2] = scale.to_bytes(2, "little")
    with pytest.raises(RemoteWireError, match="holds NaN or infinity"):
        decode(codec, bytes(body), BLOCK)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_the_code_below_the_smallest_is_refused_or_finite_at_the_largest_scale(codec: Codec) -> None:
    """Minus L minus one is no code of ours; with the largest scale it may overflow."""
    body = b"\x7f\x7f" + (b"\x80" if codec == "int8" else b"\x88") * (BLOCK * LEVELS[codec].bit_length() // 7 * 7)
    body = body[: coded_bytes(codec, BLOCK)].ljust(coded_bytes(codec, BLOCK), b"\x80")
    with pytest.raises(RemoteWireError, match="holds NaN or infinity"):
        decode(codec, body, BLOCK)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_the_largest_numbers_are_cut_and_never_become_infinity(codec: Codec) -> None:
    largest = np.full(BLOCK, np.finfo(np.float32).max, np.float32)
    decoded = decode(codec, encode(codec, -largest, random.Random(0)), BLOCK)
    np.testing.assert_allclose(decoded, -largest, rtol=2.0**-7)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("length", [1, 64, 65, 2**53])
def test_a_body_of_another_size_is_refused_before_anything_is_made_of_it(codec: Codec, length: int) -> None:
    for size in (0, coded_bytes(codec, 64) + 1):
        with pytest.raises(RemoteWireError, match=f"has {coded_bytes(codec, length)} bytes, got {size}"):
            decode(codec, bytes(size), length)

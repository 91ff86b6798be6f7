"""Coding of vectors: announced sizes, bounded and unbiased rounding, nothing that is no number in either direction."""

import random
import re

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedeq_edge.errors import ConfigError, LocalWireError, RemoteWireError
from fedeq_edge.wire.coding import CODECS, Code, Codec, choose, decode, encode, largest_bytes, parse
from fedeq_edge.wire.integers import BLOCK

PLAIN = ("f32", "f16", "int8", "int4", "int2")
INTEGERS = ("int8", "int4", "int2")
FORMS = (*PLAIN, *(f"{plain}+z" for plain in PLAIN), "top10:int8", "top0.5:int4+z", "top49.9:f32", "top5:f16+z")
LENGTHS = (1, 2, 63, 64, 65, 127, 128, 1000, 32_769)
HALF_STEP = {"int8": 1 / 254, "int4": 1 / 15, "int2": 1 / 3}
"""Half the distance of neighbouring levels, for a scale of 1."""


def gaussian(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=length).astype(np.float32)


def norms(vector: np.ndarray) -> np.ndarray:
    """Euclidean length of every block of 64."""
    padded = np.zeros(-(-vector.size // BLOCK) * BLOCK)
    padded[: vector.size] = vector
    lengths: np.ndarray = np.linalg.norm(padded.reshape(-1, BLOCK), axis=1)
    return lengths


# ---- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("codec", FORMS)
def test_no_vector_takes_more_than_the_largest_size_and_all_come_back_whole(codec: str, length: int) -> None:
    vector = gaussian(length)
    body = encode(codec, vector, random.Random(0))
    assert len(body) <= largest_bytes(codec, length)
    assert decode(codec, body, length).shape == (length,)


@pytest.mark.parametrize(
    ("codec", "block_bytes"), [("f32", 256), ("f16", 128), ("int8", 64 + 2), ("int4", 32 + 2), ("int2", 16 + 2)]
)
@pytest.mark.parametrize("blocks", [1, 3])
def test_a_plain_code_has_exactly_the_announced_size(codec: str, block_bytes: int, blocks: int) -> None:
    body = encode(codec, gaussian(BLOCK * blocks))
    assert len(body) == largest_bytes(codec, BLOCK * blocks) == block_bytes * blocks


@pytest.mark.parametrize(("codec", "share"), [("int8", 0.26), ("int4", 0.135), ("int2", 0.072), ("top5:int4", 0.02)])
def test_a_hundred_thousand_values_with_their_headers_take_a_share_of_float32(codec: str, share: float) -> None:
    assert largest_bytes(codec, 100_000) + 400 <= share * 400_000


@pytest.mark.parametrize("plain", PLAIN)
def test_deflating_costs_a_byte_at_most(plain: str) -> None:
    noise = np.random.default_rng(0).uniform(-1.0, 1.0, 5000).astype(np.float32)
    for vector in (noise, np.zeros(5000, np.float32), gaussian(1)):
        plain_size = len(encode(plain, vector, random.Random(0)))
        assert len(encode(f"{plain}+z", vector, random.Random(0))) <= plain_size + 1


@pytest.mark.parametrize(("plain", "bits"), [("f32", 27.2), ("int8", 7.6), ("int4", 4.0), ("int2", 1.9)])
def test_deflating_pays_on_heavy_tails(plain: str, bits: float) -> None:
    laplace = np.random.default_rng(0).laplace(size=100_000).astype(np.float32)
    assert len(encode(f"{plain}+z", laplace, random.Random(0))) * 8 / laplace.size < bits


@pytest.mark.parametrize("codec", ["f32+z", "int8+z", "int4+z", "int2+z"])
def test_a_vector_without_a_difference_takes_next_to_nothing(codec: str) -> None:
    assert len(encode(codec, np.zeros(100_000, np.float32), random.Random(0))) < 1000


# ---- precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", FORMS)
@pytest.mark.parametrize("length", LENGTHS)
def test_zero_stays_zero(codec: str, length: int) -> None:
    zero = np.zeros(length, np.float32)
    for rng in (None, random.Random(0)):
        np.testing.assert_array_equal(decode(codec, encode(codec, zero, rng), length), zero)


values = hnp.arrays(
    np.float32, st.integers(1, 200), elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(values, st.sampled_from(INTEGERS), st.integers(0, 2**32))
def test_an_integer_code_is_off_by_half_a_step_to_nearest_and_by_less_than_one_if_drawn(
    vector: np.ndarray, codec: str, seed: int
) -> None:
    """As lengths of blocks, for a rotated block mixes its values. A scale is at most 2^-7 too large."""
    largest = np.maximum(np.abs(vector).max(), 2.0**-100) if codec == "int8" else np.maximum(norms(vector), 2.0**-100)
    half_steps = 8.0 * HALF_STEP[codec] * largest * (1 + 2.0**-7) * (1 + 1e-4)
    nearest = decode(codec, encode(codec, vector), vector.size)
    drawn = decode(codec, encode(codec, vector, random.Random(seed)), vector.size)
    assert (norms(nearest.astype(np.float64) - vector) <= half_steps).all()
    assert (norms(drawn.astype(np.float64) - vector) <= 2 * half_steps).all()


def test_int8_is_off_by_less_than_a_step_in_every_value_and_keeps_zeros() -> None:
    vector = gaussian(640) * np.repeat(10.0 ** np.arange(-5, 5), BLOCK).astype(np.float32)
    vector[::3] = 0.0
    decoded = decode("int8", encode("int8", vector, random.Random(0)), 640)
    largest = np.abs(vector).reshape(-1, BLOCK).max(axis=1).repeat(BLOCK)
    assert (np.abs(decoded - vector) <= 2 * HALF_STEP["int8"] * largest * (1 + 2.0**-7)).all()
    assert (decoded[::3] == 0.0).all()


@pytest.mark.parametrize(("codec", "noise"), [("int8", 3e-4), ("int4", 0.025), ("int2", 0.55)])
def test_noise_over_signal_is_bounded_whatever_the_distribution(codec: str, noise: float) -> None:
    """For int2 more would not converge (tests/consensus/test_coded_consensus.py)."""
    rng = np.random.default_rng(0)
    spikes = np.where(np.arange(6400) % BLOCK == 17, 1.0, 0.0) * rng.normal(size=6400)
    samples = [rng.normal(size=6400), rng.laplace(size=6400), rng.standard_t(3, size=6400), np.ones(6400), spikes]
    for vector in (sample.astype(np.float32) for sample in samples):
        error = decode(codec, encode(codec, vector, random.Random(0)), vector.size) - vector
        assert float(error @ error) < noise * float(vector @ vector)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(values)
def test_float32_is_exact_and_float16_has_eleven_bits(vector: np.ndarray) -> None:
    for codec in ("f32", "f32+z"):
        np.testing.assert_array_equal(decode(codec, encode(codec, vector), vector.size), vector)
    clipped = np.clip(vector, -65504, 65504)
    half = decode("f16", encode("f16", vector), vector.size)
    assert (np.abs(half - clipped) <= np.maximum(np.abs(clipped) * 2.0**-11, 2.0**-25)).all()


@pytest.mark.parametrize("codec", INTEGERS)
def test_stochastic_rounding_is_unbiased(codec: str) -> None:
    vector = gaussian(BLOCK)
    draws = 2000
    rng = random.Random(1)
    total = np.zeros(BLOCK)
    for _ in range(draws):
        total += decode(codec, encode(codec, vector, rng), BLOCK)
    scale = np.linalg.norm(vector)  # no level of a rotated block is larger
    # Five standard errors of a rounding whose standard deviation is at most half a step
    assert (np.abs(total / draws - vector) < 5 * HALF_STEP[codec] * scale / np.sqrt(draws)).all()


@pytest.mark.parametrize("codec", FORMS)
def test_the_same_seed_gives_the_same_bytes(codec: str) -> None:
    vector = gaussian(300)
    assert encode(codec, vector, random.Random(7)) == encode(codec, vector, random.Random(7))


@pytest.mark.parametrize(("codec", "top"), [("int4", 15), ("int2", 3)])
def test_a_rotated_block_is_a_sum_of_integers_that_no_order_of_addition_changes(codec: str, top: int) -> None:
    """What makes decoding equal on every processor: what is decoded is a whole number of steps, rounded once."""
    body = encode(codec, gaussian(BLOCK), random.Random(3))
    decoded = decode(codec, body, BLOCK)
    step = np.array([int.from_bytes(body[:2], "little") << 16], np.uint32).view(np.float32) / np.float32(8 * top)
    np.testing.assert_array_equal(np.rint(decoded / step) * step, decoded)


def test_the_bytes_of_every_code_are_those_of_the_first_version() -> None:
    """A device and its gateway need not be of one version: what is decoded must not change under a codec's name."""
    ramp = bytes(range(1, 17))
    scale = b"\x80\x3f"  # 1.0
    np.testing.assert_array_equal(decode("int8", scale + b"\xfe" + bytes(63), 2), [1.0, -1.0])
    np.testing.assert_allclose(24 * decode("int2", scale + ramp, 4), [-94, 2, 94, 2], rtol=1e-6)
    np.testing.assert_allclose(120 * decode("int4", scale + ramp * 2, 4), [-476, 476, 28, -36], rtol=1e-6)
    np.testing.assert_array_equal(decode("top40:f16", b"\0\x3c\0\x40\xc0\xc0", 5), [0, 1, 0, 2, 0])
    np.testing.assert_array_equal(decode("f16+z", b"\0\0\0\x3c\x40", 2), [1, 2])


# ---- the largest values ------------------------------------------------------------------------------------


def test_the_largest_values_arrive_and_all_others_are_zero() -> None:
    vector = gaussian(1000)
    decoded = decode("top5:f32", encode("top5:f32", vector), 1000)
    kept = np.argsort(-np.abs(vector))[:50]
    np.testing.assert_array_equal(np.flatnonzero(decoded), np.sort(kept))
    np.testing.assert_array_equal(decoded[kept], vector[kept])


@pytest.mark.parametrize(("length", "kept"), [(1, 1), (2, 1), (1000, 1), (1001, 2), (5000, 5)])
def test_a_share_is_rounded_up_to_whole_values(length: int, kept: int) -> None:
    decoded = decode("top0.1:f32", encode("top0.1:f32", np.ones(length, np.float32)), length)
    assert np.count_nonzero(decoded) == kept


# ---- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("int4", Code(plain="int4")),
        ("f32+z", Code(plain="f32", packed=True)),
        ("top5:int8", Code(plain="int8", tenths=50)),
        ("top0.1:int2+z", Code(plain="int2", tenths=1, packed=True)),
        ("top49.9:f16", Code(plain="f16", tenths=499)),
    ],
)
def test_a_codec_is_taken_apart(text: str, code: Code) -> None:
    assert parse(text) == code


@pytest.mark.parametrize(
    "text",
    [
        *("", "int3", "INT8", "int8 ", "int8\n", "+z", "z", "int8+z+z"),
        *("top5", "top:int8", "top0:int8", "top0.0:int8", "top05:int8", "top5.0:int8", "top5.25:int8", "top50:int8"),
        *("top-1:int8", "top٣:int8", "top5:top5:int8"),
    ],
)
def test_no_codec_has_a_second_spelling(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f'codec "{text}" is unknown; the nearest is "')):
        parse(text)


def test_an_unknown_codec_is_answered_with_the_nearest_known() -> None:
    with pytest.raises(ConfigError, match='the nearest is "int8"'):
        parse("int16")
    with pytest.raises(RemoteWireError, match='codec "int3" is unknown'):
        decode("int3", b"", 1)


def test_a_device_gets_the_first_codec_whose_features_it_has() -> None:
    preferences = ("top5:int4+z", "int4+z", "int4", "f32")
    assert choose(preferences, CODECS) == "top5:int4+z"
    assert choose(preferences, ("f32", "f16", "int8", "int4", "z")) == "int4+z"
    assert choose(preferences, ("f32", "int8", "int4", "one of a later version")) == "int4"
    assert choose(preferences, ("int8",)) is None


@pytest.mark.parametrize("text", FORMS)
def test_the_wire_takes_every_codec_and_nothing_longer_than_a_codec(text: str) -> None:
    assert msgspec.convert(text, Codec) == text
    for wrong in (text + "\n", text.upper(), text.ljust(17, "0"), ""):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(wrong, Codec)


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", FORMS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_not_sent(codec: str, value: float) -> None:
    vector = np.ones(70, np.float32)
    vector[69] = value
    with pytest.raises(LocalWireError, match="vector of 70 values holds NaN, infinity"):
        encode(codec, vector)


@pytest.mark.parametrize("codec", INTEGERS)
def test_integers_hold_magnitudes_up_to_two_to_the_120(codec: str) -> None:
    largest = np.full(BLOCK, -(2.0**120), np.float32)
    np.testing.assert_allclose(
        decode(codec, encode(codec, largest), BLOCK), largest, rtol=0.1 if codec != "int2" else 1
    )
    with pytest.raises(LocalWireError, match="did training diverge"):
        encode(codec, 2 * largest)


def test_float32_holds_its_whole_range() -> None:
    largest = np.array([np.finfo(np.float32).max, -np.finfo(np.float32).max], np.float32)
    np.testing.assert_array_equal(decode("f32", encode("f32", largest), 2), largest)


@pytest.mark.parametrize(("codec", "dtype"), [("f32", "<f4"), ("f16", "<f2")])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_not_taken(codec: str, dtype: str, value: float) -> None:
    with pytest.raises(RemoteWireError, match="holds NaN or infinity"):
        decode(codec, np.array([1.0, value], dtype).tobytes(), 2)


@pytest.mark.parametrize("codec", INTEGERS)
@pytest.mark.parametrize("scale", [0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF])
def test_a_hostile_scale_is_refused(codec: str, scale: int) -> None:
    body = scale.to_bytes(2, "little") + encode(codec, np.ones(BLOCK, np.float32))[2:]
    with pytest.raises(RemoteWireError, match="holds NaN or infinity"):
        decode(codec, body, BLOCK)


@pytest.mark.parametrize("codec", PLAIN)
@pytest.mark.parametrize("length", [1, 64, 65, 2**53])
def test_a_body_of_another_size_is_refused_before_anything_is_made_of_it(codec: str, length: int) -> None:
    for size in (0, largest_bytes(codec, 64) + 1):
        with pytest.raises(RemoteWireError, match=f"has {largest_bytes(codec, length)} bytes, got {size}"):
            decode(codec, bytes(size), length)

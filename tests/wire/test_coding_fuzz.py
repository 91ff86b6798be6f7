"""Bytes from anybody: they are a finite vector of the expected length or a RemoteWireError, within a bounded memory."""

import random
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedeq_edge.errors import RemoteWireError
from fedeq_edge.wire.coding import decode, encode, largest_bytes

PLAIN = ("f32", "f16", "int8", "int4", "int2")
SHARES = ("", "top0.1:", "top7:", "top49.9:")
CODECS = tuple(f"{share}{plain}{packed}" for share in SHARES for plain in PLAIN for packed in ("", "+z"))
codecs = st.sampled_from(CODECS)
lengths = st.one_of(st.integers(1, 300), st.sampled_from([4096, 100_000]))


def taken(codec: str, body: bytes, length: int) -> bool:
    """Whether these bytes are a vector; if so it is one."""
    try:
        vector = decode(codec, body, length)
    except RemoteWireError:
        return False
    assert vector.shape == (length,)
    assert vector.dtype == np.float32
    assert np.isfinite(vector).all()
    return True


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(codecs, st.binary(max_size=600), lengths)
def test_any_bytes_are_a_vector_or_refused(codec: str, body: bytes, length: int) -> None:
    taken(codec, body, length)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(codecs, st.integers(1, 300), st.data())
def test_bytes_of_the_right_size_are_a_vector_or_refused(codec: str, length: int, data: st.DataObject) -> None:
    size = largest_bytes(codec, length)
    body = data.draw(st.binary(min_size=size, max_size=size))
    taken(codec, body, length)
    if codec.endswith("+z"):
        taken(codec, b"\0" + body[1:], length)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(codecs, st.integers(1, 300), st.integers(0, 2**32), st.data())
def test_a_damaged_body_is_a_vector_or_refused(codec: str, length: int, seed: int, data: st.DataObject) -> None:
    vector = np.random.default_rng(seed).normal(size=length).astype(np.float32)
    body = bytearray(encode(codec, vector, random.Random(seed)))
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    taken(codec, bytes(body), length)
    taken(codec, bytes(body[:-1]), length)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=20), st.binary(max_size=64))
def test_any_name_is_a_codec_or_refused(codec: str, body: bytes) -> None:
    taken(codec, body, 16)


def deflated(content: bytes) -> bytes:
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return b"\1" + packer.compress(content) + packer.flush()


@pytest.mark.parametrize("codec", ["f32+z", "int8+z", "int2+z", "top49.9:f32+z", "top0.1:int4+z"])
def test_a_deflated_bomb_is_refused_within_the_memory_of_the_vector(codec: str) -> None:
    length = 100_000
    bomb = deflated(bytes(20_000_000))
    tracemalloc.start()
    try:
        assert not taken(codec, bomb, length)
        assert tracemalloc.get_traced_memory()[1] < 3 * 4 * length
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codec", CODECS)
def test_a_vector_that_nobody_could_hold_is_refused_without_memory_for_it(codec: str) -> None:
    """A caller takes the length from its model; should one not, what is allocated follows the bytes."""
    tracemalloc.start()
    try:
        assert not taken(codec, b"\1" + bytes(1000), 2**53)
        assert not taken(codec, deflated(bytes(100_000)), 2**53)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codec", ["int4+z", "top7:int8+z"])
def test_a_deflated_body_has_one_stream_and_nothing_behind_it(codec: str) -> None:
    zeros = np.zeros(5000, np.float32)
    body = encode(codec, zeros)
    assert body[:1] == b"\1"
    assert taken(codec, body, 5000)
    assert not taken(codec, body + b"\0", 5000)
    assert not taken(codec, body[:-1], 5000)
    assert not taken(codec, b"\2" + body[1:], 5000)
    assert not taken(codec, b"", 5000)


@pytest.mark.parametrize("codec", CODECS)
def test_a_body_that_lost_its_end_is_refused(codec: str) -> None:
    body = encode(codec, np.random.default_rng(0).normal(size=300).astype(np.float32), random.Random(0))
    assert taken(codec, body, 300)
    assert not taken(codec, body[:-1], 300)


@pytest.mark.parametrize("codec", CODECS)
def test_a_view_of_a_larger_message_decodes_like_bytes_of_its_own(codec: str) -> None:
    vector = np.random.default_rng(0).normal(size=200).astype(np.float32)
    body = encode(codec, vector, random.Random(0))
    message = memoryview(b"abc" + body + b"d")[3:-1]
    np.testing.assert_array_equal(decode(codec, message, 200), decode(codec, body, 200))

"""Positions of the values that travel: any set of them comes back, near the entropy, and no other bytes are taken."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedeq_edge.errors import RemoteWireError
from fedeq_edge.wire import positions


@st.composite
def chosen(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Some positions, and the length of the vector."""
    length = draw(st.integers(1, 400))
    where = draw(st.sets(st.integers(0, length - 1), min_size=1))
    return np.array(sorted(where), np.int64), length


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(chosen())
def test_any_positions_come_back(example: tuple[np.ndarray, int]) -> None:
    where, length = example
    body = positions.encode(where, length)
    assert len(body) <= positions.largest_size(where.size, length)
    np.testing.assert_array_equal(positions.decode(body, where.size, length), where)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.1, 0.25])
def test_random_positions_take_little_more_than_their_entropy(share: float) -> None:
    length = 100_000
    count = round(share * length)
    where = np.sort(np.random.default_rng(0).choice(length, count, replace=False))
    entropy = -length * (share * np.log2(share) + (1 - share) * np.log2(1 - share))
    assert 8 * len(positions.encode(where, length)) < 1.1 * entropy + 64


@pytest.mark.parametrize("length", [5, 64, 1000, 2**40])
def test_the_worst_positions_take_the_largest_size(length: int) -> None:
    """One gap takes all the room: the last two values of the vector."""
    where = np.array([length - 2, length - 1])
    assert len(positions.encode(where, length)) == positions.largest_size(2, length)
    np.testing.assert_array_equal(positions.decode(positions.encode(where, length), 2, length), where)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=40), st.integers(1, 30), st.one_of(st.integers(1, 300), st.just(2**53)))
def test_any_other_bytes_are_refused_or_are_positions(body: bytes, count: int, length: int) -> None:
    count = min(count, length)
    try:
        where = positions.decode(body, count, length)
    except RemoteWireError:
        return
    assert where.shape == (count,)
    assert where[0] >= 0
    assert where[-1] < length
    assert (np.diff(where) > 0).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "do not fit into 0 bytes"),
        (b"\xc0", "do not fit into 1 bytes"),
        (b"\xc0\xc0\x00", "do not fit into 3 bytes"),
        (b"\xc0\x80", "hold 1 positions, expected 2"),
        (b"\xc0\xe0", "hold 3 positions, expected 2"),
        (b"\x00\x03", "position 13 is beyond a vector of 5 values"),
    ],
)
def test_a_refusal_says_what_is_wrong(body: bytes, message: str) -> None:
    """Two positions of five values are one byte of low bits and one of unary parts."""
    with pytest.raises(RemoteWireError, match=message):
        positions.decode(body, 2, 5)

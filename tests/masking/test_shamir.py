import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedeq_edge.masking import shamir

elements = st.integers(0, shamir.PRIME - 1)


@given(secret=elements, threshold=st.integers(1, 6), more=st.integers(0, 3), data=st.data())
def test_any_threshold_of_shares_in_any_order_give_the_secret(
    secret: int, threshold: int, more: int, data: st.DataObject
) -> None:
    points = range(1, threshold + more + 1)
    shares = dict(zip(points, shamir.split(secret, points, threshold), strict=True))
    chosen = data.draw(st.permutations(list(points)))[:threshold]
    assert shamir.combine(shamir.weights(chosen), [shares[x] for x in chosen]) == secret


def test_a_line_through_known_points_meets_zero_where_it_must() -> None:
    # secret + slope x with secret 5 and slope 7, so shares 12, 19, 26
    for points in itertools.combinations((1, 2, 3), 2):
        assert shamir.combine(shamir.weights(points), [5 + 7 * x for x in points]) == 5


@given(shares=st.lists(elements, min_size=2, max_size=5), secret=elements)
def test_one_share_short_every_secret_is_as_likely_as_any_other(shares: list[int], secret: int) -> None:
    """For each conceivable secret there is exactly one missing share that leads to it."""
    points = list(range(1, len(shares) + 2))
    *known, last = shamir.weights(points)
    missing = (secret - shamir.combine(known, shares)) * pow(last, -1, shamir.PRIME) % shamir.PRIME
    assert shamir.combine([*known, last], [*shares, missing]) == secret


def test_shares_of_the_same_secret_are_new_every_time() -> None:
    assert shamir.split(1, range(1, 4), 2) != shamir.split(1, range(1, 4), 2)


def test_the_largest_element_fills_its_bytes_and_point_zero_would_be_the_secret() -> None:
    assert len(shamir.to_bytes(shamir.PRIME - 1)) == shamir.ELEMENT_BYTES
    with pytest.raises(OverflowError):
        shamir.to_bytes(1 << 128)
    assert shamir.split(9, [0], 3) == [9]

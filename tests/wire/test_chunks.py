"""Chunked transfers: complete in any order, under loss, within the window."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedeq_edge.errors import RemoteWireError
from fedeq_edge.wire.chunks import CHUNK_BYTES, WINDOW, Incoming, Outgoing, chunk_count, digest

BLOB = random.Random(0).randbytes(20 * CHUNK_BYTES + 17)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.integers(0, 2**32), st.sampled_from([0.0, 0.2, 0.6]), st.sampled_from([1, CHUNK_BYTES, CHUNK_BYTES + 1, None])
)
def test_a_blob_arrives_whole_over_a_link_that_loses_repeats_and_reorders(
    seed: int, loss: float, size: int | None
) -> None:
    rng = random.Random(seed)
    blob = BLOB[:size]
    outgoing, incoming = Outgoing(blob), Incoming(digest(blob), len(blob))
    in_flight: set[int] = set()
    for _ in range(2000):
        due = outgoing.due()
        in_flight |= {index for index, _ in due}
        assert len(in_flight) <= WINDOW
        for index, piece in rng.sample(due, len(due)):
            for _ in range(rng.choice([1, 2])):
                if rng.random() >= loss:
                    incoming.add(index, piece)
        if rng.random() >= loss:
            outgoing.acknowledge(incoming.bitmap)
            in_flight -= {
                index for index in range(chunk_count(len(blob))) if incoming.bitmap[index // 8] >> index % 8 & 1
            }
        if outgoing.done:
            break
        if not due and rng.random() < 0.5:
            outgoing.restart()
            in_flight.clear()
    assert outgoing.done
    assert incoming.complete
    assert incoming.blob() == blob


def test_a_repeated_chunk_changes_nothing() -> None:
    incoming = Incoming(digest(BLOB), len(BLOB))
    incoming.add(3, BLOB[3 * CHUNK_BYTES : 4 * CHUNK_BYTES])
    before = incoming.bitmap
    incoming.add(3, BLOB[3 * CHUNK_BYTES : 4 * CHUNK_BYTES])
    assert incoming.bitmap == before == b"\x08\x00\x00"


@pytest.mark.parametrize("index", [-1, 21, 2**53])
def test_a_chunk_beyond_the_announced_size_is_refused(index: int) -> None:
    with pytest.raises(RemoteWireError, match=f"chunk {index} of a transfer that has 21"):
        Incoming(digest(BLOB), len(BLOB)).add(index, b"")


@pytest.mark.parametrize(("index", "size"), [(0, CHUNK_BYTES - 1), (0, CHUNK_BYTES + 1), (20, 16), (20, 18), (20, 0)])
def test_a_chunk_of_another_length_is_refused(index: int, size: int) -> None:
    with pytest.raises(RemoteWireError, match=f"chunk {index} has {size} bytes"):
        Incoming(digest(BLOB), len(BLOB)).add(index, bytes(size))


def test_a_blob_with_another_digest_is_refused() -> None:
    incoming = Incoming(digest(b"this"), 4)
    incoming.add(0, b"that")
    with pytest.raises(RemoteWireError, match="another sha256"):
        incoming.blob()


@pytest.mark.parametrize("size", [0, 2, 4])
def test_a_bitmap_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(RemoteWireError, match="21 chunks need 3"):
        Outgoing(BLOB).acknowledge(bytes(size))


def test_bits_beyond_the_last_chunk_mean_nothing() -> None:
    outgoing = Outgoing(BLOB)
    outgoing.acknowledge(b"\x00\x00\xe0")
    assert not outgoing.done
    assert [index for index, _ in outgoing.due()] == list(range(WINDOW))


def test_an_announced_size_costs_no_memory() -> None:
    assert not Incoming(digest(b""), 2**40).complete

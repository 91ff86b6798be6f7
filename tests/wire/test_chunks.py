"""Chunked transfers: complete in any order, under loss, within the window, at little cost where connections break."""

import heapq
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedeq_edge.errors import RemoteWireError
from fedeq_edge.transport.mqtt import packet_bytes
from fedeq_edge.wire import messages
from fedeq_edge.wire.chunks import (
    BLOCK_BYTES,
    START_BLOCKS,
    WINDOW_BLOCKS,
    Incoming,
    Link,
    Outgoing,
    digest,
)
from fedeq_edge.wire.topics import Topics

BLOB = random.Random(0).randbytes(20 * BLOCK_BYTES + 17)
MEGABYTE = random.Random(1).randbytes(1_000_000)


def bitmap(*held: int, of: int = 21) -> bytes:
    return sum(1 << block for block in held).to_bytes(-(-of // 8), "little")


def deliver(outgoing: Outgoing, incoming: Incoming, now: float, waited_s: float) -> None:
    """Everything that is due arrives and is acknowledged `waited_s` later."""
    for first, piece in outgoing.due(now):
        incoming.add(first, piece)
    outgoing.acknowledge(incoming.bitmap, now + waited_s)


def deliver_all(blob: bytes, link: Link, waited_s: float) -> None:
    outgoing, incoming = Outgoing(blob, link), Incoming(digest(blob), len(blob))
    while not outgoing.done:
        deliver(outgoing, incoming, 0.0, waited_s)
    assert incoming.blob() == blob


# Whatever the link does


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.2, 0.6]),
    st.sampled_from([1, BLOCK_BYTES, BLOCK_BYTES + 1, 7 * BLOCK_BYTES, None]),
)
def test_a_blob_arrives_whole_over_a_link_that_loses_repeats_and_reorders(
    seed: int, loss: float, size: int | None
) -> None:
    rng = random.Random(seed)
    blob = BLOB[:size]
    link = Link()
    outgoing, incoming = Outgoing(blob, link), Incoming(digest(blob), len(blob))
    acknowledgements = [incoming.bitmap]
    for step in range(2000):
        runs = outgoing.due(float(step))
        for first, piece in rng.sample(runs, len(runs)):
            for _ in range(rng.choice([1, 2])):
                if rng.random() >= loss:
                    incoming.add(first, piece)
                    acknowledgements.append(incoming.bitmap)
        if rng.random() >= loss:
            outgoing.acknowledge(rng.choice(acknowledgements[-3:]), step + rng.choice([0.1, 1.0, 5.0]))
        if outgoing.done:
            break
        if not runs and rng.random() < 0.5:
            outgoing.restart()
        assert 1 <= link.run <= link.window <= WINDOW_BLOCKS
    assert outgoing.done
    assert incoming.blob() == blob
    assert link.sent_bytes - link.repeated_bytes == len(blob)


@dataclass
class FlappingLink:
    """`rate` bytes a second, `latency_s` each way; every `every_s` it breaks and loses all that is on its way."""

    latency_s: float
    every_s: float = 2.0
    rate: float = 64_000.0
    reconnect_s: float = 0.2
    now: float = 0.0
    cuts: int = 0
    _free_at: float = 0.0
    _breaks_at: float = 0.0
    _on_its_way: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: Iterator[int] = field(default_factory=count)

    def send(self, size: int, arrive: Callable[[], None]) -> None:
        """Up the link, after all that was sent before; 150 bytes are the packet's own."""
        self._free_at = max(self._free_at, self.now) + (size + 150) / self.rate
        heapq.heappush(self._on_its_way, (self._free_at + self.latency_s, next(self._order), arrive))

    def answer(self, arrive: Callable[[], None]) -> None:
        heapq.heappush(self._on_its_way, (self.now + self.latency_s, next(self._order), arrive))

    def step(self, reconnected: Callable[[], None]) -> None:
        """The next thing happens: something arrives, or the connection breaks and comes back."""
        if self._on_its_way and self._on_its_way[0][0] < self._breaks_at:
            self.now, _, arrive = heapq.heappop(self._on_its_way)
            arrive()
            return
        self._on_its_way.clear()
        self.now = self._free_at = self._breaks_at + self.reconnect_s
        self._breaks_at = self.now + self.every_s
        self.cuts += 1
        reconnected()


@dataclass
class Transfer:
    """One blob over a flapping link, as client and aggregator do it: offer, bitmap, runs, bitmaps."""

    wire: FlappingLink
    outgoing: Outgoing
    incoming: Incoming

    def run(self) -> None:
        while not self.outgoing.done:
            assert self.wire.cuts < 100
            self.wire.step(self.offer)

    def offer(self) -> None:
        self.outgoing.restart()
        self.wire.send(0, self.acknowledge)

    def acknowledge(self) -> None:
        held = self.incoming.bitmap
        self.wire.answer(lambda: self.go_on(held))

    def go_on(self, held: bytes) -> None:
        self.outgoing.acknowledge(held, self.wire.now)
        for first, piece in self.outgoing.due(self.wire.now):
            self.wire.send(len(piece), partial(self.arrive, first, piece))

    def arrive(self, first: int, piece: bytes) -> None:
        self.incoming.add(first, piece)
        self.acknowledge()


@pytest.mark.parametrize("latency_s", [0.001, 0.02, 0.05])
def test_a_megabyte_over_64_kB_a_second_that_breaks_every_2_s_costs_at_most_a_fifth_more(latency_s: float) -> None:
    link, wire = Link(), FlappingLink(latency_s=latency_s)
    transfer = Transfer(wire, Outgoing(MEGABYTE, link), Incoming(digest(MEGABYTE), len(MEGABYTE)))
    transfer.run()
    assert transfer.incoming.blob() == MEGABYTE
    assert wire.cuts >= 8
    assert link.sent_bytes <= 1.2 * len(MEGABYTE)
    assert link.sent_bytes == len(MEGABYTE) + link.repeated_bytes


# What is in the air


def test_before_anything_is_known_two_runs_share_32_kilobytes() -> None:
    outgoing = Outgoing(BLOB, Link())
    assert [(first, len(piece)) for first, piece in outgoing.due(0.0)] == [
        (0, 2 * BLOCK_BYTES),
        (2, 2 * BLOCK_BYTES),
    ]
    assert outgoing.due(0.0) == []


def test_runs_grow_to_half_a_megabyte_where_acknowledgements_come_fast() -> None:
    link = Link(packet_limit=2**20)
    deliver_all(MEGABYTE, link, waited_s=0.1)
    assert link.run == link.window == WINDOW_BLOCKS
    assert link.sent_bytes == len(MEGABYTE)


def test_small_blobs_on_a_fast_link_prove_no_more_than_their_own_size() -> None:
    link = Link()
    for _ in range(20):
        deliver_all(BLOB[: 3 * BLOCK_BYTES], link, waited_s=0.1)
    assert link.window == 6


def test_a_slow_link_that_holds_gets_smaller_runs_and_loses_nothing() -> None:
    link = Link()
    deliver_all(BLOB, link, waited_s=8.0)
    assert link.run == 1
    assert link.repeated_bytes == 0


def test_a_connection_that_breaks_early_leaves_single_blocks_and_one_that_carried_much_leaves_half() -> None:
    early, late = Link(), Link(packet_limit=2**20)
    outgoing = Outgoing(BLOB, early)
    outgoing.due(0.0)
    outgoing.restart()
    assert early.window == early.run == 1
    for _ in range(5):
        deliver_all(MEGABYTE, late, waited_s=0.1)
    outgoing = Outgoing(BLOB, late)
    outgoing.due(0.0)
    outgoing.restart()
    assert late.window == WINDOW_BLOCKS // 2


def test_a_break_with_nothing_in_the_air_says_nothing_of_the_link() -> None:
    link = Link()
    Outgoing(BLOB, link).restart()
    assert link.window == START_BLOCKS


def test_a_link_that_holds_again_comes_back_to_full_speed() -> None:
    link = Link(packet_limit=2**20)
    outgoing = Outgoing(BLOB, link)
    outgoing.due(0.0)
    outgoing.restart()
    for _ in range(6):
        deliver_all(MEGABYTE, link, waited_s=0.1)
    assert link.window == WINDOW_BLOCKS


@pytest.mark.parametrize("limit", [16_384, 65_536, 131_072, 262_144, 2**20])
def test_no_packet_is_over_the_brokers_limit(limit: int) -> None:
    topics = Topics("f" * 63)
    link = Link(packet_limit=limit, window=WINDOW_BLOCKS)
    for first, piece in Outgoing(MEGABYTE, link).due(0.0):
        chunk = messages.Chunk(transfer=b"\xff" * 32, index=2**53 - 1 - first, size=2**53)
        assert packet_bytes(topics.down("d" * 63), messages.encode(chunk, piece), "5") <= limit


def test_a_broker_that_tells_no_limit_gets_packets_that_every_large_cloud_takes() -> None:
    assert Link(window=WINDOW_BLOCKS).run * BLOCK_BYTES < 131_072


def test_bytes_sent_again_are_counted_to_the_last_partial_block() -> None:
    link = Link(window=WINDOW_BLOCKS, packet_limit=2**20)
    outgoing = Outgoing(BLOB, link)
    outgoing.due(0.0)
    outgoing.acknowledge(bitmap(*range(19)), 5.0)
    outgoing.restart()
    outgoing.due(6.0)
    outgoing.due(6.0)
    assert link.sent_bytes == len(BLOB) + link.repeated_bytes
    while not outgoing.done:
        outgoing.acknowledge(bitmap(*range(20)), 6.0)
        outgoing.due(6.0)
        outgoing.acknowledge(bitmap(*range(21)), 6.0)
    assert link.repeated_bytes == BLOCK_BYTES + 17


def test_a_receiver_that_began_anew_gets_everything_again() -> None:
    outgoing = Outgoing(BLOB, Link())
    outgoing.acknowledge(bitmap(*range(20)), 0.0)
    assert [first for first, _ in outgoing.due(0.0)] == [20]
    outgoing.acknowledge(bitmap(), 0.0)
    assert outgoing.due(0.0)[0][0] == 0


@pytest.mark.parametrize("size", [0, 2, 4])
def test_a_bitmap_of_another_length_is_refused(size: int) -> None:
    with pytest.raises(RemoteWireError, match="21 blocks need 3"):
        Outgoing(BLOB, Link()).acknowledge(bytes(size), 0.0)


def test_bits_beyond_the_last_block_mean_nothing() -> None:
    outgoing = Outgoing(BLOB, Link())
    outgoing.acknowledge(b"\x00\x00\xe0", 0.0)
    assert not outgoing.done
    assert outgoing.due(0.0)[0][0] == 0


# What comes in


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.permutations(range(21)), st.integers(0, 20), st.integers(1, 21))
def test_runs_that_overlap_repeat_and_come_in_any_order_make_the_same_blob(
    order: list[int], again: int, length: int
) -> None:
    incoming = Incoming(digest(BLOB), len(BLOB))
    for first in [*order, again]:
        incoming.add(first, BLOB[first * BLOCK_BYTES : (first + length) * BLOCK_BYTES])
    assert incoming.complete
    assert incoming.blob() == BLOB


def test_a_repeated_run_changes_nothing() -> None:
    incoming = Incoming(digest(BLOB), len(BLOB))
    incoming.add(3, BLOB[3 * BLOCK_BYTES : 5 * BLOCK_BYTES])
    before = incoming.bitmap
    incoming.add(3, BLOB[3 * BLOCK_BYTES : 5 * BLOCK_BYTES])
    assert incoming.bitmap == before == bitmap(3, 4)


@pytest.mark.parametrize("first", [-1, 21, 2**53])
def test_a_block_beyond_the_announced_size_is_refused(first: int) -> None:
    with pytest.raises(RemoteWireError, match=f"block {first} of a transfer that has 21"):
        Incoming(digest(BLOB), len(BLOB)).add(first, b"")


@pytest.mark.parametrize(
    ("first", "size"), [(0, 0), (0, 1), (0, BLOCK_BYTES - 1), (0, BLOCK_BYTES + 1), (20, 16), (20, 18), (19, 8210)]
)
def test_a_run_that_ends_within_a_block_or_beyond_the_blob_is_refused(first: int, size: int) -> None:
    incoming = Incoming(digest(BLOB), len(BLOB))
    with pytest.raises(RemoteWireError, match=f"{size} bytes from block {first}"):
        incoming.add(first, bytes(size))
    assert incoming.bitmap == bitmap()


def test_a_blob_with_another_digest_is_refused() -> None:
    incoming = Incoming(digest(b"this"), 4)
    incoming.add(0, b"that")
    with pytest.raises(RemoteWireError, match="another sha256"):
        incoming.blob()


def test_an_announced_size_costs_no_memory() -> None:
    assert not Incoming(digest(b""), 2**40).complete
    with pytest.raises(RemoteWireError):
        Incoming(digest(b""), 2**40).add(0, b"")

"""The aggregator's transfers: bounded together, in turn, resumed, and fair to those who wait."""

import random
from collections import deque
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedeq_edge.errors import RemoteWireError
from fedeq_edge.protocol.transfers import AWAY_S, IDLE_S, RETRY_S, Downloads, Pieces, Uploads
from fedeq_edge.wire import messages
from fedeq_edge.wire.chunks import BLOCK_BYTES, WINDOW_BLOCKS, Incoming, digest

LIMIT = 8 * BLOCK_BYTES
TOTAL = 20 * BLOCK_BYTES
DEVICES = [f"d{number}" for number in range(6)]
SIZES = [1, BLOCK_BYTES, 3 * BLOCK_BYTES + 5, LIMIT]
WINDOW_BYTES = WINDOW_BLOCKS * BLOCK_BYTES
MODEL = random.Random(1).randbytes(30 * BLOCK_BYTES + 3)


def blob_of(size: int, version: int = 0) -> bytes:
    return random.Random(f"{size}/{version}").randbytes(size)


def offer(uploads: Uploads, device: str, blob: bytes, now: float = 0.0) -> bytes | None:
    return uploads.offer(device, digest(blob), len(blob), now)


def send(uploads: Uploads, device: str, blob: bytes, block: int, now: float = 0.0) -> tuple[bytes, bytes | None]:
    piece = blob[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
    return uploads.add(device, digest(blob), len(blob), block, piece, now)


def send_all(uploads: Uploads, device: str, blob: bytes) -> bytes | None:
    """What the last block of the blob brings."""
    return [send(uploads, device, blob, block)[1] for block in range(-(-len(blob) // BLOCK_BYTES))][-1]


def filled() -> Uploads:
    """Two devices hold 16 of 20 blocks, a third waits for 8."""
    uploads = Uploads(LIMIT, TOTAL)
    assert offer(uploads, "d0", blob_of(LIMIT)) == offer(uploads, "d1", blob_of(LIMIT)) == b"\x00"
    assert offer(uploads, "d2", blob_of(LIMIT)) is None
    return uploads


# Uploads

ACTIONS = st.one_of(
    st.tuples(st.just("offer"), st.sampled_from(DEVICES), st.sampled_from(SIZES), st.integers(0, 2)),
    st.tuples(st.just("send"), st.sampled_from(DEVICES), st.sampled_from(SIZES), st.integers(0, 2)),
    st.tuples(st.just("forget"), st.sampled_from(DEVICES), st.just(0), st.just(0)),
    st.tuples(st.just("wait"), st.just(""), st.sampled_from([1, 60, 600]), st.just(0)),
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(ACTIONS, max_size=60), st.randoms(use_true_random=False))
def test_whatever_devices_do_memory_is_bounded_and_everybody_who_waits_is_served(
    actions: list[tuple[str, str, int, int]], rng: random.Random
) -> None:
    uploads, now = Uploads(LIMIT, TOTAL), 0.0
    wanted: dict[str, bytes] = {}
    for action, device, number, version in actions:
        if action == "offer":
            wanted[device] = blob_of(number, version)
            offer(uploads, device, wanted[device], now)
        elif action == "send":
            stray = version == 2 or device not in wanted
            try_to_send(uploads, device, blob_of(number, version) if stray else wanted[device], rng, now)
        elif action == "forget":
            uploads.forget(device)
            wanted.pop(device, None)
        else:
            now += number
            uploads.forget_idle(now)
        uploads.grants(now)
        assert uploads.held_bytes <= TOTAL
        assert memory(uploads) <= uploads.held_bytes
    for _ in DEVICES:  # each offers again, as a client does that hears nothing, and sends when it may
        for device, blob in list(wanted.items()):
            if offer(uploads, device, blob, now) is not None:
                assert send_all(uploads, device, blob) == blob
                del wanted[device]
                uploads.grants(now)
    assert not wanted
    assert uploads.held_bytes == uploads.waiting == len(uploads) == 0


def try_to_send(uploads: Uploads, device: str, blob: bytes, rng: random.Random, now: float) -> None:
    block = rng.randrange(-(-len(blob) // BLOCK_BYTES))
    try:
        whole = send(uploads, device, blob, block, now)[1]
    except RemoteWireError as refusal:
        assert "not granted" in str(refusal)  # noqa: PT017  # that it was granted at all is the sequence's chance
    else:
        assert whole in (None, blob)


def memory(uploads: Uploads) -> int:
    return sum(len(upload.incoming._content) for upload in uploads._of.values())


def test_offers_over_the_cap_wait_and_are_granted_in_the_order_of_asking() -> None:
    uploads = filled()
    assert offer(uploads, "d3", blob_of(1)) is None  # it would fit, but nobody overtakes
    assert (uploads.waiting, uploads.held_bytes, len(uploads)) == (2, 2 * LIMIT, 2)
    assert uploads.grants(0.0) == []
    assert send_all(uploads, "d0", blob_of(LIMIT)) == blob_of(LIMIT)
    assert [device for device, _, _ in uploads.grants(0.0)] == ["d2", "d3"]
    assert uploads.grants(0.0) == []


def test_an_offer_that_is_repeated_while_it_waits_keeps_its_place() -> None:
    uploads = filled()
    offer(uploads, "d3", blob_of(LIMIT))
    assert offer(uploads, "d2", blob_of(LIMIT, version=1)) is None
    uploads.forget("d0")
    assert uploads.grants(0.0) == [("d2", digest(blob_of(LIMIT, version=1)), b"\x00")]


def test_a_granted_upload_goes_on_from_its_bitmap_after_a_reconnection() -> None:
    uploads = filled()
    send(uploads, "d0", blob_of(LIMIT), 0)
    send(uploads, "d0", blob_of(LIMIT), 2)
    assert offer(uploads, "d0", blob_of(LIMIT)) == b"\x05"
    assert [device for device, _, _ in uploads.grants(0.0)] == []


def test_a_new_transfer_of_a_device_replaces_its_old_one() -> None:
    uploads = filled()
    send(uploads, "d0", blob_of(LIMIT), 0)
    assert offer(uploads, "d0", blob_of(LIMIT, version=1)) == b"\x00"
    assert uploads.held_bytes == 2 * LIMIT
    with pytest.raises(RemoteWireError, match="not granted"):
        send(uploads, "d0", blob_of(LIMIT), 1)


def test_one_of_the_largest_size_is_granted_even_where_the_cap_is_smaller() -> None:
    uploads = Uploads(LIMIT, total_bytes=BLOCK_BYTES)
    assert offer(uploads, "d0", blob_of(LIMIT)) is not None
    assert offer(uploads, "d1", blob_of(1)) is None


def test_a_size_over_the_limit_is_refused_before_anything_is_kept() -> None:
    uploads = Uploads(LIMIT, TOTAL)
    with pytest.raises(RemoteWireError, match=f"upload of {LIMIT + 1} bytes, a contribution has at most {LIMIT}"):
        uploads.offer("d0", bytes(32), LIMIT + 1, 0.0)
    with pytest.raises(RemoteWireError, match="at most"):
        uploads.add("d0", bytes(32), LIMIT + 1, 0, bytes(BLOCK_BYTES), 0.0)
    assert uploads.held_bytes == uploads.waiting == 0


def test_blocks_that_were_not_granted_are_refused() -> None:
    uploads = filled()
    for device in ("d2", "stranger"):
        with pytest.raises(RemoteWireError, match="not granted; offer it"):
            send(uploads, device, blob_of(LIMIT), 0)
    with pytest.raises(RemoteWireError, match="not granted"):
        send(uploads, "d0", blob_of(LIMIT, version=1), 0)


def test_a_blob_of_one_block_needs_no_offer_and_may_be_repeated_until_its_verdict() -> None:
    uploads = filled()
    for _ in range(2):
        assert send(uploads, "d3", blob_of(BLOCK_BYTES), 0) == (b"\x01", blob_of(BLOCK_BYTES))
    assert send(uploads, "d0", blob_of(17), 0) == (b"\x01", blob_of(17))
    assert offer(uploads, "d0", blob_of(LIMIT)) is not None  # its large one is still granted


def test_blocks_that_come_again_after_the_last_one_are_no_offence() -> None:
    uploads = filled()
    assert send_all(uploads, "d0", blob_of(LIMIT)) == blob_of(LIMIT)
    assert send(uploads, "d0", blob_of(LIMIT), 3) == (b"\xff", None)
    assert offer(uploads, "d1", blob_of(LIMIT)) == b"\x00"


def test_a_whole_that_is_offered_again_is_taken_again_so_that_it_gets_a_verdict() -> None:
    uploads = Uploads(LIMIT, TOTAL)
    for _ in range(2):
        assert offer(uploads, "d0", blob_of(LIMIT)) == b"\x00"
        assert send_all(uploads, "d0", blob_of(LIMIT)) == blob_of(LIMIT)


def test_a_blob_of_another_digest_is_refused_leaves_nothing_and_can_be_offered_again() -> None:
    uploads = Uploads(LIMIT, TOTAL)
    blob = blob_of(2 * BLOCK_BYTES)
    offer(uploads, "d0", blob)
    send(uploads, "d0", blob, 0)
    with pytest.raises(RemoteWireError, match="another sha256"):
        uploads.add("d0", digest(blob), len(blob), 1, bytes(BLOCK_BYTES), 0.0)
    assert uploads.held_bytes == 0
    assert offer(uploads, "d0", blob) == b"\x00"
    assert send_all(uploads, "d0", blob) == blob


def test_an_upload_that_rests_gives_its_turn_to_those_who_wait() -> None:
    uploads = filled()
    send(uploads, "d1", blob_of(LIMIT), 0, now=1.0)
    send(uploads, "d1", blob_of(LIMIT), 0, now=50.0)  # nothing new
    uploads.forget_idle(IDLE_S)
    assert [device for device, _, _ in uploads.grants(IDLE_S)] == ["d2"]
    offer(uploads, "d3", blob_of(LIMIT), IDLE_S)
    uploads.forget_idle(IDLE_S + 1.0)
    assert [device for device, _, _ in uploads.grants(IDLE_S + 1.0)] == ["d3"]


def test_an_upload_that_nobody_waits_for_is_kept_for_a_device_that_comes_back() -> None:
    uploads = Uploads(LIMIT, TOTAL)
    offer(uploads, "d0", blob_of(LIMIT))
    send(uploads, "d0", blob_of(LIMIT), 0)
    uploads.forget_idle(AWAY_S - 1.0)
    assert offer(uploads, "d0", blob_of(LIMIT)) == b"\x01"
    uploads.forget_idle(AWAY_S)
    assert uploads.held_bytes == 0


# Downloads


def ack(incoming: Incoming) -> messages.ChunkAck:
    return messages.ChunkAck(transfer=incoming.name, bitmap=incoming.bitmap)


def receive(incoming: Incoming, pieces: Pieces) -> None:
    for chunk, piece in pieces:
        assert (chunk.transfer, chunk.size) == (incoming.name, incoming.size)
        incoming.add(chunk.index, piece)


def fetch(downloads: Downloads, device: str, incoming: Incoming, pieces: Pieces) -> int:
    """Bytes that were sent until the device held the whole."""
    sent = 0
    while pieces:
        sent += sum(len(piece) for _, piece in pieces)
        receive(incoming, pieces)
        pieces = downloads.acknowledged(device, ack(incoming), 0.0)
    assert incoming.blob()
    return sent


def incoming_of(blob: bytes) -> Incoming:
    return Incoming(digest(blob), len(blob))


def test_a_thousand_devices_that_ask_at_once_are_served_in_turn_under_the_cap() -> None:
    downloads = Downloads(total_bytes=4 * WINDOW_BYTES)
    fitting = 4 * WINDOW_BYTES // len(MODEL)
    names = [f"d{number}" for number in range(1000)]
    active = deque((name, pieces) for name in names if (pieces := downloads.begin(name, MODEL, 0.0)))
    assert [name for name, _ in active] == names[:fitting]
    assert (len(downloads), downloads.waiting) == (fitting, 1000 - fitting)
    served = []
    while active:
        name, pieces = active.popleft()
        assert fetch(downloads, name, incoming_of(MODEL), pieces) == len(MODEL)
        served.append(name)
        active.extend(downloads.grants(0.0))
        assert len(downloads) <= fitting
    assert served == names
    assert downloads.waiting == len(downloads) == 0


def test_a_device_that_loses_its_connection_gets_the_rest_of_the_same_blob() -> None:
    downloads, incoming = Downloads(), incoming_of(MODEL)
    receive(incoming, downloads.begin("d0", MODEL, 0.0))
    downloads.acknowledged("d0", ack(incoming), 5.0)  # what this sends is lost
    downloads.forget("d0")
    assert len(downloads) == 0
    held = incoming.bitmap
    sent = fetch(downloads, "d0", incoming, downloads.begin("d0", MODEL, 6.0))
    assert sent == len(MODEL) - int.from_bytes(held, "little").bit_count() * BLOCK_BYTES


def test_a_device_that_came_back_without_its_memory_gets_all_of_it() -> None:
    downloads, incoming = Downloads(), incoming_of(MODEL)
    receive(incoming, downloads.begin("d0", MODEL, 0.0))
    downloads.acknowledged("d0", ack(incoming), 0.0)
    fetch(downloads, "d0", incoming_of(MODEL), downloads.begin("d0", MODEL, 0.0))


def test_a_device_that_asks_for_another_blob_gets_that_from_its_beginning() -> None:
    downloads, incoming = Downloads(), incoming_of(MODEL)
    receive(incoming, downloads.begin("d0", MODEL, 0.0))
    downloads.acknowledged("d0", ack(incoming), 0.0)
    other = MODEL[::-1]
    pieces = downloads.begin("d0", other, 0.0)
    assert downloads.acknowledged("d0", ack(incoming), 0.0) == []  # of the old one
    assert fetch(downloads, "d0", incoming_of(other), pieces) == len(other)


def test_what_nobody_has_acknowledged_is_sent_again_in_smaller_runs() -> None:
    downloads = Downloads()
    first = downloads.begin("d0", MODEL, 0.0)
    assert downloads.stalled(RETRY_S - 1.0) == []
    ((device, again),) = downloads.stalled(RETRY_S)
    assert device == "d0"
    assert again[0][0].index == first[0][0].index == 0
    assert len(again[0][1]) < len(first[0][1])
    assert downloads.stalled(RETRY_S + 1.0) == []
    assert downloads.repeated_bytes == len(again[0][1])


def test_a_download_that_rests_gives_its_turn_to_those_who_wait() -> None:
    downloads = Downloads(total_bytes=WINDOW_BYTES)
    blob = bytes(WINDOW_BYTES)
    assert downloads.begin("d0", blob, 0.0)
    assert not downloads.begin("d1", blob, 0.0)
    downloads.stalled(IDLE_S)
    ((device, pieces),) = downloads.grants(IDLE_S)
    assert device == "d1"
    fetch(downloads, "d1", incoming_of(blob), pieces)


def test_a_device_that_asks_again_while_it_waits_keeps_its_place() -> None:
    downloads = Downloads(total_bytes=WINDOW_BYTES)
    blob = bytes(WINDOW_BYTES)
    for device in ("d0", "d1", "d2", "d1"):
        downloads.begin(device, blob, 0.0)
    downloads.forget("d0")
    assert [device for device, _ in downloads.grants(0.0)] == ["d1"]


def test_a_new_connection_begins_with_nothing_in_the_air_and_its_own_packet_limit() -> None:
    downloads = Downloads()
    incoming = incoming_of(MODEL)
    receive(incoming, downloads.begin("d0", MODEL, 0.0))
    downloads.clear(packet_limit=2 * BLOCK_BYTES)
    assert downloads.acknowledged("d0", ack(incoming), 0.0) == []
    pieces = downloads.begin("d0", MODEL, 0.0)
    assert all(len(piece) <= BLOCK_BYTES for _, piece in pieces)
    assert downloads.stalled(RETRY_S)


def test_a_bitmap_that_does_not_fit_its_download_is_refused() -> None:
    downloads = Downloads()
    downloads.begin("d0", MODEL, 0.0)
    with pytest.raises(RemoteWireError, match="31 blocks need 4"):
        downloads.acknowledged("d0", messages.ChunkAck(transfer=digest(MODEL), bitmap=b"\x01"), 0.0)
    assert downloads.acknowledged("d1", messages.ChunkAck(transfer=digest(MODEL), bitmap=b"\x01"), 0.0) == []


def test_runs_of_a_fast_link_grow_from_one_transfer_to_the_next() -> None:
    downloads = Downloads()
    messages_needed = []
    for _ in range(4):
        pieces, sent = downloads.begin("d0", MODEL, 0.0), 0
        incoming = incoming_of(MODEL)
        while pieces:
            sent += len(pieces)
            receive(incoming, pieces)
            pieces = downloads.acknowledged("d0", ack(incoming), 0.1)
        messages_needed.append(sent)
    assert all(earlier >= later for earlier, later in pairwise(messages_needed))
    assert messages_needed[-1] == 3  # 15 blocks fit a packet where the broker tells no limit

"""Bad payloads change nothing, stop nothing, and are counted: a federation ends with the same bits as without them."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from fedeq_edge.errors import RemoteWireError
from fedeq_edge.protocol.actions import Note, Publish
from fedeq_edge.protocol.refusals import PATIENCE
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.protocol.state import vector_digest
from fedeq_edge.wire import messages
from fedeq_edge.wire.chunks import digest
from tests.hostile.payloads import MAKERS
from tests.protocol.fleet import TOPICS, Fleet, Quadratics, contribution

Maker = Callable[[bytes], Iterator[bytes]]
THREE = Quadratics.drawn(3)
SCHEDULE = Schedule(min_devices=3, quorum=1.0, deadline_s=1000.0)

by_maker = pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: str(maker.__name__))


def midway() -> Fleet:
    """A fleet in its third round, of which only d0's contribution is missing."""
    fleet = Fleet(THREE, rounds=5, codec="int8", schedule=SCHEDULE)
    fleet.run_to_round(3)
    fleet.devices["d0"].holds_back = True
    fleet.settle()
    return fleet


def finish(fleet: Fleet) -> np.ndarray:
    fleet.devices["d0"].holds_back = False
    fleet.run()
    fleet.check_counted_once()
    fleet.check_duals()
    return fleet.aggregator.consensus.z_hat


UNDISTURBED = finish(midway())


def sound_chunk(fleet: Fleet) -> bytes:
    """The payload that carries an acceptable contribution of d0."""
    message, body = contribution(fleet, "d0", np.full(12, 0.5, np.float32))
    blob = messages.encode(message, body)
    return messages.encode(messages.Chunk(transfer=digest(blob), index=0, size=len(blob)), blob)


def refusal(payload: bytes) -> str:
    """Why it is no message, empty where it is one."""
    try:
        messages.decode(payload)
    except RemoteWireError as error:
        return str(error)
    return ""


@by_maker
def test_decoding_raises_nothing_but_a_remote_wire_error(maker: Maker) -> None:
    sound = sound_chunk(midway())
    for payload in maker(sound):
        why = refusal(payload)
        assert "\n" not in why
        assert len(why) < 500


@by_maker
@pytest.mark.parametrize("branch", ["up", "state"])
def test_an_aggregator_drops_counts_and_names_them_and_the_round_goes_on(maker: Maker, branch: str) -> None:
    fleet = midway()
    before = fleet.aggregator.consensus.snapshot()
    topic = TOPICS.up("d0") if branch == "up" else TOPICS.state("d0")
    expected = 0
    for payload in maker(sound_chunk(fleet)):
        actions = fleet.aggregator.arrived(topic, payload, fleet.now)
        notes = [action for action in actions if isinstance(action, Note)]
        expected += 1
        named = [("malformed", "d0")] if expected <= PATIENCE else []  # further ones are counted only
        assert [(note.facts["code"], note.facts["device"]) for note in notes] == named
    assert fleet.aggregator.refusals == {"malformed": expected}
    np.testing.assert_equal(fleet.aggregator.consensus.snapshot(), before)
    assert "d0" in fleet.aggregator.status()["online"]
    np.testing.assert_array_equal(finish(fleet), UNDISTURBED)


@by_maker
def test_a_client_drops_and_notes_them_and_goes_on(maker: Maker) -> None:
    fleet = midway()
    device = fleet.devices["d0"]
    before = device.client.state
    task = fleet.messages_to("d0", messages.Task)[-1]
    for payload in maker(messages.encode(task)):
        for topic in (TOPICS.down("d0"), TOPICS.manifest, TOPICS.aggregator):
            actions = device.client.arrived(topic, payload, fleet.now)
            assert [action.event for action in actions if isinstance(action, Note)] == ["refused a message"]
    assert device.client.state is before
    np.testing.assert_array_equal(finish(fleet), UNDISTURBED)


@by_maker
def test_a_blob_with_the_right_digest_and_the_wrong_content_is_refused(maker: Maker) -> None:
    """A whole upload whose sha256 fits what it is named, so that only the content can tell."""
    fleet = midway()
    message, body = contribution(fleet, "d0", np.full(12, 0.5, np.float32))
    before = fleet.aggregator.consensus.snapshot()
    sound = messages.encode(message, body)
    head = sound[: -len(body)]
    for blob in maker(sound):
        other_numbers = len(blob) == len(sound) and blob.startswith(head)  # nothing is wrong with those
        if 0 < len(blob) < 8000 and not other_numbers:
            chunk = messages.Chunk(transfer=digest(blob), index=0, size=len(blob))
            fleet.feed("d0", messages.encode(chunk, blob))
    np.testing.assert_equal(fleet.aggregator.consensus.snapshot(), before)
    np.testing.assert_array_equal(finish(fleet), UNDISTURBED)


def test_a_consensus_that_does_not_fit_its_base_is_refused_by_the_client() -> None:
    fleet = midway()
    device = fleet.devices["d1"].client
    wanted = digest(b"wanted")
    device._fetching.wanted = wanted
    for length, codec, value in ((11, "f32", 1.0), (1, "f32", 1.0), (12, "f32", 3e38), (12, "f16", 6e4)):
        dtype = "<f4" if codec == "f32" else "<f2"
        for base in (_digest_of(device.state.z), b"", bytes(32)):
            model = messages.Model(run="t-1", round=3, model=wanted, base=base, codec=codec, length=length)
            blob = messages.encode(model, np.full(length, value, dtype).tobytes())
            chunk = messages.Chunk(transfer=digest(blob), index=0, size=len(blob))
            actions = device.arrived(TOPICS.down("d1"), messages.encode(chunk, blob), 0.0)
            assert [action.event for action in actions if isinstance(action, Note)] == ["refused a message"]


def _digest_of(z: np.ndarray) -> bytes:
    return digest(z.astype("<f4").tobytes())


def test_a_stranger_may_say_what_it_likes() -> None:
    """Sound messages of every kind from a device that nobody knows."""
    fleet = midway()
    sound: list[messages.Message] = [
        messages.Offline(boot="b"),
        messages.Fetch(run="t-1", model=vector_digest(fleet.aggregator.consensus.z_hat)),
        messages.ChunkAck(transfer=bytes(32), bitmap=b"\xff"),
        messages.Decline(run="t-1", round=3, reason="no"),
        messages.Differs(run="t-1", round=3, expected=b"", after=-1),
        messages.Verdict(run="t-1", subject="contribution", round=3, accepted=True),
        messages.Task(run="t-1", round=3, model=bytes(32), kappa=1.0, deadline_s=1.0, codec="f32"),
        messages.AggregatorState(boot="me"),
    ]
    for message in sound:
        fleet.send("stranger", message)
        fleet.aggregator.arrived(TOPICS.state("stranger"), messages.encode(message), fleet.now)
    fleet.aggregator._downloads.clear()
    np.testing.assert_array_equal(finish(fleet), UNDISTURBED)


@pytest.mark.parametrize("bitmap", [b"", b"\xff\xff", bytes(1000)])
def test_an_acknowledgement_of_another_length_is_refused(bitmap: bytes) -> None:
    fleet = midway()
    asked = messages.encode(messages.Fetch(run="t-1", model=vector_digest(fleet.aggregator.consensus.z_hat)))
    actions = fleet.aggregator.arrived(TOPICS.up("d1"), asked, fleet.now)
    sent = [messages.decode(action.payload).message for action in actions if isinstance(action, Publish)]
    name = next(message.transfer for message in sent if isinstance(message, messages.Chunk))
    fleet.send("d1", messages.ChunkAck(transfer=name, bitmap=bitmap))
    assert fleet.aggregator.refusals == {"malformed": 1}
    np.testing.assert_array_equal(finish(fleet), UNDISTURBED)

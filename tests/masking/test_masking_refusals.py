"""What the server refuses: it names the device, changes nothing, and the sum goes on without harm."""

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedeq_edge.errors import ContributionError, MaskingError, RemoteWireError
from fedeq_edge.masking import Keys, Masked, MaskingServer, Message, Reveal, Roster, Shares, decode, encode, messages
from fedeq_edge.masking.keys import Pair
from fedeq_edge.masking.terms import MEMBERS_MOST
from tests.masking.masked_session import Session, give, terms, vectors

LOW_ORDER = bytes(32)  # the point 0: whatever one agrees with it, everybody knows
KINDS = (Keys, Roster, Shares, messages.Delivery, Masked, messages.Survivors, Reveal)


def drawn_keys() -> Keys:
    return Keys(mask=Pair.drawn().public, seal=Pair.drawn().public)


def at_keys() -> Session:
    return Session(terms(), vectors(6))


def at_shares() -> Session:
    session = at_keys()
    session.keys()
    return session


def at_masked() -> Session:
    session = at_keys()
    session.shares(without=["d5"])
    return session


def at_reveal() -> Session:
    session = at_keys()
    session.masked(session.shares(without=["d5"]), without=["d4"])
    return session


@pytest.mark.parametrize(
    ("begin", "device", "message", "code"),
    [
        (at_keys, "d0", Keys(mask=LOW_ORDER, seal=Pair.drawn().public), "bad_key"),
        (at_keys, "d0", Keys(mask=Pair.drawn().public, seal=LOW_ORDER), "bad_key"),
        (at_keys, "d0", Keys(mask=b"k" * 32, seal=b"k" * 32), "bad_key"),
        (at_keys, "d0", Masked(vector=b""), "out_of_turn"),
        (at_shares, "d9", Shares(boxes=bytes(288), commitments=bytes(192)), "not_in_session"),
        (at_shares, "d0", Shares(boxes=bytes(287), commitments=bytes(192)), "wrong_size"),
        (at_shares, "d0", Shares(boxes=bytes(288), commitments=b""), "wrong_size"),
        (at_shares, "d0", drawn_keys(), "out_of_turn"),
        (at_masked, "d5", Masked(vector=bytes(9)), "not_in_session"),
        (at_masked, "d0", Masked(vector=bytes(8)), "wrong_size"),
        (at_reveal, "d4", Reveal(shares=bytes(96)), "not_in_session"),
        (at_reveal, "d0", Reveal(shares=bytes(95)), "wrong_size"),
        (at_reveal, "d0", Masked(vector=bytes(9)), "out_of_turn"),
    ],
)
def test_a_message_that_does_not_belong_is_refused_by_code(
    begin: Callable[[], Session], device: str, message: Message, code: str
) -> None:
    with pytest.raises(ContributionError, match=f"device {device}: ") as refusal:
        give(begin().server, device, message)
    assert refusal.value.code == code


def test_a_device_counts_once_whatever_it_sends_again() -> None:
    session = Session(terms(), vectors(4))
    deliveries = session.shares()
    masked = session.devices["d0"].mask(deliveries["d0"], session.data["d0"])
    give(session.server, "d0", masked)
    with pytest.raises(ContributionError, match="has its message already") as refusal:
        give(session.server, "d0", masked)
    assert refusal.value.code == "duplicate"
    survivors = session.masked({name: deliveries[name] for name in deliveries if name != "d0"})
    session.revealed(survivors, session.data)
    assert np.array_equal(session.server.unmask().total, session.plain(list(session.data)))


def test_a_key_of_another_device_cannot_be_claimed_and_a_restarted_device_may_bring_new_ones() -> None:
    server = MaskingServer(terms())
    first, second = drawn_keys(), drawn_keys()
    server.add_keys("d0", first)
    with pytest.raises(ContributionError, match="in use already"):
        server.add_keys("d1", Keys(mask=second.mask, seal=first.seal))
    server.add_keys("d0", second)
    server.add_keys("d1", first)


def test_no_more_devices_than_the_limit_are_taken() -> None:
    server = MaskingServer(terms())
    server._keys = {f"d{number}": drawn_keys() for number in range(MEMBERS_MOST)}
    with pytest.raises(ContributionError, match="at most 1024"):
        server.add_keys("late", drawn_keys())


def test_wrong_shares_are_named_left_out_and_cost_nothing_while_a_quorum_is_sound() -> None:
    session = Session(terms(), vectors(6))
    survivors = session.masked(session.shares())
    give(session.server, "d0", Reveal(shares=b"\x01" * 96))
    session.revealed(survivors, ["d1", "d2", "d3"])
    assert not session.server.complete
    session.revealed(survivors, ["d4"])
    result = session.server.unmask()
    assert np.array_equal(result.total, session.plain(list(session.data)))
    assert {holder for holder, _dealer in result.wrong} == {"d0"}


def test_a_share_of_the_other_secret_is_as_wrong_as_an_invented_one() -> None:
    session = Session(terms(), vectors(6))
    session.masked(session.shares(), without=["d5"])
    held = session.devices["d0"]._held
    both_swapped = b"".join(held[number].key if number < 5 else held[number].self_mask for number in range(6))
    give(session.server, "d0", Reveal(shares=both_swapped))
    session.revealed(messages.Survivors(survivors=b"\x1f"), ["d1", "d2", "d3", "d4"])
    assert len(session.server.unmask().wrong) == 6


def test_a_dealer_that_shared_another_key_and_left_is_named_and_the_sum_is_not_given_out() -> None:
    session = Session(terms(), vectors(6))
    session.devices["d5"]._key_seed += 1
    with pytest.raises(MaskingError, match="shares of d5 do not give its key"):
        session.run(masked_nothing=["d5"])


def test_a_roster_with_a_name_or_key_twice_or_a_known_secret_gets_no_shares() -> None:
    session = Session(terms(), vectors(4))
    members = session.keys().members
    twice = [
        (*members[:3], type(members[0])(device="d0", keys=members[3].keys)),
        (*members[:3], type(members[0])(device="d3", keys=Keys(mask=members[3].keys.mask, seal=members[1].keys.seal))),
    ]
    for wrong in twice:
        with pytest.raises(RemoteWireError, match="twice"):
            session.devices["d0"].share(Roster(members=wrong))
    known = type(members[0])(device="d3", keys=Keys(mask=members[3].keys.mask, seal=LOW_ORDER))
    with pytest.raises(RemoteWireError, match="no point to agree with"):
        session.devices["d0"].share(Roster(members=(*members[:3], known)))
    session.devices["d0"].share(Roster(members=members))


def test_a_step_is_closed_once_and_in_order() -> None:
    session = at_masked()
    for close in (session.server.close_keys, session.server.close_shares, session.server.unmask):
        with pytest.raises(MaskingError, match="while 'masked' is open"):
            close()


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (Keys, [b"k" * 31, b"k" * 32, b""]),
        (Keys, [b"k" * 32, b"k" * 32, bytes(2049)]),
        (Keys, [b"k" * 32, b"k" * 32, b"", b"more"]),
        (Keys, {"mask": b"k" * 32, "seal": b"k" * 32}),
        (Roster, [[["d0", [b"k" * 32, b"l" * 32]]]]),
        (Shares, [bytes(48 * 1025), b""]),
        (messages.Delivery, [bytes(129), b""]),
        (Reveal, [bytes(16 * 1025)]),
        (Masked, ["text"]),
    ],
)
def test_fields_beyond_their_limits_are_refused(kind: type[Message], content: object) -> None:
    with pytest.raises(RemoteWireError, match="of a masked sum"):
        decode(msgspec.msgpack.encode(content), kind)


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=200), kind=st.sampled_from(KINDS))
def test_any_bytes_are_a_message_or_a_named_refusal(content: bytes, kind: type[Message]) -> None:
    try:
        message = decode(content, kind)
    except RemoteWireError:
        return
    assert decode(encode(message), kind) == message


def test_nesting_as_deep_as_bytes_allow_is_refused() -> None:
    with pytest.raises(RemoteWireError):
        decode(b"\x91" * 100_000, Roster)

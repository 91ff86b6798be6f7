import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedeq_edge.errors import ConfigError, ContributionError, LocalWireError, MaskingError, RemoteWireError
from fedeq_edge.masking import MaskedSum, MaskingDevice, MaskingServer, Survivors, Terms
from fedeq_edge.masking.masks import centred, unpack
from tests.masking.masked_session import BOUND, Session, give, terms, vectors


@settings(max_examples=40, deadline=None)
@given(data=st.data(), members=st.integers(3, 9), threshold=st.sampled_from([0.51, 2 / 3, 0.8]))
def test_the_sum_has_the_bits_of_the_open_one_whoever_drops_out_at_any_step(
    data: st.DataObject, members: int, threshold: float
) -> None:
    session = Session(terms(threshold=threshold), vectors(members))
    names = data.draw(st.permutations(sorted(session.data)))
    spare = members - terms(threshold=threshold).quorum(members)
    cuts = sorted(data.draw(st.lists(st.integers(0, spare), min_size=3, max_size=3)))
    shared_nothing, masked_nothing, mute = names[: cuts[0]], names[cuts[0] : cuts[1]], names[cuts[1] : cuts[2]]
    result = session.run(shared_nothing=shared_nothing, masked_nothing=masked_nothing, mute=mute)
    arrived = names[cuts[1] :]
    assert sorted(result.contributors) == sorted(arrived)
    assert np.array_equal(result.total, session.plain(arrived))
    assert result.wrong == ()


@pytest.mark.parametrize("bits", [None, 32, 40, 49, 64])
@pytest.mark.parametrize("length", [1, 9, 8192, 8193])
def test_any_width_that_holds_the_sum_gives_it_at_its_extremes_and_across_slabs(bits: int | None, length: int) -> None:
    bound = 2**31 // 4 - 1
    session = Session(terms(length=length, bound=bound, bits=bits), vectors(4, length, bound))
    session.data["d0"] = np.full(length, -bound)
    session.data["d1"] = np.full(length, bound)
    result = session.run(masked_nothing=["d3"])
    assert np.array_equal(result.total, session.plain(["d0", "d1", "d2"]))


def test_four_devices_at_the_bound_fill_the_chosen_width_and_do_not_wrap() -> None:
    for sign in (1, -1):
        session = Session(terms(), {f"d{number}": np.full(5, sign * BOUND) for number in range(4)})
        assert (session.run().total == 4 * sign * BOUND).all()
    assert terms().width(4) == 13  # 4000 takes 12 bits, and a sign


def test_what_the_server_sees_of_a_vector_is_uniform_and_new_in_every_session() -> None:
    length, bits = 4096, 16
    agreed = terms(length=length, bits=bits)
    seen = []
    for _ in range(2):
        session = Session(agreed, {f"d{number}": np.zeros(length, np.int64) for number in range(3)})
        delivery = session.shares()["d0"]
        masked = session.devices["d0"].mask(delivery, session.data["d0"])
        seen.append(unpack(masked.vector, length, bits))
    assert (seen[0] == seen[1]).mean() < 0.01
    ones = np.unpackbits(seen[0].astype(np.uint16).view(np.uint8)).mean()
    assert abs(ones - 0.5) < 5 * 0.5 / np.sqrt(length * bits)


def test_one_answer_short_of_the_quorum_the_session_ends_at_every_step() -> None:
    few = Session(terms(), vectors(2))
    with pytest.raises(MaskingError, match="2 devices sent keys, 3 are needed"):
        few.keys()
    with pytest.raises(MaskingError, match="5 devices shared their secrets, 6 are needed"):
        Session(terms(), vectors(9)).run(shared_nothing=["d0", "d1", "d2", "d3"])
    with pytest.raises(MaskingError, match="5 devices sent a masked vector, 6 are needed"):
        Session(terms(), vectors(9)).run(masked_nothing=["d0", "d1", "d2", "d3"])
    with pytest.raises(MaskingError, match="5 devices revealed sound shares, 6 are needed"):
        Session(terms(), vectors(9)).run(mute=["d0", "d1", "d2", "d3"])


def test_a_server_that_combines_one_share_too_few_is_left_with_noise() -> None:
    session = Session(terms(length=200), vectors(9, 200))
    survivors = session.masked(session.shares())
    session.revealed(survivors, ["d0", "d1", "d2", "d3", "d4"])
    object.__setattr__(session.server._group, "quorum", 5)  # as a server would that does not keep to the rules
    assert session.server.complete
    guess = session.server.unmask().total
    assert (guess == session.plain(list(session.data))).mean() < 0.05


def test_a_late_share_completes_what_was_missing() -> None:
    session = Session(terms(), vectors(9))
    survivors = session.masked(session.shares())
    session.revealed(survivors, ["d0", "d1", "d2", "d3", "d4"])
    assert not session.server.complete
    session.revealed(survivors, ["d8"])
    assert session.server.complete
    assert np.array_equal(session.server.unmask().total, session.plain(list(session.data)))


def test_a_restarted_server_that_replays_its_messages_gets_the_same_sum() -> None:
    session = Session(terms(), vectors(6))
    first = session.run(masked_nothing=["d2"])
    server = MaskingServer(terms())
    close = {"keys": server.close_keys, "shares": server.close_shares, "masked": server.close_masked}
    for entry in session.log:
        if isinstance(entry, str):
            close[entry]()
        else:
            give(server, *entry)
    second = server.unmask()
    assert np.array_equal(first.total, second.total)
    assert first.contributors == second.contributors


def test_a_vector_that_comes_after_its_sender_was_declared_lost_stays_masked_and_out() -> None:
    session = Session(terms(), vectors(6))
    deliveries = session.shares()
    late = session.devices["d2"].mask(deliveries["d2"], session.data["d2"])
    survivors = session.masked(deliveries, without=["d2"])
    session.revealed(survivors, ["d0", "d1", "d3", "d4"])
    with pytest.raises(ContributionError) as refusal:
        session.server.add_masked("d2", late)
    assert refusal.value.code == "out_of_turn"
    assert session.server.unmask().contributors == ("d0", "d1", "d3", "d4", "d5")


# ---- what a device refuses ---------------------------------------------------------------------------------


def masked_session() -> tuple[Session, Survivors]:
    session = Session(terms(), vectors(6))
    return session, session.masked(session.shares())


def test_a_device_never_reveals_both_secrets_of_a_peer() -> None:
    session, survivors = masked_session()
    answer = session.devices["d0"].reveal(survivors)
    assert session.devices["d0"].reveal(survivors) == answer
    without_d5 = Survivors(survivors=bytes([0b011111]))
    with pytest.raises(RemoteWireError, match="second, different survivors"):
        session.devices["d0"].reveal(without_d5)
    other_order, _ = masked_session()
    other_order.devices["d0"].reveal(without_d5)
    with pytest.raises(RemoteWireError, match="second, different survivors"):
        other_order.devices["d0"].reveal(survivors)


@pytest.mark.parametrize(
    ("bitmap", "reason"),
    [
        (b"\x07", "names 3 devices, 4 are needed"),
        (b"\x3e", "d0 among them"),
        (b"\x7f", "does not fit"),
        (b"\x3f\x00", "does not fit"),
        (b"", "does not fit"),
    ],
    ids=["too-few", "without-us", "stray-bit", "too-long", "empty"],
)
def test_a_device_reveals_nothing_for_a_list_of_survivors_that_cannot_be(bitmap: bytes, reason: str) -> None:
    session, _ = masked_session()
    with pytest.raises(RemoteWireError, match=reason):
        session.devices["d0"].reveal(Survivors(survivors=bitmap))


def test_a_device_reveals_nothing_of_one_that_shared_nothing_and_yet_is_said_to_have_arrived() -> None:
    session = Session(terms(), vectors(6))
    session.masked(session.shares(without=["d5"]))
    with pytest.raises(RemoteWireError, match="shared no secrets"):
        session.devices["d0"].reveal(Survivors(survivors=b"\x3f"))


def test_a_device_masks_one_vector_in_a_session() -> None:
    session = Session(terms(), vectors(3))
    delivery = session.shares()["d0"]
    session.devices["d0"].mask(delivery, session.data["d0"])
    with pytest.raises(MaskingError, match="was masked in this session"):
        session.devices["d0"].mask(delivery, session.data["d1"])


def test_a_device_asked_out_of_order_says_so() -> None:
    session = Session(terms(), vectors(3))
    device = session.devices["d0"]
    with pytest.raises(MaskingError, match="before it had a roster"):
        device.reveal(Survivors(survivors=b"\x07"))
    session.shares()
    with pytest.raises(MaskingError, match="before it masked"):
        device.reveal(Survivors(survivors=b"\x07"))


@pytest.mark.parametrize(
    "vector",
    [np.full(5, BOUND + 1), np.full(5, -BOUND - 1), np.zeros(4, np.int64), np.zeros(5, np.int32), np.zeros(5)],
    ids=["above", "below", "short", "int32", "float"],
)
def test_a_vector_that_breaks_the_terms_is_not_masked_and_a_sound_one_still_can_be(vector: np.ndarray) -> None:
    session = Session(terms(), vectors(3))
    deliveries = session.shares()
    with pytest.raises(LocalWireError, match="vector to mask"):
        session.devices["d0"].mask(deliveries["d0"], vector)
    session.devices["d0"].mask(deliveries["d0"], session.data["d0"])


def test_the_same_roster_again_gets_the_same_shares_and_another_one_none() -> None:
    session = Session(terms(), vectors(4))
    roster = session.keys()
    first = session.devices["d0"].share(roster)
    assert session.devices["d0"].share(roster) == first
    smaller = type(roster)(members=roster.members[:3])
    with pytest.raises(RemoteWireError, match="second, different roster"):
        session.devices["d0"].share(smaller)


def test_a_device_without_a_session_of_its_own_name_and_keys_shares_nothing() -> None:
    roster = Session(terms(), vectors(4)).keys()
    with pytest.raises(RemoteWireError, match="does not hold the keys of d0"):
        MaskingDevice("d0", terms()).share(roster)


def spoiled_by_one(session: Session) -> MaskedSum:
    """A session in which d0's box for d1 is damaged on its way, and everybody answers."""
    deliveries = session.shares()
    boxes = bytearray(deliveries["d1"].boxes)
    boxes[3] ^= 1
    deliveries["d1"] = type(deliveries["d1"])(senders=deliveries["d1"].senders, boxes=bytes(boxes))
    session.revealed(session.masked(deliveries), session.data)
    return session.server.unmask()


def test_a_box_that_does_not_open_is_named_and_the_quorum_does_without_it() -> None:
    session = Session(terms(), vectors(6))
    result = spoiled_by_one(session)
    assert np.array_equal(result.total, session.plain(list(session.data)))
    assert result.wrong == (("d1", "d0"),)


@pytest.mark.parametrize(
    "fields",
    [
        {"session": b"short"},
        {"length": 0},
        {"bound": 0},
        {"bits": 7},
        {"bits": 65},
        {"threshold": 0.5},
        {"threshold": 1.1},
    ],
    ids=str,
)
def test_terms_that_cannot_hold_are_refused_and_named(fields: dict[str, object]) -> None:
    sound: dict[str, object] = {"session": bytes(32), "length": 5, "bound": 10}
    with pytest.raises(ConfigError, match=f"masking {next(iter(fields))}"):
        Terms(**{**sound, **fields})  # type: ignore[arg-type]  # wrong on purpose


def test_a_sum_that_does_not_fit_its_width_is_refused_before_anything_is_masked() -> None:
    session = Session(terms(bits=12), vectors(4))
    with pytest.raises(ConfigError, match="takes 13 bits, masking has 12"):
        session.keys()


def test_centred_integers_are_those_nearest_to_zero() -> None:
    words = np.array([0, 1, 127, 128, 255, 256 + 5], np.uint64)
    assert centred(words, 8).tolist() == [0, 1, 127, -128, -1, 5]
    assert centred(np.array([2**64 - 1], np.uint64), 64).tolist() == [-1]

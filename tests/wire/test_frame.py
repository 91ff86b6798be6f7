"""Frames: what is not one is refused by its name before anything is parsed."""

import contextlib
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedeq_edge.errors import LocalWireError, RemoteWireError
from fedeq_edge.wire import frame


def framed(header: bytes, body: bytes = b"", *, kind: int = 2, magic: bytes = b"FDQ1") -> bytes:
    """A frame with any bytes as its header and a checksum that fits."""
    fixed = struct.pack("<4sBBHI", magic, kind, 0, len(header), len(body))
    return fixed + struct.pack("<I", zlib.crc32(fixed + header + body)) + header + body


def test_a_frame_comes_back_as_it_was() -> None:
    kind, header, body = frame.unpack(frame.pack(7, {"a": 1, "b": [b"x", None, 1.5]}, b"tensor"))
    assert (kind, header, bytes(body)) == (7, {"a": 1, "b": [b"x", None, 1.5]}, b"tensor")


@pytest.mark.parametrize("size", range(frame.FRAME_BYTES))
def test_a_payload_shorter_than_a_frame_is_refused(size: int) -> None:
    with pytest.raises(RemoteWireError, match=f"payload has {size} bytes"):
        frame.unpack(frame.pack(1, {})[:size])


def test_another_magic_is_refused_with_both_named() -> None:
    with pytest.raises(RemoteWireError, match=r"begins with b'FDQ2', this version speaks b'FDQ1'"):
        frame.unpack(framed(b"\xa0", magic=b"FDQ2"))


def test_a_header_that_claims_more_than_the_limit_is_refused_before_its_size_is_believed() -> None:
    with pytest.raises(RemoteWireError, match="header claims 8193 bytes, the limit is 8192"):
        frame.unpack(struct.pack("<4sBBHII", b"FDQ1", 1, 0, 8193, 0, 0))


@pytest.mark.parametrize("change", [-1, 1, 2**31])
def test_a_frame_of_another_length_than_it_claims_is_refused(change: int) -> None:
    payload = bytearray(frame.pack(1, {}, b"body"))
    struct.pack_into("<I", payload, 8, 4 + change)
    with pytest.raises(RemoteWireError, match=f"claims {21 + change} bytes but the payload has 21"):
        frame.unpack(bytes(payload))


def test_every_changed_byte_before_the_body_is_noticed() -> None:
    payload = frame.pack(2, {"boot": "a"}, b"body")
    for position in range(len(payload) - len(b"body")):
        for flip in (1, 0x80, 0xFF):
            broken = bytearray(payload)
            broken[position] ^= flip
            with pytest.raises(RemoteWireError):
                frame.unpack(bytes(broken))


def test_a_header_over_the_limit_is_not_sent() -> None:
    with pytest.raises(LocalWireError, match="at most 8192; shorten"):
        frame.pack(4, {"labels": ["x" * 100] * 100})


@pytest.mark.parametrize(
    ("encoded", "why"),
    [
        (b"\x81" * 5000 + b"\x00", "nesting"),
        (b"\xbf\x61a\x01\xff", "indefinite"),
        (b"\x9f\x01\xff", "indefinite"),
        (b"\x5f\x41a\xff", "indefinite"),
        (b"\xa2\x61a\x01\x61a\x02", "[Dd]uplicate"),
        (b"\x9b\x00\x00\x00\x7f\xff\xff\xff\xff", "premature"),
        (b"\x5b\x7f\xff\xff\xff\xff\xff\xff\xff", "premature"),
        (b"\x61\xff", "text string"),
        (b"\xa1\x80\x01", "map key"),
        (b"\xa1\x01\x01", "map key"),
        (b"\x1c", "subtype"),
        (b"", "premature"),
        (b"\xa0\x00", "2 bytes but its CBOR ends at byte 1"),
    ],
)
def test_cbor_that_is_not_of_this_protocol_is_refused(encoded: bytes, why: str) -> None:
    with pytest.raises(RemoteWireError, match=why):
        frame.unpack(framed(encoded))


@pytest.mark.parametrize(
    "tagged",
    [
        b"\xd8\x23\x65(a+)+",  # 35: a regular expression
        b"\xd8\x1c\x81\xd8\x1d\x00",  # 28 and 29: a list that holds itself
        b"\xd8\x24\x63abc",  # 36: a MIME message
        b"\xc2\x59\x10\x00" + b"\xff" * 4096,  # 2: a number of 32768 bits
        b"\xc5\x82\x1b\x7f\xff\xff\xff\xff\xff\xff\xff\x03",  # 5: 3 times 2 to the power of 2^63
        b"\xd9\x01\x02\x81\x01",  # 258: a set
        b"\xda\x00\x01\x00\x00\x00",  # nobody's
    ],
)
def test_no_tag_is_interpreted_however_deep_it_lies(tagged: bytes) -> None:
    for encoded in (tagged, b"\xa1\x61a\x82\x01" + tagged, b"\x82\x78\x18" + b"\xc2" * 24 + tagged):
        with pytest.raises(RemoteWireError, match="CBOR tag at byte"):
            frame.unpack(framed(encoded))


def test_bytes_that_look_like_tags_are_left_alone() -> None:
    header: dict[str, object] = {"digest": b"\xc2" * 300, "text": "Â" * 40, "number": 0xC2C2C2C2, "real": -2.5e300}
    assert frame.unpack(frame.pack(1, header))[1] == header


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=60), st.integers(0, 255))
def test_any_header_is_parsed_or_refused_and_nothing_else(header: bytes, kind: int) -> None:
    with contextlib.suppress(RemoteWireError):
        frame.unpack(framed(header, kind=kind))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=20) | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.text(max_size=8), json_like, max_size=4), st.binary(max_size=100))
def test_what_is_packed_is_unpacked_unless_it_nests_too_deep(header: dict[str, object], body: bytes) -> None:
    payload = frame.pack(3, header, body)
    if depth(header) > 8:
        with pytest.raises(RemoteWireError, match="nesting"):
            frame.unpack(payload)
    else:
        kind, unpacked, rest = frame.unpack(payload)
        assert (kind, unpacked, bytes(rest)) == (3, header, body)


def depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)

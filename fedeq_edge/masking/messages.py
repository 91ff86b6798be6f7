"""The messages of a masked sum, in the order of their sending, and their way to and from bytes.

    device -> server   Keys     -> Shares              -> Masked              -> Reveal
    server -> device        Roster        -> Delivery            -> Survivors

What there is one of per member stands in roster order, in slots of equal size; slots of oneself and of members that
have fallen out are zeros. They travel as MessagePack arrays, decoded straight into these structs: nothing but the
declared fields is ever built, and every field has its limit.
"""

from typing import Annotated, Final, TypeVar

import msgspec

from fedeq_edge.consensus.masked import MEMBERS_LEAST
from fedeq_edge.errors import RemoteWireError
from fedeq_edge.masking.keys import KEY_BYTES, TAG_BYTES
from fedeq_edge.masking.shamir import ELEMENT_BYTES
from fedeq_edge.masking.terms import MEMBERS_MOST

BOX_BYTES: Final = 2 * ELEMENT_BYTES + TAG_BYTES  # a share of the pairwise key and one of the self mask, sealed
COMMITMENT_BYTES: Final = 16
PROOF_BYTES_MOST: Final = 2048  # a P-256 certificate has 0.5 to 1 kB, its signature 72 bytes
_VECTOR_BYTES_MOST: Final = 2**32 - 1  # what MessagePack can say; Terms.vector_bytes is the exact size

PublicKey = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
Bitmap = Annotated[bytes, msgspec.Meta(max_length=MEMBERS_MOST // 8)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


class Message(msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages: a struct without behaviour."""


class Keys(Message, frozen=True, kw_only=True):
    """A device's public keys for this session: one for masks, one for sealed shares. proof: of an identity."""

    mask: PublicKey
    seal: PublicKey
    proof: Annotated[bytes, msgspec.Meta(max_length=PROOF_BYTES_MOST)] = b""


class Member(Message, frozen=True, kw_only=True):
    """A device of the roster."""

    device: Name
    keys: Keys


class Roster(Message, frozen=True, kw_only=True):
    """Who takes part; the place in it, from 0, is a member's number and its share's point, less 1."""

    members: Annotated[tuple[Member, ...], msgspec.Meta(min_length=MEMBERS_LEAST, max_length=MEMBERS_MOST)]


class Shares(Message, frozen=True, kw_only=True):
    """A device's two secrets, shared among the roster: sealed boxes of 48 bytes, and commitments to both shares.

    commitments: 16 + 16 bytes a member, digests of the share of the pairwise key and of that of the self mask, by which
    the server tells a wrong share when it is revealed.
    """

    boxes: Annotated[bytes, msgspec.Meta(max_length=BOX_BYTES * MEMBERS_MOST)]
    commitments: Annotated[bytes, msgspec.Meta(max_length=2 * COMMITMENT_BYTES * MEMBERS_MOST)]


class Delivery(Message, frozen=True, kw_only=True):
    """The boxes that `senders` sealed for one device."""

    senders: Bitmap
    boxes: Annotated[bytes, msgspec.Meta(max_length=BOX_BYTES * MEMBERS_MOST)]


class Masked(Message, frozen=True, kw_only=True):
    """A device's vector under its masks, packed to Terms.width bits a value."""

    vector: Annotated[bytes, msgspec.Meta(max_length=_VECTOR_BYTES_MOST)]


class Survivors(Message, frozen=True, kw_only=True):
    """Whose masked vectors are in the sum; the other senders of shares have dropped out."""

    survivors: Bitmap


class Reveal(Message, frozen=True, kw_only=True):
    """One share of 16 bytes a member: of a survivor's self mask, of the pairwise key of one that dropped out."""

    shares: Annotated[bytes, msgspec.Meta(max_length=ELEMENT_BYTES * MEMBERS_MOST)]


M = TypeVar("M", bound=Message)


def encode(message: Message) -> bytes:
    """The bytes of a message: equal messages, equal bytes."""
    return msgspec.msgpack.encode(message)


def decode(content: bytes | memoryview, kind: type[M]) -> M:
    """The message in `content`. Raises RemoteWireError where it is no such message."""
    try:
        return msgspec.msgpack.decode(content, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise RemoteWireError(f"{kind.__name__.lower()} message of a masked sum: {error}") from error


def bitmap(numbers: set[int], members: int) -> bytes:
    """The set as one bit a member, the lowest first."""
    return sum(1 << number for number in numbers).to_bytes(-(-members // 8), "little")


def numbers(bitmap: bytes, members: int) -> set[int]:
    """The set in a bitmap. Raises RemoteWireError where it is not of a roster of that size."""
    whole = int.from_bytes(bitmap, "little")
    if len(bitmap) != -(-members // 8) or whole >> members:
        raise RemoteWireError(f"bitmap {bitmap[:16].hex()} does not fit a masked sum of {members} devices")
    return {number for number in range(members) if whole >> number & 1}


def check_slots(content: bytes, size: int, members: int, what: str) -> None:
    """`content` has one slot of `size` bytes a member. Raises RemoteWireError on any other length."""
    if len(content) != size * members:
        raise RemoteWireError(f"{what} have {len(content)} bytes, {members} devices need {size * members}")


def slot(content: bytes, size: int, number: int) -> bytes:
    """What `content` has for one member."""
    return content[number * size : (number + 1) * size]

"""The roster of a session with all that follows from it, computed alike by its devices and by the server."""

import hashlib
from dataclasses import dataclass
from typing import Literal

from fedeq_edge.errors import RemoteWireError
from fedeq_edge.masking.messages import COMMITMENT_BYTES, Keys, Roster, encode
from fedeq_edge.masking.terms import Terms

Kind = Literal[b"key", b"self"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A checked roster under its terms. context: 32 bytes, equal only where roster and session are."""

    roster: Roster
    terms: Terms
    context: bytes
    quorum: int
    bits: int

    @classmethod
    def of(cls, roster: Roster, terms: Terms) -> "Group":
        """The group. Raises RemoteWireError for a name or key that stands twice, ConfigError for too many members."""
        names = {member.device for member in roster.members}
        keys = {key for member in roster.members for key in (member.keys.mask, member.keys.seal)}
        if len(names) < len(roster.members) or len(keys) < 2 * len(roster.members):
            raise RemoteWireError("roster of a masked sum names a device or a key twice")
        return cls(
            roster=roster,
            terms=terms,
            context=hashlib.sha256(terms.session + encode(roster)).digest(),
            quorum=terms.quorum(len(roster.members)),
            bits=terms.width(len(roster.members)),
        )

    @property
    def size(self) -> int:
        """Members of the roster."""
        return len(self.roster.members)

    def keys(self, number: int) -> Keys:
        """The public keys of a member."""
        return self.roster.members[number].keys

    def commitment(self, share: bytes, kind: Kind, dealer: int, holder: int) -> bytes:
        """16 bytes that bind a dealer to a share and, as a share is 127 random bits, tell nothing about it."""
        where = kind + dealer.to_bytes(2, "little") + holder.to_bytes(2, "little")
        return hashlib.sha256(self.context + where + share).digest()[:COMMITMENT_BYTES]

"""What all parties of a masked sum agree on before it begins."""

import math
from dataclasses import dataclass
from typing import Final

from fedeq_edge.consensus.masked import MEMBERS_LEAST
from fedeq_edge.errors import ConfigError

SESSION_BYTES: Final = 32
# The sealed shares of n members are 48 n^2 bytes at the server, 48 MB for 1024; larger fleets sum in groups.
MEMBERS_MOST: Final = 1024
_WORD_BITS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The agreement, checked when made (ConfigError).

    session: 32 bytes, never used before (sha256 of run, round and attempt); every key hangs on it, so that nothing of
    one session means anything in another. length: values of a vector. bound: no |value| is above it.
    bits: width of a masked value, 8 to 64; None takes the fewest that hold the sum of all members.
    threshold: share of the roster that must take part to the end, above a half and at most 1. Above a half because a
    server that lies about who dropped out needs that many answers twice, once for each kind of share.
    """

    session: bytes
    length: int
    bound: int
    bits: int | None = None
    threshold: float = 2 / 3

    def __post_init__(self) -> None:
        if len(self.session) != SESSION_BYTES:
            raise ConfigError(f"masking session has {len(self.session)} bytes, give the {SESSION_BYTES} of a sha256")
        for field in ("length", "bound"):
            if getattr(self, field) < 1:
                raise ConfigError(f"masking {field} is {getattr(self, field)}; give a whole number above 0")
        if self.bits is not None and not 8 <= self.bits <= _WORD_BITS:
            raise ConfigError(f"masking bits is {self.bits}; give 8 to {_WORD_BITS}, or leave it out")
        if not 0.5 < self.threshold <= 1.0:
            raise ConfigError(f"masking threshold is {self.threshold}; give a share above 0.5, at most 1")

    def quorum(self, members: int) -> int:
        """How many of a roster of `members` must answer at every step, at least 3 and above a half."""
        return max(MEMBERS_LEAST, math.ceil(round(self.threshold * members, 9)))  # 2/3 of 300 is 200, not 201

    def width(self, members: int) -> int:
        """Bits of a masked value that hold the sum of `members` vectors with its sign. Raises ConfigError."""
        least = (self.bound * members).bit_length() + 1
        width = self.bits or least
        if not least <= width <= _WORD_BITS:
            raise ConfigError(
                f"the sum of {members} vectors with values up to {self.bound} takes {least} bits, masking has "
                f"{min(width, _WORD_BITS)}; lower the bound or the number of devices"
            )
        return max(width, 8)

    def vector_bytes(self, members: int) -> int:
        """Size of a masked vector, packed."""
        return -(-self.length * self.width(members) // 8)

"""Chunked transfer with resume, sans-IO: an `Outgoing` blob and an `Incoming` one, joined by acknowledgements.

Theory of operation. A blob is cut into blocks of 8 kB, and the receiver answers with a bitmap of the blocks it holds.
A message carries a run of consecutive blocks: one where connections break every few seconds, because a message that is
cut off is lost whole; many where they last, because every message costs both sides and the broker. `Link` finds out
which, by two rules. What is acknowledged fast doubles the window; a connection that breaks with something in the air
halves it, and leaves at most an eighth of what had been carried since the break before. So a break costs about an
eighth of what goes through between two, whatever the link, and a packet over a limit that the broker keeps to itself
costs one connection and not the transfer.

The newest bitmap is the truth: a receiver that lost its memory says so by a bitmap with fewer blocks. A transfer is
named by the sha256 of the whole blob, so a repeated or reordered run is harmless.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Final

from fedeq_edge.errors import RemoteWireError

BLOCK_BYTES: Final = 8192  # an eighth of a second at 64 kB/s
DIGEST_BYTES: Final = 32
WINDOW_BLOCKS: Final = 64  # 512 kB in the air: what a megabyte a second carries in the half second called fast
START_BLOCKS: Final = (
    4  # 32 kB before anything is known: half a second at 64 kB/s, and the most that the first break costs
)
FAST_S: Final = 0.5
SLOW_S: Final = 4.0  # halved well before the ten seconds after which a run is taken for lost (protocol/transfers.py)
PACKET_LIMIT_BYTES: Final = 131_072  # where the broker has told none: AWS IoT Core's, the lowest of the large clouds
ENVELOPE_BYTES: Final = 256  # of a packet: MQTT header, topic (at most 145), frame and header of a chunk
_SHARE: Final = 8  # of what a connection carries, that its break may cost


def digest(blob: bytes | bytearray | memoryview) -> bytes:
    """sha256 of a blob, the name of its transfer."""
    return hashlib.sha256(blob).digest()


def block_count(size: int) -> int:
    """How many blocks a blob of `size` bytes (at least 1) takes."""
    return -(-size // BLOCK_BYTES)


def whole(size: int) -> bytes:
    """Bitmap of a blob of `size` bytes of which every block is there."""
    return _as_bitmap((1 << block_count(size)) - 1, size)


@dataclass(slots=True)
class Link:
    """What is known of the way to the other side: it outlives transfers and connections.

    packet_limit: the broker's, bytes, None where it has told none. sent_bytes, repeated_bytes: of all blocks, and of
    those sent before; without envelopes.
    """

    packet_limit: int | None = None
    sent_bytes: int = 0
    repeated_bytes: int = 0
    window: int = START_BLOCKS  # blocks that may wait for their acknowledgement
    _ceiling: int = WINDOW_BLOCKS
    _carried: int = 0  # blocks acknowledged since the last break

    @property
    def run(self) -> int:
        """Blocks that one message carries at most.

        Two runs share a small window, so that a slow link never idles for an acknowledgement; a larger window was
        earned by fast ones, and fewer messages cost less.
        """
        limit = PACKET_LIMIT_BYTES if self.packet_limit is None else self.packet_limit
        fits = max(1, (limit - ENVELOPE_BYTES) // BLOCK_BYTES)
        return min(fits, self.window if self.window > START_BLOCKS else -(-self.window // 2))

    def carried(self, blocks: int, in_air: int, waited_s: float) -> None:
        """A run of `blocks` was acknowledged `waited_s` after it left, when `in_air` blocks were on their way with it.

        The window follows what was tried: it doubles `in_air`, not itself.
        """
        self._carried += blocks
        self._ceiling = min(WINDOW_BLOCKS, max(self._ceiling, self._carried // _SHARE))
        if waited_s < FAST_S:
            self.window = min(self._ceiling, max(self.window, 2 * in_air))
        elif waited_s > SLOW_S:
            self.window = max(1, min(self.window, in_air // 2))

    def broke(self) -> None:
        """The connection, or the other side, was lost with blocks in the air."""
        self._ceiling = max(1, min(WINDOW_BLOCKS, self._carried // _SHARE))
        self.window = max(1, min(self.window // 2, self._ceiling))
        self._carried = 0


@dataclass(frozen=True, slots=True)
class _Run:
    """Blocks in the air. mask: their bits; in_air: blocks on their way when it had left."""

    mask: int
    in_air: int
    sent_at: float


@dataclass(slots=True)
class Outgoing:
    """A blob on its way out over `link`. Sets of blocks are integers, block i is bit i."""

    blob: bytes
    link: Link
    name: bytes = b""  # its sha256, if that is known already
    _all: int = field(init=False)
    _held: int = 0
    _sent: int = 0
    _flying: list[_Run] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = self.name or digest(self.blob)
        self._all = (1 << block_count(len(self.blob))) - 1

    @property
    def done(self) -> bool:
        """Whether the receiver holds every block."""
        return self._held == self._all

    @property
    def bitmap(self) -> bytes:
        """The receiver's blocks as it has told them last."""
        return _as_bitmap(self._held, len(self.blob))

    def due(self, now: float) -> list[tuple[int, bytes]]:
        """(first block, bytes) of the runs to send now; they are in the air from here on."""
        runs = []
        while (chosen := self._next_run()) is not None:
            first, count = chosen
            mask = _mask(first, count)
            self.link.sent_bytes += self._bytes_of(mask)
            self.link.repeated_bytes += self._bytes_of(mask & self._sent)
            self._sent |= mask
            self._flying.append(_Run(mask, self._in_air().bit_count() + count, now))
            runs.append((first, self.blob[first * BLOCK_BYTES : (first + count) * BLOCK_BYTES]))
        return runs

    def acknowledge(self, bitmap: bytes, now: float) -> None:
        """Take the receiver's bitmap of what it holds. Raises RemoteWireError on a bitmap of another length."""
        blocks = block_count(len(self.blob))
        if len(bitmap) != -(-blocks // 8):
            raise RemoteWireError(f"bitmap has {len(bitmap)} bytes, {blocks} blocks need {-(-blocks // 8)}")
        self._held = int.from_bytes(bitmap, "little") & self._all
        arrived = [run for run in self._flying if not run.mask & ~self._held]
        self._flying = [run for run in self._flying if run.mask & ~self._held]
        for run in arrived:
            self.link.carried(run.mask.bit_count(), run.in_air, now - run.sent_at)

    def restart(self) -> None:
        """Nothing is in the air any more: the connection that carried it is gone, or nobody has answered."""
        if self._flying:
            self._flying.clear()
            self.link.broke()

    def _in_air(self) -> int:
        mask = 0
        for run in self._flying:
            mask |= run.mask
        return mask

    def _next_run(self) -> tuple[int, int] | None:
        """(first block, blocks) of the next run, None where nothing is missing or the window has no room for it."""
        in_air = self._in_air()
        missing = self._all & ~(self._held | in_air)
        if not missing:
            return None
        first = (missing & -missing).bit_length() - 1
        ahead = missing >> first
        together = (~ahead & (ahead + 1)).bit_length() - 1  # how many ones ahead begins with
        count = min(together, self.link.run)
        return (first, count) if in_air.bit_count() + count <= self.link.window else None

    def _bytes_of(self, mask: int) -> int:
        missing_of_last = -len(self.blob) % BLOCK_BYTES if mask > self._all >> 1 else 0
        return mask.bit_count() * BLOCK_BYTES - missing_of_last


@dataclass(slots=True)
class Incoming:
    """A blob on its way in. `size` (at least 1) has been checked against a limit by whoever opens the transfer."""

    name: bytes
    size: int
    _held: int = 0
    _content: bytes | bytearray = b""  # allocated when the first run comes; bytes where that is the whole

    def add(self, first_block: int, piece: bytes | memoryview) -> None:
        """Keep a run of blocks. Raises RemoteWireError where place or length do not fit the announced size."""
        blocks = block_count(self.size)
        if not 0 <= first_block < blocks:
            raise RemoteWireError(f"block {first_block} of a transfer that has {blocks}")
        start = first_block * BLOCK_BYTES
        end = start + len(piece)
        if not piece or end > self.size or (end < self.size and end % BLOCK_BYTES):
            raise RemoteWireError(f"{len(piece)} bytes from block {first_block} of a transfer of {self.size} bytes")
        if len(piece) == self.size:
            self._content = bytes(piece)
        else:
            self._fill(start, piece)
        self._held |= _mask(first_block, block_count(len(piece)))

    def _fill(self, start: int, piece: bytes | memoryview) -> None:
        if not isinstance(self._content, bytearray):
            self._content = bytearray(self._content or self.size)
        self._content[start : start + len(piece)] = piece

    @property
    def bitmap(self) -> bytes:
        """One bit a block held, lowest bit first."""
        return _as_bitmap(self._held, self.size)

    @property
    def complete(self) -> bool:
        """Whether every block is here (the digest is not yet checked)."""
        return self._held.bit_count() == block_count(self.size)

    def blob(self) -> bytes:
        """The whole. Raises RemoteWireError where its sha256 is not the transfer's name."""
        if digest(self._content) != self.name:
            raise RemoteWireError(f"transfer of {self.size} bytes has another sha256 than its name")
        return bytes(self._content)


def _mask(first: int, count: int) -> int:
    return ((1 << count) - 1) << first


def _as_bitmap(held: int, size: int) -> bytes:
    return held.to_bytes(-(-block_count(size) // 8), "little")

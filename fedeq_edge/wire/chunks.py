"""Chunked transfer with resume, sans-IO: an `Outgoing` blob and an `Incoming` one, joined by acknowledgements.

A blob is cut into chunks of at most 64 kB, because cloud brokers refuse larger packets and a chunk must pass well
within the keepalive on the slowest link. The receiver answers every chunk with the bitmap of what it holds; the sender
keeps at most `WINDOW` chunks unacknowledged. After a reconnect the sender begins again from the last bitmap.
A transfer is named by the sha256 of the whole blob, so a repeated or reordered chunk is harmless.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Final

from fedeq_edge.errors import RemoteWireError

CHUNK_BYTES: Final = 65_536 - 256  # with frame, header and topic the packet stays below 64 kB
WINDOW: Final = 8  # unacknowledged chunks a transfer, half a megabyte
DIGEST_BYTES: Final = 32


def digest(blob: bytes | memoryview) -> bytes:
    """sha256 of a blob, the name of its transfer."""
    return hashlib.sha256(blob).digest()


def chunk_count(size: int) -> int:
    """How many chunks a blob of `size` bytes (at least 1) takes."""
    return -(-size // CHUNK_BYTES)


@dataclass(slots=True)
class Outgoing:
    """A blob on its way out."""

    blob: bytes
    name: bytes = b""
    _acknowledged: set[int] = field(default_factory=set)
    _in_flight: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.name = digest(self.blob)

    @property
    def done(self) -> bool:
        """Whether the receiver holds every chunk."""
        return len(self._acknowledged) == chunk_count(len(self.blob))

    def restart(self) -> None:
        """Forget what is in flight: the connection that carried it is gone."""
        self._in_flight.clear()

    def due(self) -> list[tuple[int, bytes]]:
        """(index, bytes) of the chunks to send now; they count as in flight from here on."""
        waiting = (i for i in range(chunk_count(len(self.blob))) if i not in self._acknowledged | self._in_flight)
        free = WINDOW - len(self._in_flight)
        chosen = [index for index, _ in zip(waiting, range(free), strict=False)]
        self._in_flight.update(chosen)
        return [(i, self.blob[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES]) for i in chosen]

    def acknowledge(self, bitmap: bytes) -> None:
        """Take the receiver's bitmap of what it holds. Raises RemoteWireError on a bitmap of another length."""
        count = chunk_count(len(self.blob))
        if len(bitmap) != -(-count // 8):
            raise RemoteWireError(f"bitmap has {len(bitmap)} bytes, {count} chunks need {-(-count // 8)}")
        held = {i for i in range(count) if bitmap[i // 8] >> (i % 8) & 1}
        self._acknowledged |= held
        self._in_flight -= held


@dataclass(slots=True)
class Incoming:
    """A blob on its way in. `size` has been checked against a limit by whoever opens the transfer."""

    name: bytes
    size: int
    _chunks: dict[int, bytes] = field(default_factory=dict)

    def add(self, index: int, chunk: bytes) -> None:
        """Keep one chunk. Raises RemoteWireError where index or length do not fit the announced size."""
        count = chunk_count(self.size)
        if not 0 <= index < count:
            raise RemoteWireError(f"chunk {index} of a transfer that has {count}")
        expected = CHUNK_BYTES if index < count - 1 else self.size - (count - 1) * CHUNK_BYTES
        if len(chunk) != expected:
            raise RemoteWireError(f"chunk {index} has {len(chunk)} bytes, expected {expected}")
        self._chunks[index] = chunk

    @property
    def bitmap(self) -> bytes:
        """One bit a chunk held, lowest bit first."""
        bits = bytearray(-(-chunk_count(self.size) // 8))
        for index in self._chunks:
            bits[index // 8] |= 1 << (index % 8)
        return bytes(bits)

    @property
    def complete(self) -> bool:
        """Whether every chunk is here (the digest is not yet checked)."""
        return len(self._chunks) == chunk_count(self.size)

    def blob(self) -> bytes:
        """The whole. Raises RemoteWireError where its sha256 is not the transfer's name."""
        whole = b"".join(self._chunks[i] for i in range(chunk_count(self.size)))
        if digest(whole) != self.name:
            raise RemoteWireError(f"transfer of {self.size} bytes has another sha256 than its name")
        return whole

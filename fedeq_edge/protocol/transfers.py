"""The aggregator's transfers: the consensus on its way out to devices, contributions on their way in.

Bookkeeping only: what goes out is returned, what comes in whole is returned, and time is an argument. Both sides are
bounded: a device has one transfer in each direction, and one that does not move is forgotten.
"""

import random
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from fedeq_edge.errors import RemoteWireError
from fedeq_edge.protocol.state import vector_digest
from fedeq_edge.training.step import Vector
from fedeq_edge.wire import chunks, coding, messages

RETRY_S: Final = 10.0  # a transfer that nobody has acknowledged for so long is begun again
UPLOAD_IDLE_S: Final = 60.0  # six retries of the device: an upload that has not moved since is forgotten

T = TypeVar("T")
Pieces = list[tuple[messages.Chunk, bytes]]


@dataclass(slots=True)
class Publication:
    """The consensus in force as blobs: whole, and as a coded difference to the one before it."""

    run: str
    z_hat: Vector
    round: int = 0
    base: bytes = field(init=False)  # digest of z_hat
    _whole: bytes = b""  # made when first asked for
    _step: bytes = b""
    _step_base: bytes = b""

    def __post_init__(self) -> None:
        self.base = vector_digest(self.z_hat)

    def advance(self, difference: Vector, codec: coding.Codec, round_number: int) -> Vector:
        """z_hat has moved by what every client decodes of `difference`, which is returned (algorithm.md, coding)."""
        body = coding.encode(codec, difference, random.Random(f"{self.run}/{round_number}"))
        decoded = coding.decode(codec, body, difference.size)
        self._step_base, self.round = self.base, round_number
        self.z_hat = self.z_hat + decoded
        self.base, self._whole = vector_digest(self.z_hat), b""
        self._step = self._blob(body, codec, self._step_base)
        return decoded

    def blob_for(self, held: bytes) -> bytes:
        """The consensus for a device that holds the one with digest `held` (empty: none)."""
        if self._step and held == self._step_base:
            return self._step
        if not self._whole:
            self._whole = self._blob(coding.encode("f32", self.z_hat), "f32", b"")
        return self._whole

    def _blob(self, body: bytes, codec: coding.Codec, base: bytes) -> bytes:
        message = messages.Model(
            run=self.run, round=self.round, model=self.base, base=base, codec=codec, length=self.z_hat.size
        )
        return messages.encode(message, body)


@dataclass(slots=True)
class _Transfer(Generic[T]):
    what: T
    progress_at: float


@dataclass(slots=True)
class Downloads:
    """Blobs on their way to devices."""

    _of: dict[str, _Transfer[chunks.Outgoing]] = field(default_factory=dict)

    def begin(self, device: str, blob: bytes, now: float) -> Pieces:
        """The first pieces to send; an earlier transfer to this device is forgotten."""
        self._of[device] = _Transfer(chunks.Outgoing(blob), now)
        return _pieces(self._of[device].what)

    def acknowledged(self, device: str, ack: messages.ChunkAck, now: float) -> Pieces:
        """The pieces that the window now allows. Raises RemoteWireError on a bitmap that does not fit."""
        transfer = self._of.get(device)
        if transfer is None or ack.transfer != transfer.what.name:
            return []
        transfer.what.acknowledge(ack.bitmap)
        transfer.progress_at = now
        if transfer.what.done:
            del self._of[device]
        return _pieces(transfer.what)

    def stalled(self, now: float) -> list[tuple[str, Pieces]]:
        """(device, pieces to send again) where nothing was acknowledged for `RETRY_S`."""
        again = []
        for device, transfer in self._of.items():
            if now - transfer.progress_at >= RETRY_S:
                transfer.what.restart()
                transfer.progress_at = now
                again.append((device, _pieces(transfer.what)))
        return again

    def forget(self, device: str) -> None:
        """This device is gone; it asks again when it is back."""
        self._of.pop(device, None)

    def clear(self) -> None:
        """The connection that carried them is gone."""
        self._of.clear()


@dataclass(slots=True)
class Uploads:
    """Contributions on their way in; `limit_bytes` bounds each of them before anything is kept."""

    limit_bytes: int
    _of: dict[str, _Transfer[chunks.Incoming]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._of)

    def add(self, device: str, chunk: messages.Chunk, body: memoryview, now: float) -> tuple[bytes, chunks.Incoming]:
        """(bitmap of what we hold, the transfer); a complete one is no longer kept here.

        Raises RemoteWireError where the size is over the limit or the chunk does not fit its transfer.
        """
        if chunk.size > self.limit_bytes:
            raise RemoteWireError(f"upload of {chunk.size} bytes, a contribution has at most {self.limit_bytes}")
        known = self._of.get(device)
        if known is not None and (known.what.name, known.what.size) == (chunk.transfer, chunk.size):
            incoming = known.what
        else:
            incoming = chunks.Incoming(chunk.transfer, chunk.size)
        incoming.add(chunk.index, bytes(body))
        self._of[device] = _Transfer(incoming, now)
        if incoming.complete:
            del self._of[device]
        return incoming.bitmap, incoming

    def forget_idle(self, now: float) -> None:
        """Uploads that have not moved for `UPLOAD_IDLE_S` take no more memory."""
        for device in [name for name, upload in self._of.items() if now - upload.progress_at >= UPLOAD_IDLE_S]:
            del self._of[device]

    def forget(self, device: str) -> None:
        """This device is gone; it sends again when it is back."""
        self._of.pop(device, None)


def _pieces(outgoing: chunks.Outgoing) -> Pieces:
    size = len(outgoing.blob)
    return [(messages.Chunk(transfer=outgoing.name, index=index, size=size), piece) for index, piece in outgoing.due()]

"""The aggregator's transfers: the consensus on its way out to devices, contributions on their way in.

Bookkeeping only: what goes out is returned, what comes in whole is returned, and time is an argument. A device has one
transfer in each direction. What all of them may take, of our memory on the way in and of the broker's on the way out,
is bounded: a thousand devices that ask at once get their turns one after the other, first come, first served.
"""

from dataclasses import dataclass, field
from typing import Final

from fedeq_edge.errors import RemoteWireError
from fedeq_edge.wire import chunks, messages

RETRY_S: Final = 10.0  # a transfer that nobody has acknowledged for so long is begun again
IDLE_S: Final = 60.0  # six retries of the device: one that has not moved since gives its turn to those who wait
AWAY_S: Final = 600.0  # what nobody waits for is kept for a device that loses its connection and comes back
TOTAL_BYTES: Final = 4 * 2**20  # ten uploads of 100,000 float32 values at a time: more would only wait in line
_WINDOW_BYTES: Final = chunks.WINDOW_BLOCKS * chunks.BLOCK_BYTES

Pieces = list[tuple[messages.Chunk, bytes]]


@dataclass(slots=True)
class Turns:
    """Bytes that transfers may take together, given to devices first come, first served.

    Nobody overtakes: a large transfer at the head waits until it fits, those behind it wait with it.
    """

    total_bytes: int
    taken_bytes: int = 0
    _given: dict[str, int] = field(default_factory=dict)
    _queue: dict[str, int] = field(default_factory=dict)  # in the order of asking

    def __contains__(self, device: str) -> bool:
        return device in self._given

    def __len__(self) -> int:
        return len(self._given)

    @property
    def waiting(self) -> int:
        """Devices that wait for their turn."""
        return len(self._queue)

    def ask(self, device: str, size: int) -> bool:
        """Whether the device has `size` bytes now; else it waits for them, in the place where it waited before.

        size: at most `total_bytes`. What it had for an earlier transfer it keeps if that was enough, or gives back.
        """
        if self._given.get(device, 0) >= size:
            return True
        self._give_back(device)
        if not self._queue and self.taken_bytes + size <= self.total_bytes:
            self._give(device, size)
        else:
            self._queue[device] = size
        return device in self._given

    def leave(self, device: str) -> None:
        """The device needs nothing any more."""
        self._give_back(device)
        self._queue.pop(device, None)

    def come(self) -> list[str]:
        """The devices whose turn has come since."""
        called = []
        while self._queue:
            device, size = next(iter(self._queue.items()))
            if self.taken_bytes + size > self.total_bytes:
                break
            del self._queue[device]
            self._give(device, size)
            called.append(device)
        return called

    def _give(self, device: str, size: int) -> None:
        self._given[device] = size
        self.taken_bytes += size

    def _give_back(self, device: str) -> None:
        self.taken_bytes -= self._given.pop(device, 0)


@dataclass(slots=True)
class _Download:
    outgoing: chunks.Outgoing
    moved_at: float  # something was acknowledged, or its turn came
    tried_at: float


class Downloads:
    """Blobs on their way to devices. total_bytes: of the windows that are open at one time.

    What is known of a device's link, and how far its last transfer had come, outlives its connections: so a device
    that never stays for a whole blob has it in the end.
    """

    def __init__(self, total_bytes: int = TOTAL_BYTES) -> None:
        self._of: dict[str, _Download] = {}
        self._links: dict[str, chunks.Link] = {}
        self._broken_off: dict[str, tuple[bytes, bytes]] = {}  # (name, bitmap) of each device's unfinished transfer
        self._turns = Turns(max(total_bytes, _WINDOW_BYTES))
        self._packet_limit: int | None = None
        self._named: tuple[bytes, bytes] = (b"", chunks.digest(b""))  # the last blob, which all want, and its name

    def __len__(self) -> int:
        return len(self._turns)

    def __contains__(self, device: str) -> bool:
        return device in self._of

    @property
    def waiting(self) -> int:
        """Devices that have asked and get nothing yet."""
        return self._turns.waiting

    @property
    def repeated_bytes(self) -> int:
        """Bytes that were sent again, to all devices."""
        return sum(link.repeated_bytes for link in self._links.values())

    def begin(self, device: str, blob: bytes, now: float) -> Pieces:
        """The first pieces to send, none where the device must wait; an earlier transfer to it has ended."""
        self._break_off(device)
        link = self._links.setdefault(device, chunks.Link(packet_limit=self._packet_limit))
        outgoing = chunks.Outgoing(blob, link, self._name(blob))
        name, bitmap = self._broken_off.get(device, (b"", b""))
        if name == outgoing.name:
            outgoing.acknowledge(bitmap, now)
        self._of[device] = _Download(outgoing, moved_at=now, tried_at=now)
        return _pieces(outgoing, now) if self._turns.ask(device, min(len(blob), _WINDOW_BYTES)) else []

    def grants(self, now: float) -> list[tuple[str, Pieces]]:
        """(device, first pieces to send) where a turn has come."""
        called = self._turns.come()
        for device in called:
            self._of[device].moved_at = self._of[device].tried_at = now
        return [(device, _pieces(self._of[device].outgoing, now)) for device in called]

    def acknowledged(self, device: str, ack: messages.ChunkAck, now: float) -> Pieces:
        """The pieces that the window now allows. Raises RemoteWireError on a bitmap that does not fit."""
        download = self._of.get(device)
        if download is None or ack.transfer != download.outgoing.name:
            return []
        download.outgoing.acknowledge(ack.bitmap, now)
        download.moved_at = download.tried_at = now
        if download.outgoing.done:
            del self._of[device]
            self._broken_off.pop(device, None)
            self._turns.leave(device)
            return []
        return _pieces(download.outgoing, now) if device in self._turns else []

    def stalled(self, now: float) -> list[tuple[str, Pieces]]:
        """(device, pieces to send again) where nothing was acknowledged for `RETRY_S`.

        One that has not moved for `IDLE_S` while others wait, or for `AWAY_S`, is forgotten instead.
        """
        again = []
        for device in [name for name in self._of if name in self._turns]:
            download = self._of[device]
            if now - download.moved_at >= _patience_s(self._turns):
                self.forget(device)
            elif now - download.tried_at >= RETRY_S:
                download.outgoing.restart()
                download.tried_at = now
                again.append((device, _pieces(download.outgoing, now)))
        return again

    def forget(self, device: str) -> None:
        """This device is gone; it asks again when it is back, and gets the rest."""
        self._break_off(device)
        self._turns.leave(device)

    def clear(self, packet_limit: int | None = None) -> None:
        """The connection that carried them is gone; the next one has this limit."""
        for device in list(self._of):
            self.forget(device)
        self._packet_limit = packet_limit
        for link in self._links.values():
            link.packet_limit = packet_limit

    def _name(self, blob: bytes) -> bytes:
        if self._named[0] is not blob:
            self._named = blob, chunks.digest(blob)
        return self._named[1]

    def _break_off(self, device: str) -> None:
        download = self._of.pop(device, None)
        if download is not None:
            download.outgoing.restart()
            self._broken_off[device] = (download.outgoing.name, download.outgoing.bitmap)


@dataclass(slots=True)
class _Upload:
    incoming: chunks.Incoming
    moved_at: float  # a block came that was not here, or its turn came

    def is_of(self, transfer: bytes, size: int) -> bool:
        return (self.incoming.name, self.incoming.size) == (transfer, size)


class Uploads:
    """Contributions on their way in.

    limit_bytes bounds each of them before anything is kept; total_bytes all that are granted together (and is never
    below one of the largest, or that one would wait for ever). A transfer is offered before it is sent, except for one
    of a single block, which costs nothing to keep.
    """

    def __init__(self, limit_bytes: int, total_bytes: int = TOTAL_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._of: dict[str, _Upload] = {}
        self._turns = Turns(max(total_bytes, limit_bytes))
        self._taken: dict[str, tuple[bytes, bytes]] = {}  # (name, bitmap) of each device's last whole transfer

    def __len__(self) -> int:
        return len(self._turns)

    @property
    def waiting(self) -> int:
        """Offers that wait for their turn."""
        return self._turns.waiting

    @property
    def held_bytes(self) -> int:
        """Memory that is granted, whether it is filled yet or not."""
        return self._turns.taken_bytes

    def offer(self, device: str, transfer: bytes, size: int, now: float) -> bytes | None:
        """Bitmap of what we hold if the device may send, None while it must wait; repeated offers keep their place.

        An earlier transfer of this device is dropped. Raises RemoteWireError where the size is over the limit.
        """
        self._check_size(size)
        self._taken.pop(device, None)
        upload = self._of.get(device)
        if upload is None or not upload.is_of(transfer, size):
            upload = self._of[device] = _Upload(chunks.Incoming(transfer, size), now)
        return upload.incoming.bitmap if self._turns.ask(device, size) else None

    def grants(self, now: float) -> list[tuple[str, bytes, bytes]]:
        """(device, transfer, bitmap) of the offers whose turn has come since."""
        called = self._turns.come()
        for device in called:
            self._of[device].moved_at = now
        uploads = [(device, self._of[device].incoming) for device in called]
        return [(device, incoming.name, incoming.bitmap) for device, incoming in uploads]

    def add(
        self, device: str, transfer: bytes, size: int, first_block: int, body: bytes | memoryview, now: float
    ) -> tuple[bytes, bytes | None]:
        """(bitmap of what we hold, the whole blob as its last block comes); from then on it is the caller's.

        Raises RemoteWireError where the size is over the limit, nobody has granted the transfer, the run does not fit
        it, or the whole has another sha256 than its name (which leaves nothing of it here).
        """
        self._check_size(size)
        taken, bitmap = self._taken.get(device, (b"", b""))
        if taken == transfer:
            return bitmap, None  # sent again before our last answer had come
        upload = self._upload(device, transfer, size, now)
        before = upload.incoming.bitmap
        upload.incoming.add(first_block, body)
        if upload.incoming.bitmap != before:
            upload.moved_at = now
        return upload.incoming.bitmap, self._finished(device, upload.incoming)

    def forget_idle(self, now: float) -> None:
        """Uploads that have not moved for `IDLE_S` while others wait, or for `AWAY_S`, take no more memory."""
        for device in [name for name in self._of if name in self._turns]:
            if now - self._of[device].moved_at >= _patience_s(self._turns):
                self.forget(device)

    def forget(self, device: str) -> None:
        """This device never comes back, or begins anew. One that lost its connection is better left to come back."""
        self._of.pop(device, None)
        self._taken.pop(device, None)
        self._turns.leave(device)

    def _check_size(self, size: int) -> None:
        if size > self.limit_bytes:
            raise RemoteWireError(f"upload of {size} bytes, a contribution has at most {self.limit_bytes}")

    def _upload(self, device: str, transfer: bytes, size: int, now: float) -> _Upload:
        upload = self._of.get(device)
        if upload is not None and upload.is_of(transfer, size) and device in self._turns:
            return upload
        if chunks.block_count(size) == 1:
            return _Upload(chunks.Incoming(transfer, size), now)
        raise RemoteWireError(f"blocks of an upload of {size} bytes that was not granted; offer it and wait")

    def _finished(self, device: str, incoming: chunks.Incoming) -> bytes | None:
        if not incoming.complete:
            return None
        upload = self._of.get(device)
        if upload is not None and upload.incoming is incoming:
            self.forget(device)
        blob = incoming.blob()
        if chunks.block_count(incoming.size) > 1:  # who sends a single block again asks for its verdict
            self._taken[device] = (incoming.name, incoming.bitmap)
        return blob


def _patience_s(turns: Turns) -> float:
    return IDLE_S if turns.waiting else AWAY_S


def _pieces(outgoing: chunks.Outgoing, now: float) -> Pieces:
    size = len(outgoing.blob)
    return [
        (messages.Chunk(transfer=outgoing.name, index=index, size=size), piece) for index, piece in outgoing.due(now)
    ]

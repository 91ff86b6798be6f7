"""The consensus on its way to a device: as a step told to everybody, or as a blob that the device has asked for."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from fedeq_edge.errors import RemoteWireError
from fedeq_edge.protocol.device_outlet import DeviceOutlet
from fedeq_edge.protocol.ledger import Ledger
from fedeq_edge.protocol.state import vector_digest
from fedeq_edge.wire import chunks, coding, messages

MODEL_LIMIT_BYTES: Final = 64 * 2**20  # largest consensus a device takes: 16 million float32 parameters


@dataclass(slots=True)
class Fetching:
    """How one device comes by the consensus. wanted: digest of the one it waits for, empty where it waits for none."""

    ledger: Ledger
    out: DeviceOutlet
    wanted: bytes = b""
    _incoming: chunks.Incoming | None = None
    _wants_whole: bool = False  # a difference did not decode to the consensus that was asked for

    def ask(self, task: messages.Task, now: float) -> None:
        """The consensus of this task is asked for, once."""
        if self.wanted != task.model:
            self.wanted = task.model
            self.out.moved_at = now
            base = b"" if self._wants_whole else self.ledger.state.base
            self.out.send(messages.Fetch(run=task.run, model=task.model, base=base))

    def stop(self) -> None:
        """Nothing is waited for. What has come of a blob is kept: it goes on there if the same is asked for again."""
        self.wanted = b""

    def step(self, model: messages.Model, body: memoryview) -> bool:
        """Whether this step, told to everybody at once, starts from what we hold; if so, we hold where it leads.

        Who stands elsewhere asks when it has a task. Raises RemoteWireError as `_take` does.
        """
        state = self.ledger.state
        if model.run != state.run or not model.base or model.base != state.base:
            return False
        self._take(model, body)
        if model.model == self.wanted:
            self.stop()
        return True

    def chunk(self, chunk: messages.Chunk, body: memoryview, now: float) -> bool:
        """Keep a run of blocks and acknowledge it; whether it was the last, and we hold what the blob leads to.

        Raises RemoteWireError for a run that does not fit its blob, and for a blob that is none or not a consensus.
        """
        if not self.wanted:
            return False
        if chunk.size > MODEL_LIMIT_BYTES:
            raise RemoteWireError(f"consensus of {chunk.size} bytes is over the limit of {MODEL_LIMIT_BYTES}")
        incoming = self._opened(chunk)
        incoming.add(chunk.index, body)
        self.out.moved_at = now
        self.out.send(messages.ChunkAck(transfer=chunk.transfer, bitmap=incoming.bitmap))
        if not incoming.complete:
            return False
        self._incoming = None
        return self._whole(incoming.blob())

    def _opened(self, chunk: messages.Chunk) -> chunks.Incoming:
        """The blob that this run is of; an earlier one is dropped."""
        incoming = self._incoming
        if incoming is None or incoming.name != chunk.transfer or incoming.size != chunk.size:
            incoming = self._incoming = chunks.Incoming(chunk.transfer, chunk.size)
        return incoming

    def _whole(self, blob: bytes) -> bool:
        """Whether we hold what was fetched: the consensus that our task names, or a step on the way there."""
        received = messages.decode(blob)
        model = received.message
        if not isinstance(model, messages.Model):
            raise RemoteWireError(f"transfer holds a {type(model).__name__.lower()} message, not a consensus")
        if model.model != self.wanted and (not model.base or model.base != self.ledger.state.base):
            return False  # the rest of an older transfer, repeated by the broker
        self._take(model, received.body)
        self.stop()
        return True

    def _take(self, model: messages.Model, body: memoryview) -> None:
        """Hold the consensus that `model` leads to. Raises RemoteWireError where it does not lead to what it says."""
        held, shared = self.ledger.state, self.ledger.shared
        known = None if shared is None else shared.consensus.get(model.model)
        if known is not None and known.size == model.length and model.base in (b"", held.base):
            self._wants_whole = False
            self.ledger.stand(known, model.model)
            return
        z = coding.decode(model.codec, body, model.length)
        if model.base:
            if model.base != held.base or z.size != held.z.size:
                raise RemoteWireError("consensus is coded against a base that we do not hold")
            with np.errstate(over="ignore"):  # an overflow shows in the digest
                z = held.z + z
        if vector_digest(z) != model.model:
            self._wants_whole = True  # a step does not lead us there; ask for the value itself
            raise RemoteWireError("decoded consensus has another digest than its message names")
        self._wants_whole = False
        self.ledger.stand(z, model.model)

"""A device's memory of its federation: its state, and a log of what became of the rounds since it was written.

    client.state     the whole state at one moment, sealed, and how far the log below is part of it
    outbox/N.log     records of storage/contributions.py: each contribution with the head that was trained with it, and
                     each verdict

A round writes what it sends, once, and one word for the verdict, instead of state vectors; on flash that is a fraction
of the wear. Reading it back moves the dual by the same contributions again. A verdict is not made durable by itself: if
a power cut takes it, the contribution is offered again, and the aggregator repeats its verdict.
"""

from pathlib import Path
from typing import Final

import msgspec

from fedeq_edge import structs
from fedeq_edge.consensus.fixed import WHOLE, fixed_penalty, penalty_of
from fedeq_edge.errors import StateError
from fedeq_edge.protocol.actions import Keep, Save, Settle
from fedeq_edge.protocol.state import ClientState, Pending, settled
from fedeq_edge.storage.contributions import FIRST, ContributionLog, Place, Record
from fedeq_edge.storage.files import load, save
from fedeq_edge.training.step import Vector

# Some rounds of small contributions, one of large ones. The next file is made where the whole state is written anyway.
_FILE_BYTES: Final = 2**20
_PENDING: Final = "pending"
_ACCEPTED: Final = "accepted"
_REFUSED: Final = "refused"


class _Saved(msgspec.Struct, frozen=True, kw_only=True):
    state: ClientState
    held: Place


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    head: Vector
    blob: bytes
    transfer: bytes
    masked: bool = False
    revealed: bool = False


class ClientFolder:
    """A device's memory. Raises StateError where the folder is damaged."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "client.state"
        saved = load(self._path, _Saved)
        self._log = ContributionLog(folder / "outbox", saved.held if saved else FIRST, file_bytes=_FILE_BYTES)

    def load(self) -> ClientState:
        """The state as it was written, moved on by what the log holds beyond it; a new one without a federation."""
        saved = load(self._path, _Saved)
        state = saved.state if saved else ClientState()
        for _, record in self._log.journal():
            state = _moved(state, record)
        return state

    def write(self, action: Save | Keep | Settle) -> None:
        """What a client's machine asks for is done."""
        if isinstance(action, Save):
            self.save(action.state)
        elif isinstance(action, Keep):
            self.keep(action.pending, action.head)
        else:
            self.settle(accepted=action.accepted, factor=action.factor)

    def save(self, state: ClientState) -> None:
        """Keep this state; the log begins anew."""
        held = self._log.end
        save(self._path, _Saved(state=state, held=held))
        self._log.begin(held)
        self._log.delete_all_but(())

    def keep(self, pending: Pending, head: Vector) -> None:
        """The contribution and the head are on the disk."""
        blob = structs.pack(
            _Kept(
                head=head,
                blob=pending.blob,
                transfer=pending.transfer,
                masked=pending.masked,
                revealed=pending.revealed,
            )
        )
        self._log.append(Record(device=_PENDING, round=pending.round, kappa=fixed_penalty(pending.kappa), blob=blob))
        self._log.commit()

    def settle(self, *, accepted: bool, factor: int = WHOLE) -> None:
        """The verdict is kept over a kill of this process, and over a power cut with the next contribution."""
        word = _ACCEPTED if accepted else _REFUSED
        self._log.append(Record(device=word, round=0, kappa=0, blob=b"", factor=factor))


def _moved(state: ClientState, record: Record) -> ClientState:
    if record.device != _PENDING:
        return settled(state, accepted=record.device == _ACCEPTED, factor=record.factor)
    try:
        kept = structs.unpack(record.blob, _Kept)
    except (msgspec.ValidationError, ValueError) as error:
        raise StateError(f"outbox: the contribution for round {record.round} is damaged ({error})") from error
    pending = Pending(
        round=record.round,
        kappa=penalty_of(record.kappa),
        blob=kept.blob,
        transfer=kept.transfer,
        masked=kept.masked,
        revealed=kept.revealed,
    )
    return msgspec.structs.replace(state, pending=pending, head=kept.head)

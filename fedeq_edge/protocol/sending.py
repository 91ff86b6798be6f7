"""A device's contribution on its way out: as it lies on the disk, or made unreadable in a masked sum."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from fedeq_edge.consensus.fixed import WHOLE
from fedeq_edge.errors import ContributionError, WireError
from fedeq_edge.protocol.device_outlet import DeviceOutlet
from fedeq_edge.protocol.ledger import Ledger
from fedeq_edge.protocol.state import Pending
from fedeq_edge.wire import chunks, messages

if TYPE_CHECKING:
    from fedeq_edge.protocol.masked_device import Answer, Part


@dataclass(slots=True)
class Sending:
    """The way of the pending contribution of one device. can_mask: whether this machine can be in a masked sum."""

    device: str
    can_mask: bool
    link: chunks.Link
    ledger: Ledger
    out: DeviceOutlet
    _outgoing: chunks.Outgoing | None = None
    _part: "Part | None" = None  # in the masked sum of the newest task

    @property
    def under_way(self) -> bool:
        """Whether a contribution is in the air, or waits there for its verdict."""
        return self._outgoing is not None

    # The blob

    def go_on(self, now: float) -> str | None:
        """The pending contribution is under way, or waits for its masked sum; why it cannot be sent, where it cannot.

        Then it is settled already, as one that does not count.
        """
        pending = self.ledger.state.pending
        if pending is None or self._outgoing is not None:
            return None
        if not pending.masked:
            self._begin(chunks.Outgoing(pending.blob, self.link, pending.transfer), now)
        elif self._part is not None and self._part.ready and self._part.round == pending.round:
            return self._go_masked(self._part, pending, now)
        return None

    def repeat(self, now: float) -> None:
        """What nobody has acknowledged goes out again, on a new connection or after a silence."""
        if self._outgoing is not None:
            self._outgoing.restart()
            self._offer(self._outgoing, now)

    def acknowledged(self, ack: messages.ChunkAck, now: float) -> None:
        """What the window now allows has been sent. Raises RemoteWireError on a bitmap that does not fit."""
        if self._outgoing is not None and ack.transfer == self._outgoing.name:
            self._outgoing.acknowledge(ack.bitmap, now)
            self.out.moved_at = now
            self._send_chunks(self._outgoing, now)

    def arrived(self, now: float) -> None:
        """The verdict is here, which says that all of it had come."""
        if self._outgoing is not None:
            self._outgoing.acknowledge(b"\xff" * len(self._outgoing.bitmap), now)
            self.stop()

    def stop(self) -> None:
        """Nothing is under way any more."""
        self._outgoing = None

    def forget(self) -> None:
        """Nothing is under way, and we are in no sum."""
        self._outgoing = self._part = None

    def settle(self, *, accepted: bool, factor: int = WHOLE) -> None:
        """The pending contribution is settled, and with it our part in its sum."""
        pending = self.ledger.state.pending
        if self._part is not None and pending is not None and self._part.round == pending.round:
            self._part = None  # the secrets of a sum that is made, or that we are not in
        self.ledger.settle(accepted=accepted, factor=factor)

    def _begin(self, outgoing: chunks.Outgoing, now: float) -> None:
        self._outgoing = outgoing
        self._offer(outgoing, now)

    def _offer(self, outgoing: chunks.Outgoing, now: float) -> None:
        """Ask to send the contribution, and from where; one that fits a block needs no asking."""
        self.out.moved_at = now
        size = len(outgoing.blob)
        if size > chunks.BLOCK_BYTES:
            self.out.send(messages.Offer(transfer=outgoing.name, size=size))
        else:
            self._send_chunks(outgoing, now)

    def _send_chunks(self, outgoing: chunks.Outgoing, now: float) -> None:
        size = len(outgoing.blob)
        for index, piece in outgoing.due(now):
            self.out.send(messages.Chunk(transfer=outgoing.name, index=index, size=size), piece)

    # The masked sum

    def take_part(self, task: messages.Task) -> str | None:
        """We are in the masked sum of this task, if it wants one; why we cannot be, where we cannot."""
        self._settle_by(task)
        state, terms = self.ledger.state, task.masking
        if terms is None or task.round <= state.accepted_round or self._is_of(terms.session):
            return None
        if not self.can_mask:
            return "its rounds are masked: pip install 'fedeq-edge[masking]' on this device"
        if state.pending is not None and state.pending.round == task.round and state.pending.revealed:
            return "its contribution may be in a sum already, and must not be in two"
        from fedeq_edge.protocol.masked_device import Part  # noqa: PLC0415  # cryptography, where it is needed

        self._part, self._outgoing = Part(self.device, task.round, terms), None
        self.out.send(*self._part.keys())
        return None

    def asked_again(self, task: messages.Task) -> None:
        """Our keys have been sent again if this task is of the sum that we are in: they may have been lost."""
        if self._part is not None and task.masking is not None and self._is_of(task.masking.session):
            self.out.send(*self._part.keys())

    def hear(self, step: messages.MaskingStep, body: memoryview) -> bool:
        """Our answer to this step has been sent, if it needs one; whether it is of the sum that we are in.

        If not, the sum was given up, or we have dropped out of it by a restart. Raises RemoteWireError where the step
        breaks a rule.
        """
        if self._part is None or not self._is_of(step.session):
            return False
        answer = self._part.hear(step, body)
        if answer is not None:
            self._note_reveal(answer)
            self.out.send(*answer)
        return True

    def _is_of(self, session: bytes) -> bool:
        return self._part is not None and self._part.session == session

    def _settle_by(self, task: messages.Task) -> None:
        """The sum is made, and its verdict was lost: a later task says what has counted."""
        pending = self.ledger.state.pending
        if pending is not None and pending.masked and (task.final or task.round > pending.round):
            self.settle(accepted=task.after >= pending.round)
            self.stop()

    def _note_reveal(self, answer: "Answer") -> None:
        """A reveal makes a sum known. Two over different devices tell their difference, so that we are in no other."""
        pending = self.ledger.state.pending
        if answer[0].step == "reveal" and pending is not None and not pending.revealed:
            self.ledger.hold(msgspec.structs.replace(pending, revealed=True), self.ledger.state.head)

    def _go_masked(self, part: "Part", pending: Pending, now: float) -> str | None:
        try:
            self._begin(chunks.Outgoing(part.mask(pending), self.link), now)
        except (WireError, ContributionError) as error:
            self.settle(accepted=False)
            return str(error)
        return None

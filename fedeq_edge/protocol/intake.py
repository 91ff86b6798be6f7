"""What comes in as a contribution is checked against what was asked, decoded, and counted once.

A device may be broken or hostile: every claim is compared with what the aggregator itself knows (run, round, base,
length, codec, penalty of the task) before the body is decoded, and nothing has changed where one does not hold.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.consensus.fixed import WHOLE
from fedeq_edge.errors import ContributionError, RemoteWireError, StateError
from fedeq_edge.protocol.federation import Federation
from fedeq_edge.protocol.state import AggregatorState, dual_name
from fedeq_edge.training.step import Vector
from fedeq_edge.wire import coding, messages
from fedeq_edge.wire.frame import FRAME_BYTES, HEADER_LIMIT_BYTES

FindBlob = Callable[[str, int], bytes | None]
"""The stored contribution of (device, round), if there still is one."""
MASKED_VALUE_BYTES: Final = 8  # at most: sums are made modulo 2^64, or less
LARGEST_STEP: Final = 1e6  # of one parameter: a training that diverged


@dataclass(frozen=True, slots=True)
class Taken:
    """A contribution that counts. kappa, factor: with what it does; None for kappa where it had counted before."""

    message: messages.Contribution
    kappa: float | None
    factor: int


@dataclass(slots=True)
class Intake:
    """The gate before the consensus; it moves `consensus` and `state`, and sends nothing."""

    federation: Federation
    consensus: Consensus
    state: AggregatorState
    _size: int = field(init=False)  # of a difference

    def __post_init__(self) -> None:
        self._size = self.consensus.z_hat.size

    @property
    def limit_bytes(self) -> int:
        """Of a contribution with its frame: what an upload may claim at most."""
        body = max(coding.largest_bytes(codec, self._size) for codec in self.federation.up)
        if self.federation.masking is not None:
            body = max(body, self._size * MASKED_VALUE_BYTES)
        return FRAME_BYTES + HEADER_LIMIT_BYTES + body

    def codec_for(self, birth: messages.Birth) -> coding.Codec | None:
        """The first of the federation's codecs that this device speaks, None without one."""
        return coding.choose(self.federation.up, birth.codecs)

    def take(self, device: str, received: messages.Received, transfer: bytes) -> Taken:
        """The contribution that was `received` counts from here on, or has before. transfer: sha256 of its blob.

        Raises ContributionError where it is refused.
        """
        message = messages.contribution(received)
        member = self.state.members.get(device)
        if member is not None and message.run == self.state.run and message.round <= member.accepted_round:
            return Taken(message, None, member.factor if message.round == member.accepted_round else WHOLE)
        kappa = self.check(device, message)
        factor = self.consensus.accept(device, self._difference(device, received), kappa)
        self._remember(device, message, kappa, factor, transfer)
        return Taken(message, kappa, factor)

    def settle(self, device: str, number: int, transfer: bytes) -> None:
        """The contribution of this device to round `number` has counted, in a sum. transfer: sha256 of its blob."""
        member = self.state.members[device]
        member.accepted_round, member.transfer, member.factor = number, transfer, WHOLE

    def take_back(self, device: str, blob: bytes) -> None:
        """A contribution that was taken since the last close does not count: the sums are as if it had never come."""
        received = messages.decode(blob)
        number = messages.contribution(received).round
        kappa = self.state.issued[number][device]
        self.consensus.retract(device, self._difference(device, received), kappa)
        for table in (self.state.contributed, self.state.late):
            table.pop(device, None)
        self.state.accepted = [entry for entry in self.state.accepted if entry[:2] != (device, number)]

    def differences(self, blob_of: FindBlob) -> Iterator[tuple[str, Vector]]:
        """(device, difference) of what has been accepted since the last close, read again one after the other."""
        for device, number, _ in self.state.accepted:
            blob = blob_of(device, number)
            if blob is None:
                raise StateError(f"contribution of device {device} for round {number} is missing on the disk")
            yield device, self._difference(device, messages.decode(blob))

    def _difference(self, device: str, received: messages.Received) -> Vector:
        message = messages.contribution(received)
        try:
            difference = coding.decode(message.codec, received.body, message.length)
        except RemoteWireError as error:
            raise ContributionError("size_or_nan", f"device {device}: {error}") from error
        largest = max(float(difference.max()), -float(difference.min()))
        if largest > LARGEST_STEP:
            raise ContributionError(
                "too_large", f"device {device}: a parameter moved by {largest:.3g}, at most {LARGEST_STEP:.0g} is taken"
            )
        return difference

    def _remember(
        self, device: str, message: messages.Contribution, kappa: float, factor: int, transfer: bytes
    ) -> None:
        member = self.state.members[device]
        member.accepted_round, member.transfer, member.factor = message.round, transfer, factor
        if self.federation.method.keeps_duals:
            member.dual = dual_name(member.dual, message.round, kappa, factor, member.transfer)
        current = self.state.open and message.round == self.state.round
        (self.state.contributed if current else self.state.late)[device] = message.metrics
        self.state.accepted.append((device, message.round, self.consensus.weights(device)[0]))

    def check(self, device: str, message: messages.Contribution) -> float:
        """kappa of the task that this contribution answers. Raises ContributionError naming what is wrong."""
        state = self.state
        where = f"device {device}: contribution for round {message.round}"
        if state.status != "running" or message.run != state.run:
            raise ContributionError("run", f"{where} of run {message.run!r}; run {state.run!r} does not take it now")
        if message.round not in state.bases:
            oldest = min(state.bases, default=state.round)
            raise ContributionError("round", f"{where}; rounds {oldest} to {state.round} are taken now")
        if bool(message.session) != (self.federation.masking is not None):
            raise ContributionError(
                "masking", f"{where} is {'masked' if message.session else 'not masked'}; rounds here are the other way"
            )
        if self.federation.privacy is not None:
            self._check_first(device, message.round)
        kappa = state.issued.get(message.round, {}).get(device)
        if kappa is None:
            raise ContributionError("not_asked", f"{where}, which did not ask it")
        if message.base != state.bases[message.round]:
            raise ContributionError("digest", f"{where} starts from another consensus than that round's")
        if message.length != self._size or message.codec not in self.federation.up:
            raise ContributionError(
                "wrong_shape",
                f"{where} has {message.length} values as {message.codec}, expected {self._size} as "
                f"{' or '.join(self.federation.up)}; was it started with another model file?",
            )
        return kappa

    def _check_first(self, device: str, number: int) -> None:
        """It answers the open round, and for the first time: more of a device in one sum than the noise hides."""
        state = self.state
        if not (state.open and number == state.round):
            raise ContributionError(
                "late",
                f"device {device}: contribution for round {number} came after the close of that private round",
            )
        if device in state.contributed:
            raise ContributionError("twice", f"device {device}: it is in the private sum of round {number} already")

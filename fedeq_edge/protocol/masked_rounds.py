"""The aggregator's side of a masked round: one sum over the cohort of the open round, of which it sees nothing else.

    keys ──> shares ──> masked ──────────> reveal ──> the sum
    a new session       the rounds' own    survivors told and on disk
                        deadline, quorum

Bookkeeping over the round (rounds.py) and the session (masking/): time is an argument, nothing is sent.

Theory of operation
-------------------
The exchange of keys and shares runs while the devices train. Who does not answer in `step_s` has dropped out of the
session and is not waited for. Nothing of a session is on disk until its survivors are to be told: a killed aggregator
begins another one, and the devices mask what they have trained again. From then on it must be this sum or none
(masking/server.py), so `AggregatorState.revealing` is in the snapshot that stands before the word goes out; no
contribution has been acknowledged as counting until the sum is unmasked, closed and in the next snapshot.
"""

import hashlib
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final, Literal

from fedeq_edge.consensus.fixed import largest
from fedeq_edge.consensus.masked import Masking
from fedeq_edge.consensus.quality import Weights
from fedeq_edge.consensus.records import PartialSum
from fedeq_edge.errors import ConfigError, ContributionError, MaskingError
from fedeq_edge.masking import Keys, Masked, MaskingServer, Message, Reveal, Shares, Terms, decode, encode
from fedeq_edge.protocol.rounds import Rounds
from fedeq_edge.protocol.state import AggregatorState, Revealing
from fedeq_edge.protocol.transfers import RETRY_S
from fedeq_edge.wire import messages

_ANSWERS: Final[dict[str, type[Message]]] = {"keys": Keys, "shares": Shares, "reveal": Reveal}
_SUM_BITS: Final = 64  # with the sign
Prompt = tuple[messages.MaskingStep, bytes]


@dataclass(slots=True)
class MaskedRounds:
    """Masked sums of one federation, one at a time. boot: as in `Aggregator`."""

    masking: Masking
    rounds: Rounds
    state: AggregatorState
    boot: str
    attempt: int = 0
    trouble: str = ""  # why the exchange does not go on
    barred: set[str] = field(default_factory=set)  # devices that have spoiled a sum since this process began
    _session: bytes = b""
    _server: MaskingServer | None = None
    _weights: dict[str, Weights] = field(default_factory=dict)
    _transfers: dict[str, bytes] = field(default_factory=dict)
    _prompts: dict[str, Prompt] = field(default_factory=dict)  # what each device is to answer in this step
    _expected: set[str] = field(default_factory=set)
    _left_out: set[str] = field(default_factory=set)  # by us, because they did not answer in time
    _asked_at: dict[str, float] = field(default_factory=dict)
    _step_at: float = 0.0

    # Sessions

    def begin(self, now: float) -> None:
        """Another sum for the cohort of the open round; what came to an earlier one is void."""
        state, consensus = self.state, self.rounds.consensus
        self.attempt += 1
        self._session = _session_of(state.run, state.round, self.boot, self.attempt)
        self._weights = self._fitting({device: consensus.weights(device) for device in state.cohort})
        self._server = MaskingServer(
            Terms(
                session=self._session,
                length=consensus.z_hat.size,
                bound=self._bound,
                threshold=self.masking.threshold,
            )
        )
        state.contributed, state.revealing, self._transfers = {}, None, {}
        self._left_out = set()
        self._ask({}, self._weights, now)

    def _fitting(self, weights: dict[str, Weights]) -> dict[str, Weights]:
        """Those who make a sum of 64 bits together; the heaviest stay out, and so does who has spoiled one."""
        for device in self.barred & weights.keys():
            self.rounds.decline(device, "it has spoiled a masked sum")
            del weights[device]
        bounds = {device: self.masking.bound(*weight) for device, weight in weights.items()}
        while bounds and (max(bounds.values()) * len(bounds)).bit_length() >= _SUM_BITS:
            heaviest = max(bounds, key=lambda device: (bounds[device], device))
            reason = "its weight leaves no room in a masked sum: lower schedule.samples_limit, or masking.limit"
            self.rounds.decline(heaviest, reason)
            del bounds[heaviest], weights[heaviest]
        return weights

    def resume(self, now: float) -> None:
        """The sum whose survivors may have been told goes on; any other begins anew."""
        saved = self.state.revealing
        if saved is None:
            self.begin(now)
            return
        self.attempt, self._session = saved.attempt, saved.session
        self._weights = {device: Weights(*pair) for device, pair in saved.weights.items()}
        self._transfers = dict(saved.transfers)
        self._server = server = MaskingServer.restore(saved.server)
        self._ask_for_reveals(server, now)

    @property
    def _bound(self) -> int:
        return max((self.masking.bound(*weights) for weights in self._weights.values()), default=1)

    def takes(self, device: str) -> bool:
        """Whether the sum of the open round still waits for a contribution of this device."""
        return self.state.open and device in self._weights and not self.revealing

    def terms(self, device: str) -> messages.MaskingTerms:
        """What the device needs, with its task."""
        return messages.MaskingTerms(
            session=self._session,
            omega=self._weights[device].omega,
            bound=self._bound,
            limit=self.masking.bound(1, self._weights[device].penalty),
            length=self.rounds.consensus.z_hat.size,
            threshold=self.masking.threshold,
        )

    # What devices answer

    def hear(self, device: str, step: messages.MaskingStep, body: memoryview) -> None:
        """The answer of a device to the present step counts; a repeated one, or one of another session, is passed over.

        Raises ContributionError where it is refused, RemoteWireError where it is no answer at all.
        """
        server = self._server
        kind = _ANSWERS.get(step.step)
        if server is None or kind is None or step.session != self._session:
            return
        answer: Message = decode(body, kind)
        if isinstance(answer, Keys) and server.phase != "keys":
            if server.keys_of(device) not in (None, answer):
                self.rounds.decline(device, "it began anew in the middle of a masked sum")
        elif server.phase == step.step and device in server.answered:
            return
        elif isinstance(answer, Keys):
            self._add_keys(server, device, answer)
        elif isinstance(answer, Shares):
            server.add_shares(device, answer)
        elif isinstance(answer, Reveal):
            server.add_reveal(device, answer)

    def _add_keys(self, server: MaskingServer, device: str, keys: Keys) -> None:
        if device not in self._weights or device not in self.state.cohort:
            raise ContributionError("not_asked", f"device {device}: keys for a round that did not ask it")
        server.add_keys(device, keys)

    def holds(self, transfer: bytes) -> bool:
        """Whether a masked contribution with this digest is in the sum."""
        return transfer in self._transfers.values()

    def take(self, device: str, received: messages.Received, transfer: bytes) -> None:
        """A masked contribution is in the sum. Raises ContributionError, "session" where its sum was given up."""
        message = messages.contribution(received)
        where = f"device {device}: contribution for round {message.round}"
        server = self._server
        current = self.state.open and message.round == self.state.round
        if current and message.session != self._session:
            raise ContributionError("session", f"{where} is masked for a sum that was given up")
        if server is None or not current or server.phase != "masked":
            raise ContributionError("late", f"{where} came after its masked sum was closed")
        server.add_masked(device, Masked(vector=bytes(received.body)))
        self._transfers[device] = transfer
        self.state.contributed[device] = message.metrics

    # Time

    def silent(self, now: float) -> list[str]:
        """Devices that have not answered for `RETRY_S`; a vector takes as long as training does."""
        server = self._server
        if server is None or server.phase == "masked":
            return []
        return [device for device in sorted(self._missing(server)) if now - self._asked_at.get(device, now) >= RETRY_S]

    def prompt(self, device: str, now: float) -> Prompt | None:
        """What this device is to answer now; None where it is nothing, or the task itself, which asks for keys."""
        self._asked_at[device] = now
        server = self._server
        return None if server is None or device in server.answered else self._prompts.get(device)

    def advance(self, now: float) -> list[str]:
        """Close a step of the exchange that everybody has answered, or that has lasted `step_s`; whom to prompt.

        Below the quorum it stays open: the deadline of the round begins another sum.
        """
        server = self._server
        if server is None or server.phase not in ("keys", "shares"):
            return []
        missing = self._missing(server)
        if missing and now - self._step_at < self.masking.step_s:
            return []
        try:
            prompts = self._closed_keys(server) if server.phase == "keys" else self._closed_shares(server)
        except (MaskingError, ConfigError) as error:
            self.trouble = str(error)
            return []
        self._left_out |= missing
        for device in missing:
            self.rounds.decline(device, f"it did not answer within {self.masking.step_s:g} s in the masked sum")
        self._ask(prompts, prompts, now)
        return sorted(prompts)

    def _closed_keys(self, server: MaskingServer) -> dict[str, Prompt]:
        needed = math.ceil(self.masking.threshold * len(self._expected - self.rounds.declined.keys()))
        if len(server.answered) < needed:
            raise MaskingError(f"masked sum: {len(server.answered)} devices sent keys, {needed} are needed")
        roster = server.close_keys()
        body = encode(roster)
        return {member.device: self._prompt("roster", body) for member in roster.members}

    def _closed_shares(self, server: MaskingServer) -> dict[str, Prompt]:
        return {
            device: self._prompt("delivery", encode(delivery)) for device, delivery in server.close_shares().items()
        }

    def close(self, now: float) -> bool:
        """Whether no contribution comes to the sum any more: it is the one of this round, once it is on disk.

        False where it would be a sum of too few.
        """
        server = self._server
        willing = self._weights.keys() - (self.rounds.declined.keys() - self._left_out)
        if server is None or len(self._transfers) < math.ceil(self.rounds.federation.schedule.quorum * len(willing)):
            return False
        try:
            server.close_masked()
        except MaskingError as error:
            self.trouble = str(error)
            return False
        self.state.revealing = Revealing(
            session=self._session,
            attempt=self.attempt,
            server=server.snapshot(),
            weights={device: (weights.omega, weights.penalty) for device, weights in self._counted().items()},
            transfers=dict(self._transfers),
        )
        self._ask_for_reveals(server, now)
        return True

    def _counted(self) -> dict[str, Weights]:
        return {device: self._weights[device] for device in self._transfers}

    def _ask_for_reveals(self, server: MaskingServer, now: float) -> None:
        body = encode(server.survivors)
        prompts = {device: self._prompt("survivors", body) for device in self._transfers}
        self._ask(prompts, prompts, now)

    def _prompt(self, step: Literal["roster", "delivery", "survivors"], body: bytes) -> Prompt:
        return messages.MaskingStep(session=self._session, step=step), body

    def _ask(self, prompts: dict[str, Prompt], expected: Collection[str], now: float) -> None:
        """A step begins, in which the `expected` devices answer."""
        self._prompts, self._expected, self._step_at, self.trouble = prompts, set(expected), now, ""
        self._asked_at = dict.fromkeys(expected, now)

    def _missing(self, server: MaskingServer) -> set[str]:
        return self._expected - server.answered - self.rounds.declined.keys()

    # The end

    @property
    def revealing(self) -> bool:
        """Whether the survivors are known, so that it is this sum or none."""
        return self.state.revealing is not None

    @property
    def complete(self) -> bool:
        """Whether the sum can be unmasked."""
        return self._server is not None and self._server.complete

    def failed(self, now: float, deadline_s: float) -> MaskingError | None:
        """Why the sum will never be unmasked: shares that do not fit, or too few who have revealed in so long."""
        server = self._server
        if server is None or not self.revealing:
            return None
        if server.unsound:
            named = ", ".join(server.unsound)
            return MaskingError(
                f"the shares of {named} do not fit what was committed to; left out from here on", server.unsound
            )
        if now - self._step_at >= deadline_s:
            return MaskingError("too few of its devices stayed to the end of their masked sum")
        return None

    def unmask(self) -> tuple[PartialSum, dict[str, bytes], list[str]]:
        """The sum, the sha256 of what each of its devices sent, and what was wrong with shares. Raises MaskingError."""
        saved = self.state.revealing
        if self._server is None or saved is None:
            raise MaskingError("masked sum: none waits to be unmasked")
        result = self._server.unmask()
        most = sum(self.masking.bound(*saved.weights[device]) for device in result.contributors)
        if largest(result.total) > most:
            raise MaskingError("the sum is larger than its devices can make it: shares of somebody's mask were wrong")
        partial = PartialSum(
            steps=result.total,
            weight=sum(omega * penalty for omega, penalty in saved.weights.values()),
            squares=0,  # nobody knows; see Rounds.close
            devices=result.contributors,
        )
        wrong = [f"the share of {dealer} that {holder} holds does not fit" for holder, dealer in result.wrong]
        return partial, saved.transfers, wrong

    def end(self) -> None:
        """The round is closed, and all that is known of its sum is forgotten."""
        self._server, self.state.revealing, self.attempt = None, None, 0
        self._weights, self._prompts, self._expected, self._transfers = {}, {}, set(), {}

    def status(self) -> dict[str, object]:
        """Where the exchange stands, for status.json."""
        server = self._server
        return {
            "step": None if server is None else server.phase,
            "answered": 0 if server is None else len(server.answered),
            "expected": len(self._expected),
            "sessions": self.attempt,
            "trouble": self.trouble,
        }


def _session_of(run: str, round_number: int, boot: str, attempt: int) -> bytes:
    """32 bytes that no other masked sum has. boot: new at every start of the aggregator, which counts its attempts."""
    return hashlib.sha256(f"masked sum {run}/{round_number}/{boot}/{attempt}".encode()).digest()

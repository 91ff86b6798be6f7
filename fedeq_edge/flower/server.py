"""The server's side of a federation whose rounds somebody else drives: rounds, checks and sums, no Flower in it.

Theory of operation
-------------------
It is our aggregator (protocol/aggregator.py) for an engine that asks and gets one answer: the same `Rounds`, `Intake`,
`Publication` and `Consensus`, with the transfers left out. What goes to a device and comes back, as protocol messages:

    ->  verdict on its last contribution (none before), task, steps of the consensus from the one that it holds
    <-  contribution, or a refusal in words (`Decline`); before a contribution `Differs` where it has lost its dual

A verdict travels with the next task, so a device moves its dual one message late, and the task names the dual that it
must have come to. A device that has another one begins with nu = 0 and says so: its old share leaves the sums first.
Which consensus a device holds is known from its last good answer; after any trouble it gets a whole one again.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.consensus.duals import MemoryDuals
from fedeq_edge.deq.layout import constraints
from fedeq_edge.errors import ConfigError, ContributionError, RemoteWireError
from fedeq_edge.gateway import federation_of
from fedeq_edge.protocol.aggregator import new_state
from fedeq_edge.protocol.intake import Intake
from fedeq_edge.protocol.publication import Publication
from fedeq_edge.protocol.roster import Roster
from fedeq_edge.protocol.rounds import Rounds
from fedeq_edge.settings import AggregatorSettings
from fedeq_edge.training.step import Vector
from fedeq_edge.wire import chunks, messages
from fedeq_edge.wire.frame import FRAME_BYTES, HEADER_LIMIT_BYTES

Frames = Sequence[bytes]
"""Encoded messages in order."""
M = TypeVar("M", bound=messages.Message)
# Beside the contribution: the frame of a `Differs`, and the lengths of both.
_BESIDE_BYTES = FRAME_BYTES + HEADER_LIMIT_BYTES + 16


def run_name(chosen: AggregatorSettings) -> str:
    """The name by which tasks of this federation seed what devices draw: the same in every run of it."""
    return f"{chosen.federation}-{chosen.seed}"


def check(chosen: AggregatorSettings) -> None:
    """Raises ConfigError where these settings ask for what Flower's rounds cannot do."""
    method, schedule = chosen.resolved_method(), chosen.schedule
    if not method.exchange:
        raise ConfigError(f"method {method.name} exchanges nothing, so Flower has no rounds to run; choose another")
    if schedule.mode == "async" or schedule.selects:
        raise ConfigError(
            'schedule: Flower asks a cohort and waits for it, and knows no boards: leave out mode = "async", profiles, '
            "battery_percent and data_age_s"
        )
    others = {"privacy": chosen.privacy, "masking": chosen.masking, "workers": chosen.workers, "root": chosen.root}
    for name, value in {**others, "audit": chosen.audit}.items():
        if value:
            raise ConfigError(f"{name} belongs to the aggregator of `fedeq aggregator run`; leave it out with Flower")


class Server:
    """One federation over named devices. Seconds are of a monotonic clock.

    z: the consensus before the first round, (s,) float32. refusals: by code, since the start.
    Raises ConfigError as `check` does.
    """

    def __init__(self, chosen: AggregatorSettings, z: Vector) -> None:
        check(chosen)
        self.federation = federation_of(chosen)
        self.duals = MemoryDuals()
        self.consensus = Consensus(
            z, method=self.federation.method, constraints=constraints(chosen.model), duals=self.duals
        )
        self.refusals: Counter[str] = Counter()
        self._state = new_state(run_name(chosen))
        self._roster = Roster(self.federation.schedule, self._state.denied)
        self._published = Publication(self._state.run, self.consensus.z_hat)
        self._rounds = Rounds(self.federation, self.consensus, self._state, self._roster, self._published)
        self._intake = Intake(self.federation, self.consensus, self._state)
        self._held: dict[str, bytes] = {}  # digest of the consensus that a device has
        self._blobs: dict[str, bytes] = {}  # contributions of the open round, for methods that see them all again

    # ---- devices -------------------------------------------------------------------------------------------

    @property
    def devices(self) -> list[str]:
        """Who is here, in alphabetical order."""
        return self._roster.online

    @property
    def limit_bytes(self) -> int:
        """Of an answer: more is refused before it is read."""
        return self._intake.limit_bytes + _BESIDE_BYTES

    def welcome(self, device: str, frames: Frames) -> None:
        """The device that says this of itself is here. Raises ContributionError or RemoteWireError where it is not."""
        birth = _only(device, frames, messages.Birth)
        limit = self.federation.schedule.samples_limit
        if birth.samples > limit:
            raise ContributionError(
                "samples", f"device {device} claims {birth.samples} samples; raise schedule.samples_limit ({limit})"
            )
        if self._intake.codec_for(birth) is None:
            wanted = " or ".join(self.federation.up)
            raise ContributionError("codec", f"device {device} does not speak {wanted}; update fedeq-edge there")
        self._roster.welcome(device, birth)

    def leave(self, device: str) -> None:
        """It is gone, and a member still: its dual stays in the sums until it comes back."""
        self._roster.leave(device)
        self._held.pop(device, None)

    def may_open(self, now: float) -> bool:
        """Whether enough devices are here for a round."""
        return self._rounds.may_open(now)

    # ---- rounds --------------------------------------------------------------------------------------------

    def open(self, now: float) -> Mapping[str, Frames]:
        """The next round is open; what goes to each device of its cohort."""
        self._rounds.join_newcomers()
        self._rounds.open(now)
        self._blobs.clear()
        return {device: self._frames(device) for device in self._state.cohort}

    def take(self, device: str, frames: Frames) -> None:
        """The answer of this device counts. Raises ContributionError or RemoteWireError where it does not."""
        if len(frames) == 2:
            self._begin_anew(device, _only(device, frames[:1], messages.Differs))
        self._count(device, frames[-1:])

    def drop(self, device: str, why: Exception) -> None:
        """The device sits this round out: it failed, declined, or what it sent is refused."""
        self._held.pop(device, None)
        self.refusals[why.code if isinstance(why, ContributionError) else "failed"] += 1
        if self._state.open:
            self._rounds.decline(device, str(why))

    def close(self, now: float) -> Mapping[str, object]:
        """The consensus has moved by what came; the line for the history (protocol/rounds.py)."""
        for device in set(self._state.cohort) - self._state.contributed.keys():
            self._held.pop(device, None)  # it may hold this round's consensus, or the one before
        line = self._rounds.close(now, lambda: self._intake.differences(lambda device, _: self._blobs.get(device)))
        self._blobs.clear()
        return line

    # ---- the end -------------------------------------------------------------------------------------------

    def final(self) -> Mapping[str, Frames]:
        """What every member that is here gets to make its personal model."""
        members = (device for device in self.devices if device in self.consensus.members)
        return {device: self._frames(device, final=True) for device in members}

    def report(self, device: str, frames: Frames) -> messages.Report:
        """What a device says of its personal model. Raises ContributionError or RemoteWireError."""
        report = _only(device, frames, messages.Report)
        if report.run != self._state.run:
            raise RemoteWireError(f"device {device}: report of run {report.run!r}, this is {self._state.run!r}")
        self._held[device] = self._published.base
        return report

    # ---- private -------------------------------------------------------------------------------------------

    def _frames(self, device: str, *, final: bool = False) -> Frames:
        task = messages.encode(self._task(device, final=final))
        return [*self._verdict(device), task, *self._steps(device)]

    def _verdict(self, device: str) -> Iterator[bytes]:
        member = self._state.members[device]
        if member.accepted_round > 0:
            verdict = messages.Verdict(
                run=self._state.run,
                subject="contribution",
                round=member.accepted_round,
                accepted=True,
                factor=member.factor,
            )
            yield messages.encode(verdict)

    def _task(self, device: str, *, final: bool) -> messages.Task:
        birth, member = self._roster.birth(device), self._state.members[device]
        schedule = self.federation.schedule
        return messages.Task(
            run=self._state.run,
            round=self._state.round + (1 if final else 0),
            model=self._published.base,
            kappa=self._rounds.kappa(device),
            deadline_s=schedule.final_s if final else schedule.deadline_s,
            codec=(birth and self._intake.codec_for(birth)) or self.federation.up[-1],
            after=member.accepted_round,
            duals=member.dual if self.federation.method.server == "fresh" else None,
            final=final,
        )

    def _steps(self, device: str) -> Frames:
        """From the consensus that the device holds to the one in force, or that one whole where it is shorter."""
        steps, held = [], self._held.get(device, b"")
        while held != self._published.base:
            step = self._published.step_from(held, self._published.base) if held else None
            if step is None:
                return [self._published.whole()]
            steps.append(step)
            held = _only(device, [step], messages.Model).model
        whole = self._published.whole()
        return steps if sum(map(len, steps)) <= len(whole) else [whole]

    def _begin_anew(self, device: str, differs: messages.Differs) -> None:
        """The device has trained with nu = 0: what the sums hold of its old dual is out, the task's kappa stands."""
        member, number = self._state.members.get(device), self._state.round
        kappa = self._state.issued.get(number, {}).get(device)
        if member is None or kappa is None or (differs.run, differs.round) != (self._state.run, number):
            raise RemoteWireError(f"device {device}: it differs from a task that it was not given")
        if differs.expected != member.dual:
            raise RemoteWireError(f"device {device}: it differs from another dual than its task named")
        self._rounds.join(device, counted_until=member.accepted_round)
        self._state.issued[number][device] = kappa

    def _count(self, device: str, frames: Frames) -> None:
        message = _only(device, frames, messages.Contribution)
        self._intake.take(device, messages.decode(frames[0]), chunks.digest(frames[0]))
        self._held[device] = message.base
        if self.federation.method.robust in ("trimmed", "median"):
            self._blobs[device] = frames[0]


def _only(device: str, frames: Frames, kind: type[M]) -> M:
    """The one message that these frames are. Raises ContributionError "declined" where it is a refusal instead."""
    found = [messages.decode(frame).message for frame in frames]
    if len(found) == 1 and isinstance(found[0], kind):
        return found[0]
    if len(found) == 1 and isinstance(found[0], messages.Decline):
        raise ContributionError("declined", f"device {device} declines: {found[0].reason}")
    names = ", ".join(type(message).__name__.lower() for message in found) or "nothing"
    raise RemoteWireError(f"device {device} sent {names}, expected one {kind.__name__.lower()} message")

"""The open round: whom it asks, when it closes, and what its close makes of the consensus.

Bookkeeping over the state that survives a crash (`AggregatorState`), the consensus and the roster: time is an
argument, nothing is sent. With `mode = "async"` a round is a version of the consensus: it asks whoever is idle and
closes after so many contributions, those to earlier versions included.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from fedeq_edge.consensus import quality
from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.consensus.masked import MEMBERS_LEAST
from fedeq_edge.consensus.privacy import Accountant, Draw, Release
from fedeq_edge.consensus.records import RoundReport, Share
from fedeq_edge.consensus.robust import Contributions
from fedeq_edge.protocol.federation import Federation
from fedeq_edge.protocol.publication import Publication
from fedeq_edge.protocol.roster import Roster
from fedeq_edge.protocol.schedule import Progress
from fedeq_edge.protocol.state import AggregatorState, MemberState
from fedeq_edge.training.step import Vector
from fedeq_edge.wire.messages import Metrics

GATHER_S: Final = 5.0  # after a connection births come in within a second, one after the other
LARGEST_RESIDUAL: Final = 1e6  # relative, 1 is already no solve at all: its square must stay a number


@dataclass(slots=True)
class Rounds:
    """Rounds of one federation, one after the other."""

    federation: Federation
    consensus: Consensus
    state: AggregatorState
    roster: Roster
    published: Publication
    key: bytes = field(default=b"", repr=False)  # of noise and cohorts, in a private federation
    declined: dict[str, str] = field(default_factory=dict)
    extensions: int = 0
    connected_at: float = 0.0
    _opened_at: float = 0.0
    _deadline_at: float = 0.0

    # Opening

    def resume(self, now: float) -> None:
        """The round that was open when the state was written has its whole time again."""
        self._opened_at, self._deadline_at = now, now + self.federation.schedule.deadline_s

    def may_open(self, now: float) -> bool:
        """Whether a round may open; one that follows a restart is not for the first device alone that is heard."""
        least = self.federation.schedule.min_devices
        if self.state.status == "waiting" and len(self.roster) < least:
            return False  # asked after every birth, so without a look at a thousand devices
        askable = self.roster.askable()
        if self.state.status == "waiting":
            return len(askable) >= least
        complete = set(self.roster.online) >= self.consensus.members.keys()
        return bool(askable) and (complete or now - self.connected_at >= GATHER_S)

    def open(self, now: float) -> None:
        """The next round is open, for a cohort of members."""
        state, schedule = self.state, self.federation.schedule
        devices = self.roster.askable()
        if schedule.mode == "async":
            devices = [device for device in devices if not self._busy(device)]
        cohort = self._cohort(devices, state.round + 1) if devices else ()
        state.status, state.open, state.round, state.cohort = "running", True, state.round + 1, cohort
        self.consensus.open_round(cohort)
        state.bases[state.round] = self.published.base
        state.issued[state.round] = {device: self.consensus.penalty(device) for device in cohort}
        self._forget_old_rounds()
        self.declined, self.extensions = {}, 0
        self.resume(now)

    def join_newcomers(self) -> None:
        """Every device that may be asked is a member."""
        for device in self.roster.askable():
            if device not in self.consensus.members:
                self.join(device, counted_until=-1)

    def join(self, device: str, *, counted_until: int) -> None:
        """The device is a member with nu = 0. What it computed before with another dual cannot count any more."""
        birth = self.roster.birth(device)
        assert birth is not None  # joins are of devices that are here
        self.consensus.join(device, birth.samples)
        self.state.members[device] = MemberState(accepted_round=counted_until)
        before = sum(contributor == device for contributor, _, _ in self.state.accepted)
        self.state.started.append((device, before))
        self.forget_tasks(device)
        if self.state.open and device in self.state.cohort:
            self.state.issued[self.state.round][device] = self.consensus.penalty(device)

    def invite(self, device: str) -> None:
        """A member that is not asked yet, or whose task was forgotten, is asked in the open round."""
        if self.state.open and device not in self.state.issued[self.state.round]:
            self.state.cohort = tuple(dict.fromkeys((*self.state.cohort, device)))
            self.state.issued[self.state.round][device] = self.consensus.penalty(device)

    def leave(self, device: str) -> None:
        """The device is no member any more."""
        self.forget_tasks(device)
        self.state.cohort = tuple(name for name in self.state.cohort if name != device)

    def forget_tasks(self, device: str) -> None:
        """No contribution to a task that this device was given counts."""
        for issued in self.state.issued.values():
            issued.pop(device, None)

    # While it is open

    def owes(self, device: str) -> bool:
        """Whether this device is asked and has not contributed."""
        return self.state.open and device in self.state.cohort and device not in self.state.contributed

    def kappa(self, device: str) -> float:
        """Penalty of this device's task in the open round; the method's before the first."""
        return self.state.issued.get(self.state.round, {}).get(device, self.federation.method.rho)

    def decline(self, device: str, reason: str) -> None:
        """The device sits this round out."""
        self.declined[device] = reason
        if self.federation.schedule.mode == "async":
            self.forget_tasks(device)  # it is idle: the next version asks it again

    def due(self, now: float) -> Literal["close", "extend"] | None:
        """What the open round calls for now."""
        if self.state.draw is not None and not self.state.cohort:
            return "close"  # nobody was drawn, and that is a secret: the sum of nobody goes out under its noise
        progress = Progress(
            cohort=self.state.cohort,
            contributed=self.state.contributed,
            late=self.state.late,
            declined=self.declined,
            deadline_passed=self.overdue(now),
        )
        if progress.closes(self.federation.schedule):
            return "close"
        return "extend" if progress.deadline_passed else None

    def overdue(self, now: float) -> bool:
        """Whether the deadline of the open round has passed."""
        return now >= self._deadline_at

    def extend(self, now: float) -> None:
        """Too few have contributed: wait for another deadline and ask everybody who may be asked."""
        self.extensions += 1
        self._deadline_at = now + self.federation.schedule.deadline_s
        self.declined.clear()
        self.join_newcomers()
        for device in self.roster.askable():
            self.invite(device)
        if self.state.draw is not None:
            self.state.draw = Draw(rate=1.0, expected=float(len(self.state.cohort)))

    # Closing

    def close(self, now: float, contributions: Contributions) -> Mapping[str, object]:
        """The consensus has moved and no round is open; the line for the history.

        contributions: what was accepted since the last close, for methods that must see it all again.
        """
        audit = self._audit() if self.federation.audit else {}
        relaxed = self.federation.schedule.mode == "async"
        report = self.consensus.close_round(
            self._transmit, contributions=contributions, relaxed=relaxed, release=self._release()
        )
        self._move_quality()
        if self.federation.masking is not None:  # nobody has seen a difference
            report = dataclasses.replace(report, primal_residual=math.nan)
        line = {**self._line(report, now), **audit}
        self._end()
        return line

    def hand_over(self, now: float) -> tuple[Share, Mapping[str, object]]:
        """A worker's close: what its root gets, no round is open, and the line for the history."""
        share, report = self.consensus.hand_over()
        self._move_quality()
        line = self._line(report, now)
        self._end()
        return share, line

    def abandon(self) -> None:
        """No round is open, and what came to it is late: a worker's consensus has moved on without it."""
        state = self.state
        state.late, state.contributed = self.arrived(), {}
        state.open, state.cohort = False, ()

    def _end(self) -> None:
        state = self.state
        state.open, state.cohort, state.draw = False, (), None
        state.contributed, state.late, state.accepted, state.started = {}, {}, [], []

    def _transmit(self, difference: Vector) -> Vector:
        return self.published.advance(difference, self.federation.down, self.state.round)

    def arrived(self) -> dict[str, Metrics]:
        """What each device said last with a contribution since the last close."""
        return {**self.state.late, **self.state.contributed}

    def _cohort(self, devices: list[str], number: int) -> tuple[str, ...]:
        privacy, schedule = self.federation.privacy, self.federation.schedule
        if privacy is None:
            return schedule.cohort(devices, number, MEMBERS_LEAST if self.federation.masking else 1)
        cohort, draw = privacy.draw(devices, schedule.fraction, key=self.key, round_number=number)
        # a rate below 1 counts on chance alone, so that nobody can guess who was asked
        self.state.draw = msgspec.structs.replace(draw, rate=1.0) if schedule.selects else draw
        return cohort

    def _release(self) -> Release | None:
        """Of the sum of this round, which is spent from here on; None in a federation that promises nothing."""
        privacy, draw = self.federation.privacy, self.state.draw
        if privacy is None or draw is None:
            return None
        accountant = Accountant(privacy, self.state.spent)
        accountant.record(draw.rate)
        self.state.spent = accountant.history
        return Release(key=self.key, round_number=self.state.round, expected=draw.expected)

    def _busy(self, device: str) -> bool:
        """Whether it works on a task whose contribution would still be taken."""
        done = self.state.members[device].accepted_round
        return any(number > done and device in issued for number, issued in self.state.issued.items())

    def _forget_old_rounds(self) -> None:
        oldest = self.state.round - self.federation.schedule.late_rounds
        for table in (self.state.bases, self.state.issued):
            for number in [number for number in table if number < oldest]:
                del table[number]

    def _move_quality(self) -> None:
        method = self.federation.method
        if not method.quality_moves(self.state.round, self.federation.rounds):
            return
        scores = {
            device: quality.score(
                method.quality,
                residual=_bounded(metrics.residual),
                backward_residual=_bounded(metrics.backward_residual),
                forward=metrics.forward,
                r0=method.r0,
            )
            for device, metrics in self.arrived().items()
            if device in self.consensus.members
        }
        self.consensus.set_quality(scores)

    def _line(self, report: RoundReport, now: float) -> dict[str, object]:
        return {
            "kind": "round",
            "round": self.state.round,
            "cohort": len(self.state.cohort),
            "contributed": sorted(self.arrived()),
            "late": sorted(self.state.late),
            "declined": dict(self.declined),
            "extensions": self.extensions,
            "seconds": now - self._opened_at,
            "primal_residual": report.primal_residual,
            "dual_residual": report.dual_residual,
            "step": report.step,
            "correction": report.correction,
            "z": self.published.base.hex(),
            "devices": {device: msgspec.to_builtins(metrics) for device, metrics in self.arrived().items()},
        }

    def _audit(self) -> dict[str, object]:
        """What it takes to compute this close again: the weights and penalties in force, and what counts."""
        return {
            "base": self.published.base.hex(),
            "members": {device: list(self.consensus.weights(device)) for device in self.consensus.members},
            "accepted": [list(entry) for entry in self.state.accepted],
            "started": [list(entry) for entry in self.state.started],
            "expected": None if self.state.draw is None else self.state.draw.expected,
        }


def _bounded(residual: float) -> float:
    return residual if math.isnan(residual) else min(abs(residual), LARGEST_RESIDUAL)

"""The course of a federation: rounds are opened, closed and counted, and devices told what to do.

Events that devices cause are the aggregator's (aggregator.py), whose rules hold here as well; this is what follows from
them, and from time passing.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.errors import ContributionError, MaskingError
from fedeq_edge.protocol.actions import Finished, Record
from fedeq_edge.protocol.federation import Federation
from fedeq_edge.protocol.intake import FindBlob, Intake
from fedeq_edge.protocol.outlet import Outlet
from fedeq_edge.protocol.publication import Publication
from fedeq_edge.protocol.refusals import Refusals
from fedeq_edge.protocol.roster import Roster
from fedeq_edge.protocol.rounds import Rounds
from fedeq_edge.protocol.state import AggregatorState
from fedeq_edge.protocol.transfers import RETRY_S
from fedeq_edge.protocol.tree import Upstream
from fedeq_edge.wire import messages

if TYPE_CHECKING:
    from fedeq_edge.protocol.masked_rounds import MaskedRounds


@dataclass(slots=True)
class Course:
    """One federation's course. Parts of the aggregator, which it shares; blob_of: a stored contribution."""

    federation: Federation
    consensus: Consensus
    state: AggregatorState
    roster: Roster
    intake: Intake
    rounds: Rounds
    published: Publication
    out: Outlet
    refusals: Refusals
    reports: dict[str, messages.Report]
    blob_of: FindBlob
    masked: "MaskedRounds | None" = None
    upstream: Upstream | None = None
    _final_at: float | None = None
    _idle_since: float | None = None  # a worker has no devices for a round since then
    _unable: set[str] = field(default_factory=set)  # devices that could not make their personal model
    _asked: dict[str, float] = field(default_factory=dict)  # when a task went out that no device has reacted to

    # Events

    def resume(self, now: float) -> None:
        """Go on with the round that was open when the state was written."""
        if self.state.status == "running" and self.state.open:
            self.rounds.resume(now)
            if self.masked is not None:
                self.masked.resume(now)
            self.out.note("resumes a round", round=self.state.round, cohort=len(self.state.cohort))

    def connected(self, now: float) -> None:
        """Everybody who is here hears again what they are to do."""
        self.rounds.connected_at = now
        if self.upstream is not None:
            self.upstream.say_at_once()
        for device in self.roster.online:
            self.remind(device, now)

    def repeat(self, now: float) -> None:
        """Say again what nobody has reacted to."""
        for device in [device for device, asked_at in self._asked.items() if now - asked_at >= RETRY_S]:
            self.ask(device, now)
        for device in self.masked.silent(now) if self.masked is not None else ():
            self.remind(device, now)

    def heard(self, device: str) -> None:
        """The device has its task."""
        self._asked.pop(device, None)

    def cannot_finish(self, device: str) -> None:
        """The device has no personal model to report on."""
        self._asked.pop(device, None)
        self._unable.add(device)

    # What is due

    def check(self, now: float) -> None:
        """Open, close and finish what is due."""
        if self.state.status == "finishing":
            self._check_reports(now)
        elif self.state.status == "finished":
            return
        elif self.upstream is not None and self.upstream.waiting:
            self.out.extend(self.upstream.say(self.state.handed, now))
        elif not self.state.open:
            self._open_if_possible(now)
        elif self.masked is not None:
            self._check_masked(self.masked, now)
        else:
            due = self.rounds.due(now)
            if due == "close":
                self._close_round(now)
            elif due == "extend":
                self._extend_round(now)

    def _open_if_possible(self, now: float) -> None:
        if not self.rounds.may_open(now):
            if self.upstream is not None:
                self._pass_round(self.upstream, now)
            return
        self._idle_since = None
        self.rounds.join_newcomers()
        if self._rounds_done >= self.federation.rounds:  # a method without exchange has no rounds
            self._finish(now)
        else:
            self._open_round(now)

    def _open_round(self, now: float) -> None:
        first = self.state.status == "waiting"
        self.rounds.open(now)
        self.refusals.forget()
        if self.masked is not None:
            self.masked.begin(now)
        self.out.snapshot()
        if first:
            self.out.manifest()
        for device in self.state.cohort:
            self.ask(device, now)

    def _extend_round(self, now: float) -> None:
        contributed, trouble = len(self.state.contributed), ""
        self.rounds.extend(now)
        if self.masked is not None:
            trouble = self.masked.trouble
            self.masked.begin(now)
        self.out.snapshot()
        self.out.note(
            "round lacks its quorum and goes on", round=self.state.round, contributed=contributed, trouble=trouble
        )
        self.out.manifest()  # a device that has missed it cannot work
        for device in self.roster.online:
            self.ask(device, now)

    def _close_round(self, now: float) -> None:
        if self.upstream is not None:
            self._hand_over(self.upstream, now)
            return
        line = self.rounds.close(now, lambda: self.intake.differences(self.blob_of))
        self.out.append(Record(line=line))
        if self.federation.privacy is not None:
            self.out.snapshot()
        self._go_on(now)

    def _go_on(self, now: float) -> None:
        """After a close."""
        self.out.step()
        if self.state.round >= self.federation.rounds:
            self._finish(now)
        else:
            self._open_if_possible(now)

    # Masked rounds

    def _check_masked(self, masked: "MaskedRounds", now: float) -> None:
        """Go on with the sum of the open round."""
        if masked.complete:
            self._unmask(masked, now)
        elif masked.revealing:
            failure = masked.failed(now, self.federation.schedule.deadline_s)
            if failure is not None:
                self._give_up(masked, failure, now)
        else:
            for device in masked.advance(now):
                self._prompt(device, now)
            due = self.rounds.due(now)
            if due == "close" and masked.close(now):
                self.out.snapshot()
                for device in self.state.contributed:
                    self._prompt(device, now)
            elif due is not None and self.rounds.overdue(now):
                self._extend_round(now)

    def _unmask(self, masked: "MaskedRounds", now: float) -> None:
        try:
            partial, transfers, wrong = masked.unmask()
            here = {device: transfer for device, transfer in transfers.items() if device in self.consensus.members}
            self.consensus.accept_sum(dataclasses.replace(partial, devices=tuple(sorted(here))))
        except MaskingError as error:
            self._give_up(masked, error, now)
            return
        except ContributionError as error:
            self._give_up(masked, MaskingError(str(error)), now)
            return
        for trouble in wrong:
            self.out.note("masked sum", round=self.state.round, trouble=trouble)
        for device, transfer in here.items():
            self.intake.settle(device, self.state.round, transfer)
        self.out.counters.accepted += len(here)
        self._end_sum(masked, now, here, None)

    def _give_up(self, masked: "MaskedRounds", why: MaskingError, now: float) -> None:
        """The round has no sum: its devices have revealed too much to make another, and the consensus stays.

        Whose fault it is takes part in no other sum.
        """
        for device in why.devices:
            self.refusals.refuse("spoiled", device, str(why))
        masked.barred |= set(why.devices)
        devices, self.state.contributed = list(self.state.contributed), {}
        refusal = ContributionError("unmasked", f"round {self.state.round} has failed: {why}")
        self.refusals.counts[refusal.code] += len(devices)
        self.out.note("round failed", round=self.state.round, devices=len(devices), reason=str(why))
        self._end_sum(masked, now, devices, refusal)

    def _end_sum(
        self, masked: "MaskedRounds", now: float, devices: Iterable[str], refusal: ContributionError | None
    ) -> None:
        """Close the round; its devices hear what has become of their contributions once that is on the disk."""
        number = self.state.round
        masked.end()
        line = {**self.rounds.close(now, lambda: ()), "failed": None if refusal is None else str(refusal)}
        self.out.append(Record(line=line))
        self.out.snapshot()
        for device in devices:
            self.out.verdict(device, "contribution", number, refusal)
        self._go_on(now)

    def add_up_without(self, device: str, now: float) -> None:
        """A device that has left for good is in no sum from here on, but for one whose survivors have been told.

        That one stands, as the steps that the consensus has made do: it may be known already, and another sum without
        the device would tell its contribution.
        """
        if self.masked is not None and self.masked.takes(device):
            self.masked.begin(now)
            for other in self.state.cohort:
                self.ask(other, now)

    def remind(self, device: str, now: float) -> None:
        """What this device is to do now, if anything: its task, and its part in a masked sum."""
        self.ask(device, now)
        self._prompt(device, now)

    def _prompt(self, device: str, now: float) -> None:
        prompt = self.masked.prompt(device, now) if self.masked is not None and device in self.roster else None
        if prompt is not None:
            self.out.send(device, *prompt)

    # A worker's rounds

    @property
    def root_topic(self) -> str | None:
        """Where our root speaks to us, None without a root."""
        return None if self.upstream is None else self.upstream.down

    @property
    def _rounds_done(self) -> int:
        return self.state.round if self.upstream is None else self.state.root_round

    def _hand_over(self, upstream: Upstream, now: float) -> None:
        """The root gets what came, if anything did; with nothing, this round goes on without our devices."""
        share, line = self.rounds.hand_over(now)
        blob = upstream.blob(share)
        if share.weight:
            self.state.handed = blob
            self.out.append(Record(line=line))
            self.out.snapshot()
            upstream.say_at_once()
        self.out.extend(upstream.say(blob, now))

    def _pass_round(self, upstream: Upstream, now: float) -> None:
        """A worker without devices for a round lets the others go on after its deadline."""
        self._idle_since = now if self._idle_since is None else self._idle_since
        if now - self._idle_since >= self.federation.schedule.deadline_s:
            self._hand_over(upstream, now)

    def root_says(self, payload: bytes, now: float) -> None:
        """A payload of our root came. Raises WireError where it does not follow the protocol."""
        upstream = self.upstream
        heard = None if upstream is None else upstream.heard(payload)
        if upstream is not None and heard is not None:
            self._follow(*heard, now=now)
            self.out.append(upstream.acknowledgement())

    def _follow(self, model: messages.Model, body: memoryview, *, now: float) -> None:
        """The root's consensus is ours, unless it was before."""
        state = self.state
        if model.round <= state.root_round:
            return
        self.published.follow(model, body)
        self.consensus.follow(self.published.z_hat)
        if state.open:
            self.rounds.abandon()
        state.root_run, state.root_round, state.handed = model.run, model.round, b""
        state.round, self._idle_since = max(state.round, model.round), None
        self.out.step()
        if model.round >= self.federation.rounds:
            self._finish(now)
        else:
            self.out.snapshot()

    # The end

    def _finish(self, now: float) -> None:
        self.state.status = "finishing"
        self._final_at = now + self.federation.schedule.final_s
        self.out.snapshot()
        self.out.manifest()
        for device in self.roster.online:
            self.ask(device, now)

    def _check_reports(self, now: float) -> None:
        if self._final_at is None:  # we came back after a crash
            self._final_at = now + self.federation.schedule.final_s
        if len(self.reports) + len(self._unable) < len(self.consensus.members) and now < self._final_at:
            return  # asked after every report, so without a look at a thousand members
        all_in = all(device in self.reports or device in self._unable for device in self.consensus.members)
        if all_in or now >= self._final_at:
            self.state.status = "finished"
            self.out.snapshot()
            self.out.manifest()
            self.out.append(Finished())

    # Sending

    def _owes(self, device: str) -> bool:
        """Whether this device has something to do now."""
        if self.state.status == "finishing":
            asked = device in self.consensus.members and device not in self._unable
            return asked and device not in self.reports
        if self.masked is not None and not self.masked.takes(device):
            return False
        return self.rounds.owes(device)

    def ask(self, device: str, now: float) -> None:
        """What this device is to do now, if anything."""
        self._asked.pop(device, None)
        birth = self.roster.birth(device)
        if birth is None or not self._owes(device):
            return
        self._asked[device] = now
        final, member = self.state.status == "finishing", self.state.members[device]
        schedule = self.federation.schedule
        task = messages.Task(
            run=self.state.run,
            round=self.state.round + (1 if final else 0),
            model=self.published.base,
            kappa=self.rounds.kappa(device),
            deadline_s=schedule.final_s if final else schedule.deadline_s,
            codec=self.intake.codec_for(birth) or self.federation.up[-1],
            after=member.accepted_round,
            duals=member.dual if self.federation.method.keeps_duals else None,
            final=final,
            masking=None if final or self.masked is None else self.masked.terms(device),
        )
        self.out.send(device, task)

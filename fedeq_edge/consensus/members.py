"""The members of a consensus: what each of them weighs, its dual, and the sums over all of them."""

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedeq_edge.consensus import checks, quality
from fedeq_edge.consensus.duals import DualStore
from fedeq_edge.consensus.fixed import STEP_LIMIT, SUM_LIMIT, ExactSum, FixedVector, largest
from fedeq_edge.consensus.methods import Method
from fedeq_edge.consensus.open_round import OpenRound
from fedeq_edge.consensus.records import Arrival, Member, Share
from fedeq_edge.errors import ContributionError


class Members:
    """The devices that have joined and are not retired, and H and R over them.

    H: sum omega_i nu_i, (p,) with p = `size`, less the steps of the open round. R: sum omega_i kappa_i 2^32.
    method: the penalty rho and the quality weighting. equal: every omega_i is 1.
    duals: where nu_i is kept; None keeps none, and H is 0. opened: the open round, whose sum S is part of H from its
    close on: H + S stays within 62 bits, and a device that is retired can no longer take back what S holds of it.
    Calls for a device that is no member raise ContributionError with code "not_a_member".
    """

    def __init__(self, size: int, *, method: Method, equal: bool, duals: DualStore | None, opened: OpenRound) -> None:
        self._method = method
        self._equal = equal
        self._duals = duals
        self._opened = opened
        self._members: dict[str, Member] = {}
        self.H = ExactSum(np.zeros(size, np.int64))
        self.R = 0

    # ---- what they hold ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._members)

    def of(self, device: str) -> Member:
        """What is known of this device."""
        if device not in self._members:
            raise ContributionError("not_a_member", f"device {device} is no member of the consensus; let it join first")
        return self._members[device]

    @property
    def by_device(self) -> dict[str, Member]:
        """All of them in order of joining, a copy."""
        return dict(self._members)

    @property
    def total_weight(self) -> int:
        """The sum of all omega_i."""
        return sum(member.omega for member in self._members.values())

    @property
    def sums(self) -> tuple[FixedVector, int]:
        """sum omega_i nu_i with the steps of the open round, (p,), and R; 0 for the first where no duals are kept."""
        return (self.H.values.copy() if self._duals is None else self.H.values + self._opened.S.values), self.R

    def recomputed(self) -> tuple[FixedVector, int]:
        """Both of `sums` afresh from the members and their duals."""
        H, R = np.zeros_like(self.H.values), 0
        for device, member in self._members.items():
            R += member.omega * member.penalty
            if self._duals is not None:
                H += member.omega * self._duals.get(device)
        return H, R

    def check(self, devices: Iterable[str]) -> None:
        """All of these are members."""
        for device in devices:
            self.of(device)

    # ---- who they are --------------------------------------------------------------------------------------

    def join(self, device: str, samples: int, nu: FixedVector | None) -> None:
        """`device` is a member with n_i = `samples`, q_i = 1 and dual `nu`, (p,), 0 without one; its old share is gone.

        Raises ContributionError "wrong_shape", "too_large" or "no_samples".
        """
        checks.check_samples(device, samples)
        member = self._weighed(Member(samples=samples, omega=0, penalty=0))
        if nu is not None:
            checks.check_dual(device, nu, member.omega, self.H.values.size)
        if device in self._members:
            self.retire(device)
        if self._duals is not None:
            member = replace(member, reach=self._hold(self._duals, device, member.omega, nu))
        self.R += member.omega * member.penalty
        self._members[device] = member

    def retire(self, device: str) -> None:
        """`device` is no member, has no share of H and R and no dual; what it contributed to the open round stays."""
        member = self.of(device)
        if self._duals is not None:
            dual = self._duals.get(device)
            self.H.add(dual, -member.omega, largest(dual))
            self._duals.drop(device)
        self.R -= member.omega * member.penalty
        self._opened.settle(device)
        del self._members[device]

    # ---- what they weigh -----------------------------------------------------------------------------------

    def set_samples(self, device: str, samples: int) -> None:
        """n_i is `samples`. Raises ContributionError "no_samples" or "too_large"."""
        checks.check_samples(device, samples)
        self._reweigh(device, replace(self.of(device), samples=samples))

    def set_quality(self, scores: Mapping[str, float]) -> None:
        """q_i of each has moved towards its score, where H has room for the new weight.

        Raises ContributionError "bad_score", and then nothing has changed.
        """
        for device, score in scores.items():
            self.of(device)
            checks.check_score(device, score)
        for device, score in scores.items():
            self._members[device] = replace(self._members[device], score=score)
        known = [member.score for member in self._members.values() if member.score is not None]
        for device, score in scores.items():
            member = self._members[device]
            moved = quality.moved(member.quality, score, math.fsum(known) / len(known))
            with contextlib.suppress(ContributionError):
                self._reweigh(device, replace(member, quality=moved))

    # ---- how their duals move ------------------------------------------------------------------------------

    def check_room(self, where: str, step: FixedVector, factor: int, magnitude: int) -> None:
        """The round's sum has room for factor step, and so has H with it. Raises ContributionError "too_large"."""
        checks.check_room(where, (self._opened.S,), step, factor, magnitude)
        checks.check_room(where, (self.H, self._opened.S), step, factor, magnitude)

    def advance(self, device: str, step: FixedVector, magnitude: int) -> None:
        """nu_i has moved by `step`, which the caller adds to the open round. Raises ContributionError "too_large"."""
        if self._duals is None:
            return
        member = self._members[device]
        reach = self._reach(self._duals, device, step, magnitude)
        self._duals.advance(device, step)
        self._members[device] = replace(member, reach=reach)

    def take_back(self, arrival: Arrival, step: FixedVector, magnitude: int) -> None:
        """nu_i is without the step of this arrival, and so is H once the caller has taken it out of the open round.

        Raises ContributionError "too_large".
        """
        if self._duals is None:
            return
        member = self._members[arrival.device]
        self._move_sum(arrival.device, arrival.omega - member.omega, step)  # nothing unless it weighs otherwise by now
        self._duals.advance(arrival.device, -step)
        self._members[arrival.device] = replace(member, reach=member.reach - magnitude)

    def close(self) -> None:
        """H holds the steps of the open round, which the caller clears."""
        if self._duals is not None:
            self.H.add(self._opened.S.values, 1, self._opened.S.bound)

    def gather(self, duals: FixedVector, shares: Mapping[str, Share]) -> None:
        """H is `duals`, (p,), and R that of the shares of these workers."""
        self.H = ExactSum(duals)
        self.R = sum(share.penalties for share in shares.values())

    # ---- storage -------------------------------------------------------------------------------------------

    def snapshot(self) -> tuple[dict[str, FixedVector], dict[str, Any]]:
        """Arrays and scalars from which `restore` goes on bit for bit: all but the duals."""
        members = {device: _fields(member) for device, member in self._members.items()}
        return {"H": self.H.values.copy()}, {"R": str(self.R), "members": members}

    def restore(self, arrays: Mapping[str, Any], scalars: Mapping[str, Any]) -> None:
        """What `snapshot` gave out is in force."""
        self.H, self.R = ExactSum(arrays["H"]), int(scalars["R"])
        self._members = {device: Member(**fields) for device, fields in scalars["members"].items()}

    # ---- private -------------------------------------------------------------------------------------------

    def _hold(self, duals: DualStore, device: str, omega: int, nu: FixedVector | None) -> int:
        """`duals` keeps nu, (p,), 0 without one, which is part of H; its largest magnitude."""
        if nu is None:
            duals.put(device, np.zeros_like(self.H.values))
            return 0
        self._move_sum(device, omega, nu)
        duals.put(device, nu.copy())
        return largest(nu)

    def _weighed(self, member: Member) -> Member:
        omega, penalty = quality.weights(
            member.samples, member.quality, rho=self._method.rho, exponent=self._method.exponent
        )
        return replace(member, omega=1 if self._equal else omega, penalty=penalty)

    def _reweigh(self, device: str, member: Member) -> None:
        old, new = self._members[device], self._weighed(member)
        if self._duals is not None and new.omega != old.omega:
            self._move_sum(device, new.omega - old.omega, self._duals.get(device))
        self.R += new.omega * new.penalty - old.omega * old.penalty
        self._members[device] = new

    def _move_sum(self, device: str, factor: int, vector: FixedVector) -> None:
        """H += factor vector."""
        if factor == 0:
            return
        magnitude = largest(vector)
        checks.check_room(f"device {device}", (self.H, self._opened.S), vector, factor, magnitude)
        self.H.add(vector, factor, magnitude)

    def _reach(self, duals: DualStore, device: str, step: FixedVector, magnitude: int) -> int:
        """Bound of nu_i after `step`, by the stored dual itself where the running bound is used up."""
        reach = self._members[device].reach + magnitude
        if reach < SUM_LIMIT:
            return reach
        true = largest(duals.get(device) + step)
        if true >= SUM_LIMIT:
            raise ContributionError(
                "too_large", f"device {device}: its dual would leave 62 bits; let it join again without its state"
            )
        # every arrival that is taken back lowers the bound by up to STEP_LIMIT, and may raise the dual by as much
        held = 1 + self._opened.arrivals_of(device)
        return true + 2 * held * STEP_LIMIT


def _fields(member: Member) -> dict[str, object]:
    """As `dataclasses.asdict`, which copies every value deeply."""
    return {name: getattr(member, name) for name in Member.__slots__}

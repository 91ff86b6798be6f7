"""Weighted consensus ADMM with partial participation: algorithm.md, section 4.

    minimise  sum_i omega_i F_i(theta_i)  subject to  theta_i = z for all i
    server    z <- z_hat + sum_S omega_i kappa_i d_i / sum_S omega_i kappa_i + H / R,    d_i = theta_i - z_hat
    client    nu_i <- nu_i + kappa_i d_i

H = sum omega_i nu_i and R = sum omega_i kappa_i run over all members, S is what arrived since the last close.

Theory of operation
-------------------
z_hat is what every client holds. z is where the server wants it: the two differ by rounding, or by what a few-bit
code left out, and clients and server both go on with z_hat.

All sums are exact. A dual moves by step_i = rint(kappa_i d_i 2^s), an int64 vector (fixed.py) that client and server
compute alike; omega_i and kappa_i are integers as well. So the order of arrivals does not matter, a contribution can
be taken back without a trace, and the sums of several servers add up to the sums of one, all bit for bit. The sum of
the open round, sum_S omega_i step_i, is both what H grows by and, over sum_S omega_i kappa_i, the mean.

The duals stay where they are when a contribution comes: the store is told the step, and nu_i itself is asked for only
when omega_i nu_i must leave H, or weigh otherwise, because a device is retired, rejoins, or has a new weight.
At any time  H + sum_S omega_i step_i = sum omega_i nu_i  over the members of that time.

Any fixed point has d_i = 0 for all i, hence H = 0, hence sum omega_i grad F_i(z) = 0, whatever kappa_i > 0 is. So
a change of penalties or a late d_i moves the path and not the end. (FedDyn's server, Acar et al., ICLR 2021,
arXiv 2111.04263, with weights.)
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.consensus import checks, quality
from fedeq_edge.consensus.constraint import Constraint, project
from fedeq_edge.consensus.duals import DualStore, MemoryDuals
from fedeq_edge.consensus.fixed import (
    PENALTY_BITS,
    WHOLE,
    FixedVector,
    FloatVector,
    dual_step,
    fixed_penalty,
    fraction_bits,
    largest,
    penalty_of,
)
from fedeq_edge.consensus.members import Members
from fedeq_edge.consensus.methods import Method
from fedeq_edge.consensus.open_round import OpenRound
from fedeq_edge.consensus.privacy import Privacy, Release, clip_factor, noised
from fedeq_edge.consensus.records import Arrival, Member, PartialSum, RoundReport, Share
from fedeq_edge.consensus.robust import Contributions, Screen, fuse
from fedeq_edge.consensus.server import ServerMemory
from fedeq_edge.errors import ConfigError, ContributionError


class Consensus:
    """The server's side: O(p) memory beside the duals, contributions are folded in as they come.

    z: the start, shape (p,), float32 (float64 in numerical tests); its type is that of `z_hat` and of the duals.
    method: the rule of the server, the penalty rho and the quality weighting. constraints: convex sets that hold z.
    duals: where nu_i is kept; a server "mean" leaves the duals out and keeps none.
    privacy: every omega_i is 1, every step is bounded, and every sum goes out noised (privacy.py).
    Calls for a device that is no member raise ContributionError with code "not_a_member".
    """

    def __init__(
        self,
        z: FloatVector,
        *,
        method: Method,
        constraints: Sequence[Constraint] = (),
        duals: DualStore | None = None,
        privacy: Privacy | None = None,
    ) -> None:
        if z.ndim != 1 or z.size == 0:
            raise ConfigError(f"the consensus starts from shape {z.shape}; give one flat vector of parameters")
        self._bits = fraction_bits(z.dtype)
        self._method = method
        self._privacy = privacy
        if privacy is not None:
            privacy.check(method)
            self._bound = privacy.bound(self._rho, self._bits)
        self._constraints = tuple(constraints)
        self._z = z.astype(np.float64)
        project(self._z, self._constraints)
        self._z_hat: FloatVector = self._z.astype(z.dtype)
        self._screen = Screen(method)
        self._memory = ServerMemory(method, z.size)
        self._round = OpenRound(z.size)
        self._members = Members(
            z.size,
            method=method,
            equal=privacy is not None,
            duals=(MemoryDuals() if duals is None else duals) if self._adds_duals else None,
            opened=self._round,
        )

    # ---- what it holds -------------------------------------------------------------------------------------

    @property
    def z(self) -> NDArray[np.float64]:
        """The consensus before rounding or coding, (p,) float64, a copy."""
        return self._z.copy()

    @property
    def z_hat(self) -> FloatVector:
        """The consensus that every client works with, (p,) in the type of the first z, a copy."""
        return self._z_hat.copy()

    @property
    def method(self) -> Method:
        """The configuration that it runs."""
        return self._method

    @property
    def members(self) -> Mapping[str, Member]:
        """The devices that have joined and are not retired, in order of joining."""
        return self._members.by_device

    @property
    def sums(self) -> tuple[FixedVector, int]:
        """sum omega_i nu_i, (p,) in units of 2^-s, and R 2^32, over all members; 0 for H with the server "mean"."""
        return self._members.sums

    def recomputed(self) -> tuple[FixedVector, int]:
        """Both of `sums` afresh from the members and their duals: equal to it after any history."""
        return self._members.recomputed()

    def penalty(self, device: str) -> float:
        """kappa_i now in force: what the next task of this device carries and its contribution names again."""
        return penalty_of(self._members.of(device).penalty)

    def weights(self, device: str) -> quality.Weights:
        """omega_i and kappa_i 2^32 now in force: with the contributions, all that it takes to compute a close again."""
        member = self._members.of(device)
        return quality.Weights(omega=member.omega, penalty=member.penalty)

    # ---- members -------------------------------------------------------------------------------------------

    def join(self, device: str, samples: int, *, nu: FixedVector | None = None) -> None:
        """`device` is a member with n_i = `samples`, q_i = 1 and dual `nu`, (p,) int64 (0 where it has none).

        A member that joins again has lost its state: its old share leaves H and R first, the rest stands.
        Raises ContributionError "wrong_shape", "too_large" or "no_samples", and then nothing has changed.
        """
        self._members.join(device, samples, nu)
        self._memory.join(device, self._z_hat)

    def retire(self, device: str) -> None:
        """`device` is gone for good: omega_i nu_i and omega_i kappa_i are out of H and R, its dual is dropped.

        What it contributed to the mean of an open round stays there and can no longer be taken back. Never refused for
        want of room: where two liars' huge duals cancelled, H is right modulo 2^64, and right when both are gone.
        """
        self._members.retire(device)
        self._memory.drop(device)

    def set_samples(self, device: str, samples: int) -> None:
        """n_i is `samples` from here on; H and R follow."""
        self._members.set_samples(device, samples)

    def set_quality(self, scores: Mapping[str, float]) -> None:
        """The qualities of these devices have moved towards their scores s_i >= 0 (quality.score); H and R follow.

        A q_i is relative to the mean of the last scores of all members; those without a new score keep theirs, so
        that in objective mode only the reporters' duals are read. Raises ContributionError "bad_score", and then
        nothing has changed. A device whose H has no room for the new weight keeps its quality.
        """
        self._members.set_quality(scores)

    # ---- rounds --------------------------------------------------------------------------------------------

    def open_round(self, cohort: Iterable[str]) -> None:
        """These members are asked; what arrives from others until `close_round` counts, and is reported as late."""
        devices = frozenset(cohort)
        self._members.check(devices)
        self._round.cohort = devices

    def accept(self, device: str, difference: FloatVector, kappa: float) -> int:
        """The dual of `device`, H, and the mean of the round that closes next have moved by `difference`.

        difference: d_i = theta_i - z_hat as the server decoded it, (p,), from whatever z_hat the device started
        at. kappa: the penalty of the task that it answers, which may be older than the one in force.
        Returns the factor, in 1 / WHOLE, at which it counted: WHOLE, or less where it was clipped. The client moves
        its dual by `scaled(difference, factor)`.
        Raises ContributionError "wrong_shape", "not_finite", "bad_penalty", "too_large", "norm_bound" or
        "direction_bound", and then nothing has changed.
        """
        member = self._members.of(device)
        exact = checks.exact_difference(device, difference, self._z_hat)
        penalty = checks.checked_penalty(device, kappa)
        square = checks.square(device, exact)
        factor = self._factor(device, exact, kappa, math.sqrt(square))
        step = self._step(device, exact, kappa, factor)
        arrival = Arrival(device=device, omega=member.omega, penalty=penalty, factor=factor, square=square)
        magnitude = largest(step)
        self._members.check_room(f"device {device}", step, arrival.omega, magnitude)
        self._members.advance(device, step, magnitude)
        self._round.add(arrival, step, magnitude)
        self._memory.put(device, self._z_hat, exact, factor)
        return factor

    def retract(self, device: str, difference: FloatVector, kappa: float) -> None:
        """A contribution of the open round has left the dual of `device`, H and the mean, as if it had never come.

        difference, kappa: as they were accepted. The device must forget it as well, or join again.
        Raises ContributionError "not_contributed" where the open round does not hold it.
        """
        exact = checks.exact_difference(device, difference, self._z_hat)
        arrival = self._round.arrival(device, checks.checked_penalty(device, kappa), checks.square(device, exact))
        step = self._step(device, exact, kappa, arrival.factor)
        magnitude = largest(step)
        self._members.take_back(arrival, step, magnitude)
        self._round.take_back(arrival, step, magnitude)
        self._memory.take_back(device)

    def accept_sum(self, partial: PartialSum) -> None:
        """H and the mean of the round that closes next have moved by what these members contribute together.

        Their steps are not known one by one: who adds them up also tells them to the dual store, before one of the
        devices is retired or weighs otherwise. Raises ContributionError "bad_sum" or "too_large", and then nothing has
        changed, and ConfigError where the method must see every single contribution.
        """
        if self._method.sees_each or self._privacy is not None:
            raise ConfigError(f"method {self._method.name} bounds single contributions; give it no sums of several")
        checks.check_sum(partial, self._z.size)
        self._members.check(partial.devices)
        magnitude = largest(partial.steps)
        self._members.check_room(f"sum over {len(partial.devices)} devices", partial.steps, 1, magnitude)
        self._round.add_sum(partial, magnitude)

    def partial(self) -> PartialSum:
        """All that arrived since the last close, for the `accept_sum` of a root: its z is then that of one server."""
        return self._round.partial()

    # ---- a root and its workers ------------------------------------------------------------------------------

    def hand_over(self) -> tuple[Share, RoundReport]:
        """A worker's close: what arrived is in H and in the share for its root, and z waits for `follow`.

        What arrives from here on is in the next share.
        """
        held, penalties = self.sums
        share = Share(
            steps=self._round.S.values.copy(),
            weight=self._round.weight,
            squares=self._round.squares,
            duals=held,
            penalties=penalties,
        )
        report = self._report(step=0.0, correction=0.0)
        self._members.close()
        self._round.clear()
        return share, report

    def follow(self, z_hat: FloatVector) -> None:
        """The root's consensus, (p,) in our type, is that of our devices; the sums stay."""
        checks.check_shape("consensus of the root", z_hat, self._z.size)
        self._z_hat = z_hat.astype(self._z_hat.dtype)
        self._z = self._z_hat.astype(np.float64)

    def gather(self, shares: Mapping[str, Share]) -> None:
        """A root's open round, H and R are what its workers have handed over, and nothing else: `close_round` is next.

        The sums are whole ones, not changes, so that a worker may come, lose all that it had, or leave: its devices
        count with what its last share says. Raises ContributionError "wrong_shape", "bad_sum" or "too_large", and
        then nothing has changed.
        """
        if self._method.sees_each:
            raise ConfigError(f"method {self._method.name} bounds single contributions; run it without workers")
        for worker, share in shares.items():
            checks.check_share(worker, share, self._z.size)
        steps = checks.checked_total([share.steps for share in shares.values()], self._z.size)
        duals = np.zeros(self._z.size, np.int64)
        if self._adds_duals:
            duals = checks.checked_total([share.duals for share in shares.values()], self._z.size) - steps
        self._members.gather(duals, shares)
        self._round.gather(steps, shares)

    def close_round(
        self,
        transmit: Callable[[FloatVector], FloatVector] | None = None,
        *,
        contributions: Contributions | None = None,
        relaxed: bool = False,
        release: Release | None = None,
    ) -> RoundReport:
        """z has made its step and lies within the constraints, z_hat is published, and a new round may open.

        transmit: codes the difference z - z_hat, (p,), and returns what every client will decode; z_hat advances
        by that. Without it z_hat is z, rounded. z_hat itself is not projected when a code moved it. A round to
        which nobody contributed leaves z and z_hat where they were.
        contributions: the differences of this round again, for `robust` "trimmed" and "median".
        relaxed: z makes only the share of its step that the contributors have of R. For closes after a few
        contributions that started from different z: each of them in full overshoots, and diverges.
        release: needed under `privacy`, where also a round to which nobody contributed moves z, by the noise alone:
        that nobody was there is a secret, too.
        """
        share = min(1.0, self._round.weight / self._members.R) if relaxed and self._members.R else 1.0
        previous, previous_hat = self._z, self._z_hat
        moves = bool(self._round.contributors) or release is not None
        center = self._center(contributions, release) if moves else np.zeros(self._z.size)
        self._members.close()
        correction = self._correction()
        if moves:
            self._z = self._z_hat + self._memory.moved(share * (center + correction))
            project(self._z, self._constraints)
            self._publish(transmit)
        report = self._report(float(np.linalg.norm(self._z - previous)), float(np.linalg.norm(correction)))
        self._screen.close(
            self._round.norms,
            self._z_hat - previous_hat,
            members=len(self._members),
            majority=self._round.has_majority,
        )
        self._round.clear()
        self._memory.close()
        return report

    # ---- storage -------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """All but the duals, also in the middle of a round: "arrays" of numpy vectors, "scalars" for JSON or msgpack.

        Integers that may pass 64 bits are texts. The order of arrivals leaves no trace.
        """
        members, weights = self._members.snapshot()
        sums, arrived = self._round.snapshot()
        steps, screen = self._screen.snapshot()
        held, owners = self._memory.snapshot()
        return {
            "arrays": {"z": self.z, "z_hat": self.z_hat, **members, **sums, **steps, **held},
            "scalars": {**weights, **arrived, "screen": screen, **owners},
        }

    @classmethod
    def restore(
        cls,
        snapshot: Mapping[str, Any],
        *,
        method: Method,
        constraints: Sequence[Constraint] = (),
        duals: DualStore | None = None,
        privacy: Privacy | None = None,
    ) -> "Consensus":
        """A consensus that continues bit for bit; all but the snapshot are those of its owner."""
        arrays, scalars = snapshot["arrays"], snapshot["scalars"]
        restored = cls(arrays["z_hat"], method=method, constraints=constraints, duals=duals, privacy=privacy)
        restored._z, restored._z_hat = arrays["z"].copy(), arrays["z_hat"].copy()
        restored._members.restore(arrays, scalars)
        restored._round.restore(arrays, scalars)
        restored._screen.restore(arrays, scalars["screen"])
        restored._memory.restore(arrays, scalars)
        return restored

    # ---- private -------------------------------------------------------------------------------------------

    @property
    def _adds_duals(self) -> bool:
        return self._method.keeps_duals

    @property
    def _rho(self) -> float:
        return penalty_of(fixed_penalty(self._method.rho))

    def _factor(self, device: str, exact: NDArray[np.float64], kappa: float, norm: float) -> int:
        if self._privacy is None:
            return self._screen.factor(device, exact, norm)
        return clip_factor(self._step(device, exact, kappa, WHOLE), self._bound)

    def _step(self, device: str, exact: NDArray[np.float64], kappa: float, factor: int) -> FixedVector:
        try:
            return dual_step(exact, kappa, self._bits, factor)
        except ContributionError as error:
            raise ContributionError(error.code, f"device {device}: {error}") from error

    def _center(self, contributions: Contributions | None, release: Release | None) -> NDArray[np.float64]:
        """The mean of the round's differences, or what stands in for it, (p,)."""
        if self._privacy is not None:
            return self._private_mean(self._privacy, release)
        if self._method.server == "sums":
            return self._memory.mean(self._members.by_device) - self._z_hat
        if self._method.robust not in ("trimmed", "median"):
            return self._ratio(self._round.S.values, self._round.weight)
        if self._screen.measuring:
            return np.zeros(self._z.size)
        if contributions is None:
            raise ConfigError(f'method {self._method.name}: robust = "{self._method.robust}" needs all contributions')
        return fuse(self._method, contributions, self._round.contributors, self._z.size)

    def _private_mean(self, privacy: Privacy, release: Release | None) -> NDArray[np.float64]:
        if release is None:
            raise ConfigError("a private round closes with the key of its noise; give close_round its release")
        std = privacy.std(self._rho, self._bits)
        total = noised(self._round.S.values, std, key=release.key, round_number=release.round_number)
        return self._ratio(total, release.expected * fixed_penalty(self._rho))

    def _correction(self) -> NDArray[np.float64]:
        """H / R, (p,); 0 with the server "mean"."""
        H, R = self._members.H.values, self._members.R
        return self._ratio(H, R) if self._adds_duals and R else np.zeros(self._z.size)

    def _ratio(self, total: FixedVector, weight: float) -> NDArray[np.float64]:
        """total / weight in the units of theta, (p,)."""
        unit = 2.0 ** (PENALTY_BITS - self._bits)
        ratio: NDArray[np.float64] = total.astype(np.float64) * unit / float(weight)
        return ratio

    def _publish(self, transmit: Callable[[FloatVector], FloatVector] | None) -> None:
        if transmit is None:
            self._z_hat = self._z.astype(self._z_hat.dtype)
            return
        decoded = transmit((self._z - self._z_hat).astype(self._z_hat.dtype))
        self._z_hat = self._z_hat + decoded.astype(self._z_hat.dtype, copy=False)

    def _report(self, step: float, correction: float) -> RoundReport:
        total = self._members.total_weight
        return RoundReport(
            primal_residual=self._round.primal_residual,
            dual_residual=step * penalty_of(self._members.R) / total if total else 0.0,
            step=step,
            correction=correction,
            contributors=self._round.contributors,
            late=self._round.late,
        )

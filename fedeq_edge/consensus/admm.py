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

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.consensus import quality
from fedeq_edge.consensus.constraint import Constraint, project
from fedeq_edge.consensus.fixed import (
    PENALTY_BITS,
    STEP_LIMIT,
    SUM_LIMIT,
    WHOLE,
    ExactSum,
    FixedVector,
    FloatVector,
    dual_step,
    fixed_penalty,
    fraction_bits,
    largest,
    penalty_of,
    scaled,
)
from fedeq_edge.consensus.methods import Method
from fedeq_edge.consensus.privacy import Privacy, Release, clip_factor, noised
from fedeq_edge.consensus.robust import Contributions, Screen, fuse
from fedeq_edge.errors import ConfigError, ContributionError

_SQUARE_BITS = 128
"""|d|^2 is summed in units of 2^-128: residuals down to 1e-19 are told from 0."""
_SAMPLES_LIMIT = 2**32
"""n_i stays below, so that the product with a quality is an int64 factor."""


class DualStore(Protocol):
    """Where the server keeps nu_i, one int64 vector (p,) per member. Vectors given or got are never changed in place.

    Only a server "fresh" uses one.
    """

    def get(self, device: str) -> FixedVector:
        """The vector that was put last, plus all steps since."""
        ...

    def put(self, device: str, nu: FixedVector) -> None:
        """Keep this vector in place of an earlier one."""
        ...

    def advance(self, device: str, step: FixedVector) -> None:
        """nu_i has moved by `step`."""
        ...

    def drop(self, device: str) -> None:
        """Forget this device's vector."""
        ...


class MemoryDuals:
    """Duals in memory, O(members p): for simulations and tests; a gateway keeps them on disk."""

    def __init__(self) -> None:
        self._duals: dict[str, FixedVector] = {}

    def get(self, device: str) -> FixedVector:
        """The vector that was put last, plus all steps since; KeyError without one."""
        return self._duals[device]

    def put(self, device: str, nu: FixedVector) -> None:
        """Keep this vector in place of an earlier one."""
        self._duals[device] = nu

    def advance(self, device: str, step: FixedVector) -> None:
        """nu_i has moved by `step`; KeyError without a vector."""
        self._duals[device] = self._duals[device] + step

    def drop(self, device: str) -> None:
        """Forget this device's vector; KeyError without one."""
        del self._duals[device]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """What the server knows of one device. samples: n_i >= 1. quality: q_i. score: the last s_i, None before.

    omega, penalty: omega_i and kappa_i 2^32, kept as they were computed: another platform's power function must not
    move them. reach: no entry of nu_i is larger, in units of 2^-s; 0 where the server keeps no duals.
    """

    samples: int
    omega: int
    penalty: int
    quality: float = 1.0
    score: float | None = None
    reach: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Arrival:
    """One contribution to the open round, as it counted: omega_i, kappa_i 2^32 and the factor in 1 / WHOLE.

    square: |d|^2 as it was sent. held: nu_i still holds the step, so that it can be taken back.
    """

    device: str
    omega: int
    penalty: int
    factor: int
    square: float
    held: bool = True

    @property
    def weight(self) -> int:
        """omega_i kappa_i, in units of 2^-32."""
        return self.omega * self.penalty

    @property
    def weighted_square(self) -> int:
        """omega_i kappa_i |d_i|^2 of what counted, in units of 2^-32 times 2^-_SQUARE_BITS."""
        share = self.factor / WHOLE
        return self.weight * int(math.ldexp(self.square * share * share, _SQUARE_BITS))


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialSum:
    """What several devices contribute together: a worker's round, or a sum that was masked.

    steps: sum omega_i step_i modulo 2^64, (p,) int64. weight: sum omega_i kappa_i 2^32. squares: sum of
    omega_i kappa_i |d_i|^2, in units of 2^-160, for the report alone. devices: whose, sorted, once per contribution.
    """

    steps: FixedVector
    weight: int
    squares: int
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one worker's devices have contributed to a round, and what they hold together after it; all of it exact.

    steps, weight, squares: as in a `PartialSum`. duals: sum omega_i nu_i over its members, these steps included, (p,)
    int64 modulo 2^64; 0 with the server "mean". penalties: sum omega_i kappa_i 2^32 over its members.
    """

    steps: FixedVector
    weight: int
    squares: int
    duals: FixedVector
    penalties: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """How far the fleet is from agreeing, after one `close_round`.

    primal_residual: root of the mean of |d_i|^2 with weights omega_i kappa_i; NaN for an empty round.
    step: |z - z_old|. dual_residual: step times the mean penalty (Boyd et al. 2011, section 3.3).
    correction: |H / R|, which vanishes at the optimum (0 for the server "mean"). contributors: sorted, once per
    contribution. late: those of them that were not in the cohort.
    """

    primal_residual: float
    dual_residual: float
    step: float
    correction: float
    contributors: tuple[str, ...]
    late: tuple[str, ...]


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
        self._duals: DualStore = MemoryDuals() if duals is None else duals
        self._z = z.astype(np.float64)
        project(self._z, self._constraints)
        self._z_hat: FloatVector = self._z.astype(z.dtype)
        self._members: dict[str, Member] = {}
        self._H = ExactSum(np.zeros(z.size, np.int64))
        self._R = 0
        self._screen = Screen(method)
        self._cohort: frozenset[str] = frozenset()
        self._summed: list[str] = []
        self._clear_arrivals()

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
        return dict(self._members)

    @property
    def sums(self) -> tuple[FixedVector, int]:
        """sum omega_i nu_i, (p,) in units of 2^-s, and R 2^32, over all members; 0 for H with the server "mean"."""
        H = self._H.values + self._S.values if self._adds_duals else self._H.values.copy()
        return H, self._R

    def recomputed(self) -> tuple[FixedVector, int]:
        """Both of `sums` afresh from the members and their duals: equal to it after any history."""
        H, R = np.zeros(self._z.size, np.int64), 0
        for device, member in self._members.items():
            R += member.omega * member.penalty
            if self._adds_duals:
                H += member.omega * self._duals.get(device)
        return H, R

    def penalty(self, device: str) -> float:
        """kappa_i now in force: what the next task of this device carries and its contribution names again."""
        return penalty_of(self._member(device).penalty)

    def weights(self, device: str) -> quality.Weights:
        """omega_i and kappa_i 2^32 now in force: with the contributions, all that it takes to compute a close again."""
        member = self._member(device)
        return quality.Weights(omega=member.omega, penalty=member.penalty)

    # ---- members -------------------------------------------------------------------------------------------

    def join(self, device: str, samples: int, *, nu: FixedVector | None = None) -> None:
        """`device` is a member with n_i = `samples`, q_i = 1 and dual `nu`, (p,) int64 (0 where it has none).

        A member that joins again has lost its state: its old share leaves H and R first, the rest stands.
        Raises ContributionError "wrong_shape", "too_large" or "no_samples", and then nothing has changed.
        """
        _check_samples(device, samples)
        member = self._weighed(Member(samples=samples, omega=0, penalty=0))
        dual = np.zeros(self._z.size, np.int64) if nu is None else self._checked_dual(device, nu, member).copy()
        if device in self._members:
            self.retire(device)
        if self._adds_duals:
            self._move_sum(device, member.omega, dual)
            self._duals.put(device, dual)
            member = replace(member, reach=largest(dual))
        self._R += member.omega * member.penalty
        self._members[device] = member

    def retire(self, device: str) -> None:
        """`device` is gone for good: omega_i nu_i and omega_i kappa_i are out of H and R, its dual is dropped.

        What it contributed to the mean of an open round stays there and can no longer be taken back. Never refused for
        want of room: where two liars' huge duals cancelled, H is right modulo 2^64, and right when both are gone.
        """
        member = self._member(device)
        if self._adds_duals:
            dual = self._duals.get(device)
            self._H.add(dual, -member.omega, largest(dual))
            self._duals.drop(device)
        self._R -= member.omega * member.penalty
        self._arrivals[:] = [
            replace(arrival, held=False) if arrival.device == device else arrival for arrival in self._arrivals
        ]
        del self._members[device]

    def set_samples(self, device: str, samples: int) -> None:
        """n_i is `samples` from here on; H and R follow."""
        _check_samples(device, samples)
        self._reweigh(device, replace(self._member(device), samples=samples))

    def set_quality(self, scores: Mapping[str, float]) -> None:
        """The qualities of these devices have moved towards their scores s_i >= 0 (quality.score); H and R follow.

        A q_i is relative to the mean of the last scores of all members; those without a new score keep theirs, so
        that in objective mode only the reporters' duals are read. Raises ContributionError "bad_score", and then
        nothing has changed. A device whose H has no room for the new weight keeps its quality.
        """
        for device, score in scores.items():
            self._member(device)
            if not (score >= 0.0 and math.isfinite(score)):
                raise ContributionError("bad_score", f"device {device}: quality score {score} is no finite number >= 0")
        for device, score in scores.items():
            self._members[device] = replace(self._members[device], score=score)
        known = [member.score for member in self._members.values() if member.score is not None]
        for device, score in scores.items():
            member = self._members[device]
            moved = quality.moved(member.quality, score, math.fsum(known) / len(known))
            with contextlib.suppress(ContributionError):
                self._reweigh(device, replace(member, quality=moved))

    # ---- rounds --------------------------------------------------------------------------------------------

    def open_round(self, cohort: Iterable[str]) -> None:
        """These members are asked; what arrives from others until `close_round` counts, and is reported as late."""
        devices = frozenset(cohort)
        for device in devices:
            self._member(device)
        self._cohort = devices

    def accept(self, device: str, difference: FloatVector, kappa: float) -> int:
        """The dual of `device`, H, and the mean of the round that closes next have moved by `difference`.

        difference: d_i = theta_i - z_hat as the server decoded it, (p,), from whatever z_hat the device started
        at. kappa: the penalty of the task that it answers, which may be older than the one in force.
        Returns the factor, in 1 / WHOLE, at which it counted: WHOLE, or less where it was clipped. The client moves
        its dual by `scaled(difference, factor)`.
        Raises ContributionError "wrong_shape", "not_finite", "bad_penalty", "too_large", "norm_bound" or
        "direction_bound", and then nothing has changed.
        """
        member = self._member(device)
        exact = self._checked(device, difference).astype(np.float64)
        penalty = _checked_penalty(device, kappa)
        square = _square(device, exact)
        factor = self._factor(device, exact, kappa, math.sqrt(square))
        step = self._step(device, exact, kappa, factor)
        arrival = Arrival(device=device, omega=member.omega, penalty=penalty, factor=factor, square=square)
        self._take_in(arrival, step)
        return factor

    def retract(self, device: str, difference: FloatVector, kappa: float) -> None:
        """A contribution of the open round has left the dual of `device`, H and the mean, as if it had never come.

        difference, kappa: as they were accepted. The device must forget it as well, or join again.
        Raises ContributionError "not_contributed" where the open round does not hold it.
        """
        exact = self._checked(device, difference).astype(np.float64)
        arrival = self._arrival(device, _checked_penalty(device, kappa), _square(device, exact))
        member = self._members[device]
        step = self._step(device, exact, kappa, arrival.factor)
        magnitude = largest(step)
        if self._adds_duals:
            self._move_sum(device, arrival.omega - member.omega, step)  # nothing unless its weight has changed since
            self._duals.advance(device, -step)
            self._members[device] = replace(member, reach=member.reach - magnitude)
        self._S.add(step, -arrival.omega, magnitude)
        self._weight -= arrival.weight
        self._squares -= arrival.weighted_square
        self._arrivals.remove(arrival)

    def accept_sum(self, partial: PartialSum) -> None:
        """H and the mean of the round that closes next have moved by what these members contribute together.

        Their steps are not known one by one: who adds them up also tells them to the dual store, before one of the
        devices is retired or weighs otherwise. Raises ContributionError "bad_sum" or "too_large", and then nothing has
        changed, and ConfigError where the method must see every single contribution.
        """
        if self._method.sees_each or self._privacy is not None:
            raise ConfigError(f"method {self._method.name} bounds single contributions; give it no sums of several")
        self._check_sum(partial)
        for device in partial.devices:
            self._member(device)
        magnitude = largest(partial.steps)
        self._check_room(f"sum over {len(partial.devices)} devices", partial.steps, 1, magnitude)
        self._S.add(partial.steps, 1, magnitude)
        self._weight += partial.weight
        self._squares += partial.squares
        self._summed.extend(partial.devices)

    def partial(self) -> PartialSum:
        """All that arrived since the last close, for the `accept_sum` of a root: its z is then that of one server."""
        return PartialSum(
            steps=self._S.values.copy(), weight=self._weight, squares=self._squares, devices=self._contributors()
        )

    # ---- a root and its workers ------------------------------------------------------------------------------

    def hand_over(self) -> tuple[Share, RoundReport]:
        """A worker's close: what arrived is in H and in the share for its root, and z waits for `follow`.

        What arrives from here on is in the next share.
        """
        share = Share(
            steps=self._S.values.copy(),
            weight=self._weight,
            squares=self._squares,
            duals=self.sums[0],
            penalties=self._R,
        )
        report = self._report(step=0.0, correction=0.0)
        if self._adds_duals:
            self._H.add(self._S.values, 1, self._S.bound)
        self._cohort = frozenset()
        self._clear_arrivals()
        return share, report

    def follow(self, z_hat: FloatVector) -> None:
        """The root's consensus, (p,) in our type, is that of our devices; the sums stay."""
        self._check_shape("consensus of the root", z_hat)
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
            self._check_share(worker, share)
        steps, duals = self._total([share.steps for share in shares.values()]), self._zero()
        if self._adds_duals:
            duals = self._total([share.duals for share in shares.values()]) - steps
        self._S, self._H = ExactSum(steps), ExactSum(duals)
        self._R = sum(share.penalties for share in shares.values())
        self._weight = sum(share.weight for share in shares.values())
        self._squares = sum(share.squares for share in shares.values())
        self._summed = [worker for worker, share in shares.items() if share.weight]

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
        share = min(1.0, self._weight / self._R) if relaxed and self._R else 1.0
        previous, previous_hat = self._z, self._z_hat
        contributors = self._contributors()
        moves = bool(contributors) or release is not None
        center = self._center(contributions, release) if moves else np.zeros(self._z.size)
        correction = self._close_sums()
        if moves:
            self._z = self._z_hat + share * (center + correction)
            project(self._z, self._constraints)
            self._publish(transmit)
        report = self._report(float(np.linalg.norm(self._z - previous)), float(np.linalg.norm(correction)))
        self._close_screen(contributors, self._z_hat - previous_hat)
        self._cohort = frozenset()
        self._clear_arrivals()
        return report

    # ---- storage -------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """All but the duals, also in the middle of a round: "arrays" of numpy vectors, "scalars" for JSON or msgpack.

        Integers that may pass 64 bits are texts. The order of arrivals leaves no trace.
        """
        arrays, screen = self._screen.snapshot()
        return {
            "arrays": {
                "z": self.z,
                "z_hat": self.z_hat,
                "H": self._H.values.copy(),
                "S": self._S.values.copy(),
                **arrays,
            },
            "scalars": {
                "R": str(self._R),
                "weight": str(self._weight),
                "squares": str(self._squares),
                "cohort": sorted(self._cohort),
                "arrivals": [asdict(arrival) for arrival in sorted(self._arrivals)],
                "summed": sorted(self._summed),
                "members": {device: asdict(member) for device, member in self._members.items()},
                "screen": screen,
            },
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
        restored._H, restored._S = ExactSum(arrays["H"]), ExactSum(arrays["S"])
        restored._R, restored._weight = int(scalars["R"]), int(scalars["weight"])
        restored._squares = int(scalars["squares"])
        restored._cohort = frozenset(scalars["cohort"])
        restored._arrivals = [Arrival(**fields) for fields in scalars["arrivals"]]
        restored._summed = list(scalars["summed"])
        restored._members = {device: Member(**fields) for device, fields in scalars["members"].items()}
        restored._screen.restore(arrays, scalars["screen"])
        return restored

    # ---- private -------------------------------------------------------------------------------------------

    @property
    def _adds_duals(self) -> bool:
        return self._method.server == "fresh"

    def _zero(self) -> FixedVector:
        return np.zeros(self._z.size, np.int64)

    def _total(self, vectors: Sequence[FixedVector]) -> FixedVector:
        """Their sum, (p,); as float64, which cannot wrap, it is far from int64's limit."""
        magnitudes = sum((np.abs(vector.astype(np.float64)) for vector in vectors), np.zeros(self._z.size))
        if magnitudes.max() > SUM_LIMIT:
            raise ContributionError("too_large", "the sum of all shares would leave 62 bits; did a training diverge?")
        return sum(vectors, self._zero())

    def _check_share(self, worker: str, share: Share) -> None:
        self._check_shape(f"share of worker {worker}", share.steps)
        self._check_shape(f"share of worker {worker}", share.duals)
        if not (share.weight >= 0 and share.squares >= 0 and share.penalties >= 0):
            raise ContributionError("bad_sum", f"worker {worker}: a weight in its share is below 0; update it")

    def _contributors(self) -> tuple[str, ...]:
        return tuple(sorted([*(arrival.device for arrival in self._arrivals), *self._summed]))

    def _member(self, device: str) -> Member:
        if device not in self._members:
            raise ContributionError("not_a_member", f"device {device} is no member of the consensus; let it join first")
        return self._members[device]

    def _arrival(self, device: str, penalty: int, square: float) -> Arrival:
        for arrival in self._arrivals:
            if arrival.held and (arrival.device, arrival.penalty, arrival.square) == (device, penalty, square):
                return arrival
        raise ContributionError("not_contributed", f"device {device}: the open round holds no such contribution of it")

    def _weighed(self, member: Member) -> Member:
        omega, penalty = quality.weights(
            member.samples, member.quality, rho=self._method.rho, exponent=self._method.exponent
        )
        return replace(member, omega=omega if self._privacy is None else 1, penalty=penalty)

    @property
    def _rho(self) -> float:
        return penalty_of(fixed_penalty(self._method.rho))

    def _factor(self, device: str, exact: NDArray[np.float64], kappa: float, norm: float) -> int:
        if self._privacy is None:
            return self._screen.factor(device, exact, norm)
        return clip_factor(self._step(device, exact, kappa, WHOLE), self._bound)

    def _reweigh(self, device: str, member: Member) -> None:
        old, new = self._members[device], self._weighed(member)
        if self._adds_duals and new.omega != old.omega:
            self._move_sum(device, new.omega - old.omega, self._duals.get(device))
        self._R += new.omega * new.penalty - old.omega * old.penalty
        self._members[device] = new

    def _step(self, device: str, exact: NDArray[np.float64], kappa: float, factor: int) -> FixedVector:
        try:
            return dual_step(scaled(exact, factor), kappa, self._bits)
        except ContributionError as error:
            raise ContributionError(error.code, f"device {device}: {error}") from error

    def _take_in(self, arrival: Arrival, step: FixedVector) -> None:
        magnitude = largest(step)
        self._check_room(f"device {arrival.device}", step, arrival.omega, magnitude)
        if self._adds_duals:
            member = self._members[arrival.device]
            reach = self._reach(arrival.device, member, step, magnitude)
            self._duals.advance(arrival.device, step)
            self._members[arrival.device] = replace(member, reach=reach)
        self._S.add(step, arrival.omega, magnitude)
        self._weight += arrival.weight
        self._squares += arrival.weighted_square
        self._arrivals.append(arrival)

    def _check_room(self, where: str, step: FixedVector, factor: int, magnitude: int) -> None:
        """The round's sum has room for factor step, and so has H with it."""
        if self._H.bound + self._S.bound + factor * magnitude >= SUM_LIMIT:
            self._look(where, self._S.values + factor * step.astype(np.float64))
            self._look_at_total(where, step, factor)

    def _look_at_total(self, where: str, vector: FixedVector, factor: int) -> None:
        self._look(where, self._H.values.astype(np.float64) + self._S.values + factor * vector.astype(np.float64))
        self._H.look()
        self._S.look()

    def _look(self, where: str, total: NDArray[np.float64]) -> None:
        if np.abs(total).max() > SUM_LIMIT:  # as float64, which cannot wrap; its rounding is far from int64's limit
            raise ContributionError(
                "too_large", f"{where}: the weighted sum of the duals would leave 62 bits; did the training diverge?"
            )

    def _reach(self, device: str, member: Member, step: FixedVector, magnitude: int) -> int:
        """Bound of nu_i after `step`, by the stored dual itself where the running bound is used up."""
        if member.reach + magnitude < SUM_LIMIT:
            return member.reach + magnitude
        true = largest(self._duals.get(device) + step)
        if true >= SUM_LIMIT:
            raise ContributionError(
                "too_large", f"device {device}: its dual would leave 62 bits; let it join again without its state"
            )
        # every arrival that is taken back lowers the bound by up to STEP_LIMIT, and may raise the dual by as much
        held = 1 + sum(arrival.device == device for arrival in self._arrivals)
        return true + 2 * held * STEP_LIMIT

    def _move_sum(self, device: str, factor: int, vector: FixedVector) -> None:
        """H += factor vector."""
        if factor == 0:
            return
        magnitude = largest(vector)
        if self._H.bound + self._S.bound + abs(factor) * magnitude >= SUM_LIMIT:
            self._look_at_total(f"device {device}", vector, factor)
        self._H.add(vector, factor, magnitude)

    def _center(self, contributions: Contributions | None, release: Release | None) -> NDArray[np.float64]:
        """The mean of the round's differences, or what stands in for it, (p,)."""
        if self._privacy is not None:
            return self._private_mean(self._privacy, release)
        if self._method.robust not in ("trimmed", "median"):
            return self._ratio(self._S.values, self._weight)
        if self._screen.measuring:
            return np.zeros(self._z.size)
        if contributions is None:
            raise ConfigError(f'method {self._method.name}: robust = "{self._method.robust}" needs all contributions')
        return fuse(self._method, contributions, self._contributors(), self._z.size)

    def _private_mean(self, privacy: Privacy, release: Release | None) -> NDArray[np.float64]:
        if release is None:
            raise ConfigError("a private round closes with the key of its noise; give close_round its release")
        std = privacy.std(self._rho, self._bits)
        total = noised(self._S.values, std, key=release.key, round_number=release.round_number)
        return self._ratio(total, release.expected * fixed_penalty(self._rho))

    def _close_sums(self) -> NDArray[np.float64]:
        """H holds this round's sum. Returns H / R, (p,)."""
        if not self._adds_duals:
            return np.zeros(self._z.size)
        self._H.add(self._S.values, 1, self._S.bound)
        return self._ratio(self._H.values, self._R) if self._R else np.zeros(self._z.size)

    def _ratio(self, total: FixedVector, weight: float) -> NDArray[np.float64]:
        """total / weight in the units of theta, (p,)."""
        unit = 2.0 ** (PENALTY_BITS - self._bits)
        ratio: NDArray[np.float64] = total.astype(np.float64) * unit / float(weight)
        return ratio

    def _close_screen(self, contributors: tuple[str, ...], step: FloatVector) -> None:
        came = len(self._cohort.intersection(contributors))
        self._screen.close(
            [math.sqrt(arrival.square) for arrival in self._arrivals],
            step,
            members=len(self._members),
            majority=2 * came > len(self._cohort) or not self._cohort,
        )

    def _publish(self, transmit: Callable[[FloatVector], FloatVector] | None) -> None:
        if transmit is None:
            self._z_hat = self._z.astype(self._z_hat.dtype)
            return
        decoded = transmit((self._z - self._z_hat).astype(self._z_hat.dtype))
        self._z_hat = self._z_hat + decoded.astype(self._z_hat.dtype, copy=False)

    def _report(self, step: float, correction: float) -> RoundReport:
        contributors = self._contributors()
        total = sum(member.omega for member in self._members.values())
        return RoundReport(
            primal_residual=self._primal_residual() if contributors else math.nan,
            dual_residual=step * penalty_of(self._R) / total if total else 0.0,
            step=step,
            correction=correction,
            contributors=contributors,
            late=tuple(device for device in contributors if device not in self._cohort),
        )

    def _primal_residual(self) -> float:
        return math.ldexp(math.sqrt(self._squares / self._weight), -_SQUARE_BITS // 2)

    def _clear_arrivals(self) -> None:
        self._S = ExactSum(np.zeros(self._z.size, np.int64))
        self._weight = 0
        self._squares = 0
        self._arrivals: list[Arrival] = []
        self._summed = []

    def _checked(self, device: str, vector: FloatVector) -> FloatVector:
        """`vector` in our type; what cannot enter a sum without spoiling it for everybody is refused."""
        self._check_shape(f"device {device}", vector)
        if not np.isfinite(vector).all():
            raise ContributionError(
                "not_finite", f"device {device}: vector holds NaN or infinity; its training diverged"
            )
        return vector.astype(self._z_hat.dtype, copy=False)

    def _checked_dual(self, device: str, nu: FixedVector, member: Member) -> FixedVector:
        self._check_shape(f"device {device}", nu)
        if nu.dtype != np.int64 or member.omega * largest(nu) >= SUM_LIMIT:
            raise ContributionError(
                "too_large", f"device {device}: omega nu is no int64 vector below 2^62; let it join without a dual"
            )
        return nu

    def _check_shape(self, whose: str, vector: NDArray[Any]) -> None:
        if vector.shape != self._z_hat.shape:
            raise ContributionError(
                "wrong_shape",
                f"{whose}: vector of shape {vector.shape}, expected {self._z_hat.shape}; "
                "was it started with another model file?",
            )

    def _check_sum(self, partial: PartialSum) -> None:
        fits = partial.steps.shape == self._z_hat.shape and partial.steps.dtype == np.int64
        if not (fits and partial.weight > 0 and partial.squares >= 0 and partial.devices):
            raise ContributionError(
                "bad_sum",
                f"sum over {len(partial.devices)} devices: {partial.steps.dtype} vector of shape {partial.steps.shape} "
                f"with weight {partial.weight}; expected int64 of shape {self._z_hat.shape} and a weight above 0",
            )


def _check_samples(device: str, samples: int) -> None:
    if not 1 <= samples < _SAMPLES_LIMIT:
        raise ContributionError("no_samples", f"device {device}: {samples} training samples; it needs at least 1")


def _checked_penalty(device: str, kappa: float) -> int:
    if not (kappa > 0.0 and math.isfinite(kappa) and penalty_of(fixed_penalty(kappa)) == kappa):
        raise ContributionError(
            "bad_penalty", f"device {device}: penalty {kappa} is no finite multiple of 2^-32 above 0; send the task's"
        )
    return fixed_penalty(kappa)


def _square(device: str, exact: NDArray[np.float64]) -> float:
    """|d|^2, by numpy's own sum: that of BLAS would depend on the number of threads."""
    with np.errstate(over="ignore"):
        square = float(np.square(exact).sum())
    if not math.isfinite(square):
        raise ContributionError("too_large", f"device {device}: the norm of its step overflows; its training diverged")
    return square

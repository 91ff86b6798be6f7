"""Weighted consensus ADMM with partial participation: algorithm.md, section 4.

    minimise  sum_i omega_i F_i(theta_i)  subject to  theta_i = z for all i
    server    z <- z_hat + sum_S omega_i kappa_i d_i / sum_S omega_i kappa_i + H / R,    d_i = theta_i - z_hat
    client    nu_i <- nu_i + kappa_i d_i

H = sum omega_i nu_i and R = sum omega_i kappa_i run over all members, S is what arrived since the last close.

Theory of operation
-------------------
z_hat is what every client holds. z is where the server wants it: the two differ by rounding, or by what a few-bit
code left out, and clients and server both go on with z_hat.

The server keeps each nu_i because omega_i nu_i must leave H when a device is retired or its weight changes, and
it advances nu_i by the arithmetic of the client, bit for bit: `advance_dual` is the only place where a dual moves.
H moves by omega_i times the change of the stored nu_i, not by omega_i kappa_i d_i, so the rounding of the dual is
in H as well and H stays the sum of what the clients hold.

Any fixed point has d_i = 0 for all i, hence H = 0, hence sum omega_i grad F_i(z) = 0, whatever kappa_i > 0 is. So
a change of penalties or a late d_i moves the path and not the end. (FedDyn's server, Acar et al., ICLR 2021,
arXiv 2111.04263, with weights.)
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.consensus import quality
from fedeq_edge.consensus.constraint import Constraint, project
from fedeq_edge.consensus.methods import Method
from fedeq_edge.errors import ConfigError, ContributionError

Vector = NDArray[np.floating]
"""Shape (p,); float32 on the wire and in the stores. The type of the first z is that of z_hat and of the duals."""


def advance_dual(nu: Vector, kappa: float, difference: Vector) -> Vector:
    """nu_i + kappa_i d_i, a new vector in the type of `nu`: the dual step, the same bits on client and server.

    kappa is rounded to that type first; product and sum are two roundings (numpy does not fuse them), so every
    platform agrees. nu is unscaled: it has the units of a gradient. Source: algorithm.md, section 4, step 4.
    """
    step = difference.astype(nu.dtype, copy=False) * nu.dtype.type(kappa)
    advanced: Vector = nu + step
    return advanced


class DualStore(Protocol):
    """Where the server keeps nu_i, one vector (p,) per member. Stored vectors are never changed in place."""

    def get(self, device: str) -> Vector:
        """The vector that was put last."""
        ...

    def put(self, device: str, nu: Vector) -> None:
        """Keep this vector in place of an earlier one."""
        ...

    def drop(self, device: str) -> None:
        """Forget this device's vector."""
        ...


class MemoryDuals:
    """Duals in memory, O(members p): for simulations and tests; a gateway keeps them on disk."""

    def __init__(self) -> None:
        self._duals: dict[str, Vector] = {}

    def get(self, device: str) -> Vector:
        """The vector that was put last; KeyError without one."""
        return self._duals[device]

    def put(self, device: str, nu: Vector) -> None:
        """Keep this vector in place of an earlier one."""
        self._duals[device] = nu

    def drop(self, device: str) -> None:
        """Forget this device's vector; KeyError without one."""
        del self._duals[device]


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """What the server knows of one device. samples: n_i >= 1. quality: q_i. score: the last s_i, None before."""

    samples: int
    quality: float = 1.0
    score: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """How far the fleet is from agreeing, after one `close_round`.

    primal_residual: root of the mean of |d_i|^2 with weights omega_i kappa_i; NaN for an empty round.
    step: |z - z_old|. dual_residual: step times the mean penalty (Boyd et al. 2011, section 3.3).
    correction: |H / R|, which vanishes at the optimum (0 for the server "mean"). contributors: in order of arrival.
    late: those of them that were not in the cohort.
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
    Calls for a device that is no member raise ContributionError with code "not_a_member".
    """

    def __init__(
        self, z: Vector, *, method: Method, constraints: Sequence[Constraint] = (), duals: DualStore | None = None
    ) -> None:
        if z.ndim != 1 or z.size == 0:
            raise ConfigError(f"the consensus starts from shape {z.shape}; give one flat vector of parameters")
        self._method = method
        self._constraints = tuple(constraints)
        self._duals: DualStore = MemoryDuals() if duals is None else duals
        self._z = z.astype(np.float64)
        project(self._z, self._constraints)
        self._z_hat: Vector = self._z.astype(z.dtype)
        self._members: dict[str, Member] = {}
        self._H = np.zeros(z.size)
        self._R = 0.0
        self._cohort: frozenset[str] = frozenset()
        self._clear_arrivals()

    # ---- what it holds -------------------------------------------------------------------------------------

    @property
    def z(self) -> NDArray[np.float64]:
        """The consensus before rounding or coding, (p,) float64, a copy."""
        return self._z.copy()

    @property
    def z_hat(self) -> Vector:
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
    def sums(self) -> tuple[NDArray[np.float64], float]:
        """The running H, (p,), and R; H is 0 for the server "mean"."""
        return self._H.copy(), self._R

    def recomputed(self) -> tuple[NDArray[np.float64], float]:
        """H and R summed afresh over all members: equal to `sums` up to float64 rounding after any history."""
        H, R = np.zeros(self._z.size), 0.0
        for device, member in self._members.items():
            omega, kappa = self._weights(member)
            R += omega * kappa
            if self._adds_duals:
                H += omega * self._duals.get(device).astype(np.float64)
        return H, R

    def penalty(self, device: str) -> float:
        """kappa_i now in force: what the next task of this device carries and its contribution names again."""
        return self._weights(self._member(device)).kappa

    # ---- members -------------------------------------------------------------------------------------------

    def join(self, device: str, samples: int, *, nu: Vector | None = None) -> None:
        """`device` is a member with n_i = `samples` >= 1, q_i = 1 and dual `nu` (0 where it has none).

        A member that joins again has lost its state: its old share leaves H and R first, the rest stands.
        Raises ContributionError "wrong_shape", "not_finite" or "no_samples", and then nothing has changed.
        """
        _check_samples(device, samples)
        dual = np.zeros_like(self._z_hat) if nu is None else self._checked(device, nu).copy()
        if device in self._members:
            self.retire(device)
        member = Member(samples=samples)
        omega, kappa = self._weights(member)
        self._R += omega * kappa
        if self._adds_duals:
            self._H += omega * dual.astype(np.float64)
            self._duals.put(device, dual)
        self._members[device] = member

    def retire(self, device: str) -> None:
        """`device` is gone for good: omega_i nu_i and omega_i kappa_i are out of H and R, its dual is dropped.

        What it contributed to the mean of an open round stays there.
        """
        omega, kappa = self._weights(self._member(device))
        self._R -= omega * kappa
        if self._adds_duals:
            self._H -= omega * self._duals.get(device).astype(np.float64)
            self._duals.drop(device)
        del self._members[device]
        if not self._members:  # the rounding that additions and subtractions left behind must not outlive them
            self._H[:], self._R = 0.0, 0.0

    def set_samples(self, device: str, samples: int) -> None:
        """n_i is `samples` >= 1 from here on; H and R follow."""
        _check_samples(device, samples)
        self._reweigh(device, replace(self._member(device), samples=samples))

    def set_quality(self, scores: Mapping[str, float]) -> None:
        """The qualities of these devices have moved towards their scores s_i >= 0 (quality.score); H and R follow.

        A q_i is relative to the mean of the last scores of all members; those without a new score keep theirs, so
        that in objective mode only the reporters' duals are read. Raises ContributionError "bad_score", and then
        nothing has changed.
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
            self._reweigh(device, replace(member, quality=moved))

    # ---- rounds --------------------------------------------------------------------------------------------

    def open_round(self, cohort: Iterable[str]) -> None:
        """These members are asked; what arrives from others until `close_round` counts, and is reported as late."""
        devices = frozenset(cohort)
        for device in devices:
            self._member(device)
        self._cohort = devices

    def accept(self, device: str, difference: Vector, kappa: float) -> None:
        """The dual of `device`, H, and the mean of the round that closes next have moved by `difference`.

        difference: d_i = theta_i - z_hat as the server decoded it, (p,), from whatever z_hat the device started
        at. kappa: the penalty of the task that it answers, which may be older than the one in force.
        Raises ContributionError "wrong_shape", "not_finite" or "bad_penalty", and then nothing has changed.
        """
        member = self._member(device)
        checked = self._checked(device, difference)
        if not (kappa > 0.0 and math.isfinite(kappa)):
            raise ContributionError("bad_penalty", f"device {device}: penalty {kappa} is no finite number above 0")
        exact = checked.astype(np.float64)
        omega = self._weights(member).omega
        if self._adds_duals:
            self._move_dual(device, omega, kappa, checked)  # first, as it may refuse
        weight = omega * kappa
        self._mean_sum += weight * exact
        self._mean_weight += weight
        self._square_sum += weight * float(exact @ exact)
        self._contributors.append(device)

    def close_round(self, transmit: Callable[[Vector], Vector] | None = None) -> RoundReport:
        """z has made its step and lies within the constraints, z_hat is published, and a new round may open.

        transmit: codes the difference z - z_hat, (p,), and returns what every client will decode; z_hat advances
        by that. Without it z_hat is z, rounded. z_hat itself is not projected when a code moved it. A round to
        which nobody contributed leaves z and z_hat where they were.
        """
        previous = self._z
        correction = self._H / self._R if self._adds_duals and self._R > 0.0 else np.zeros(self._z.size)
        if self._contributors:
            self._z = self._z_hat + self._mean_sum / self._mean_weight + correction
            project(self._z, self._constraints)
            self._publish(transmit)
        report = self._report(float(np.linalg.norm(self._z - previous)), float(np.linalg.norm(correction)))
        self._cohort = frozenset()
        self._clear_arrivals()
        return report

    # ---- storage -------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """All but the duals, also in the middle of a round: "arrays" of numpy vectors, "scalars" for JSON."""
        return {
            "arrays": {"z": self.z, "z_hat": self.z_hat, "H": self._H.copy(), "mean_sum": self._mean_sum.copy()},
            "scalars": {
                "R": self._R,
                "mean_weight": self._mean_weight,
                "square_sum": self._square_sum,
                "cohort": sorted(self._cohort),
                "contributors": list(self._contributors),
                "members": {
                    device: {"samples": member.samples, "quality": member.quality, "score": member.score}
                    for device, member in self._members.items()
                },
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
    ) -> "Consensus":
        """A consensus that continues bit for bit; method, constraints and duals are those of the snapshot's owner."""
        arrays, scalars = snapshot["arrays"], snapshot["scalars"]
        restored = cls(arrays["z_hat"], method=method, constraints=constraints, duals=duals)
        restored._z, restored._z_hat = arrays["z"].copy(), arrays["z_hat"].copy()
        restored._H, restored._R = arrays["H"].copy(), scalars["R"]
        restored._mean_sum, restored._mean_weight = arrays["mean_sum"].copy(), scalars["mean_weight"]
        restored._square_sum = scalars["square_sum"]
        restored._cohort = frozenset(scalars["cohort"])
        restored._contributors = list(scalars["contributors"])
        restored._members = {device: Member(**fields) for device, fields in scalars["members"].items()}
        return restored

    # ---- private -------------------------------------------------------------------------------------------

    @property
    def _adds_duals(self) -> bool:
        return self._method.server == "fresh"

    def _weights(self, member: Member) -> quality.Weights:
        return quality.weights(member.samples, member.quality, rho=self._method.rho, exponent=self._method.exponent)

    def _member(self, device: str) -> Member:
        if device not in self._members:
            raise ContributionError("not_a_member", f"device {device} is no member of the consensus; let it join first")
        return self._members[device]

    def _reweigh(self, device: str, member: Member) -> None:
        old, new = self._weights(self._members[device]), self._weights(member)
        self._R += new.omega * new.kappa - old.omega * old.kappa
        if self._adds_duals and new.omega != old.omega:
            self._H += (new.omega - old.omega) * self._duals.get(device).astype(np.float64)
        self._members[device] = member

    def _move_dual(self, device: str, omega: float, kappa: float, difference: Vector) -> None:
        old = self._duals.get(device)
        with np.errstate(over="ignore"):
            new = advance_dual(old, kappa, difference)
        if not np.isfinite(new).all():
            raise ContributionError("not_finite", f"device {device}: its dual overflows; its training diverged")
        self._H += omega * (new.astype(np.float64) - old)
        self._duals.put(device, new)

    def _publish(self, transmit: Callable[[Vector], Vector] | None) -> None:
        if transmit is None:
            self._z_hat = self._z.astype(self._z_hat.dtype)
            return
        decoded = transmit((self._z - self._z_hat).astype(self._z_hat.dtype))
        self._z_hat = self._z_hat + decoded.astype(self._z_hat.dtype, copy=False)

    def _report(self, step: float, correction: float) -> RoundReport:
        total = math.fsum(self._weights(member).omega for member in self._members.values())
        return RoundReport(
            primal_residual=math.sqrt(self._square_sum / self._mean_weight) if self._contributors else math.nan,
            dual_residual=step * self._R / total if total > 0.0 else 0.0,
            step=step,
            correction=correction,
            contributors=tuple(self._contributors),
            late=tuple(device for device in self._contributors if device not in self._cohort),
        )

    def _clear_arrivals(self) -> None:
        self._mean_sum = np.zeros(self._z.size)
        self._mean_weight = 0.0
        self._square_sum = 0.0
        self._contributors: list[str] = []

    def _checked(self, device: str, vector: Vector) -> Vector:
        """`vector` in our type; what cannot enter a sum without spoiling it for everybody is refused."""
        if vector.shape != self._z_hat.shape:
            raise ContributionError(
                "wrong_shape",
                f"device {device}: vector of shape {vector.shape}, expected {self._z_hat.shape}; "
                "was it started with another model file?",
            )
        if not np.isfinite(vector).all():
            raise ContributionError(
                "not_finite", f"device {device}: vector holds NaN or infinity; its training diverged"
            )
        return vector.astype(self._z_hat.dtype, copy=False)


def _check_samples(device: str, samples: int) -> None:
    if samples < 1:
        raise ContributionError("no_samples", f"device {device}: {samples} training samples; it needs at least 1")

"""Client-level differential privacy in the centre: a bound on each contribution, Gaussian noise on their sum.

    step_i = rint(f_i kappa d_i),  f_i <= 1 such that |step_i| <= bound
    S = sum_i step_i + N(0, (noise_multiplier bound)^2)
    z <- z_hat + S / (expected contributors * kappa)

(McMahan et al., Learning Differentially Private Recurrent Language Models, ICLR 2018.) What z tells about whether a
device took part at all, with everything that it holds, is then limited by (epsilon, delta).

Theory of operation
-------------------
Who is trusted: the aggregator, which sees contributions before the noise, and the broker's access rules. Masked sums
(fedeq_edge.masking) hide single contributions from the aggregator too; each device then bounds its own step.

What is needed: every contributor weighs the same (omega_i = 1, one kappa), as the bound is on what enters the sum; the
divisor is the *expected* number of contributors, as the true one would tell who was missing; and server = "mean".
With duals in the server's step the guarantee would stand if H summed the noisy sums, for all that follows from them
is post-processing, but that noise would never leave z again: H would walk away at random by bound noise_multiplier
sqrt(rounds). And the exact omega_i nu_i of a retired device may not be taken out, as nobody has noised it. A client's
own dual is no release: it moves by the bounded step on both sides.

What is not taken: a second contribution of a device in one round, and one that comes after its round has closed, as
either would bring a device into a sum twice, or into one that it was not drawn for. A round that lacks its quorum asks
everybody else as well (schedule.py), and so counts as one in which everybody was asked.

Not covered: losses, residuals, sample counts and other figures that devices report. They go to the aggregator alone.
Nor how many devices are online, which is in the divisor, and whether a round reached its quorum: both are public here.
Where the cohort is sampled, epsilon counts on nobody but the aggregator knowing who was in it.

Rounding. The sum is of integers, so adding the rounded noise is the same as rounding after adding: post-processing. One
unit is far coarser than the spacing of float64 at the size of the noise (std below 2^50 units), which keeps float64's
pattern out of the released bits (Mironov, On Significance of the Least Significant Bits, CCS 2012).
"""

import functools
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedeq_edge.consensus.fixed import WHOLE, fraction_bits
from fedeq_edge.consensus.methods import Method
from fedeq_edge.errors import ConfigError

if TYPE_CHECKING:
    from dp_accounting import DpEvent

Steps = NDArray[np.int64]
Sampling = Literal["poisson", "fixed"]
_NOISE_STD_MOST: Final = 2.0**50
# The library's own orders, without those below 2, where its series may not converge; they matter beyond epsilon 60.
_ORDERS: Final = (*(1 + x / 10 for x in range(10, 100)), *range(11, 64), 128, 256, 512, 1024)


class Privacy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is promised, checked when made (ConfigError).

    clip: largest |d_i| that counts in full, > 0. noise_multiplier: std of the noise over the bound, > 0; near 1 is
    usual. delta: chance that epsilon does not hold, well below 1 / fleet.
    sampling: "poisson", each member is asked with the same probability by itself (`poisson_cohort`), or "fixed", a
    uniform cohort of fixed size. A cohort chosen by anything else (battery, data age) is one with rate 1.
    """

    clip: float
    noise_multiplier: float
    delta: float = 1e-5
    sampling: Sampling = "poisson"

    def __post_init__(self) -> None:
        for name in ("clip", "noise_multiplier"):
            value = getattr(self, name)
            if not (value > 0.0 and math.isfinite(value)):
                raise ConfigError(f"privacy: {name} is {value}; give a finite number above 0")
        if not 0.0 < self.delta < 1.0:
            raise ConfigError(f"privacy: delta is {self.delta}; give a number between 0 and 1, such as 1e-5")

    def check(self, method: Method) -> None:
        """The method can run under this. Raises ConfigError naming the field that stands in the way."""
        if method.server != "mean":
            raise ConfigError(
                f"privacy: method {method.name} has server = {method.server!r}, whose sum of duals would gather the "
                'noise of all rounds; set server = "mean"'
            )
        if method.quality != "uniform":
            raise ConfigError(
                f"privacy: method {method.name} weighs devices by {method.quality!r}, so they have no common bound; "
                'set quality = "uniform"'
            )
        if method.sees_each:
            raise ConfigError(
                f"privacy: method {method.name} compares devices with each other, and what it leaves out would tell of "
                'the others; set robust = "none", and neither norm_limit nor min_cosine'
            )
        self.bound(method.rho, fraction_bits(np.float32))

    def bound(self, kappa: float, bits: int) -> int:
        """The clip in units 2^-bits of a dual step, floor(kappa clip 2^bits). Raises ConfigError for 0 or too much."""
        bound = math.floor(math.ldexp(kappa * self.clip, bits))
        if bound < 1 or self.noise_multiplier * bound > _NOISE_STD_MOST:
            raise ConfigError(
                f"privacy: clip {self.clip} times kappa {kappa} is {bound} units of 2^-{bits}; give a clip for which "
                f"noise and bound lie between 1 and {_NOISE_STD_MOST:.0g} units"
            )
        return bound

    def std(self, kappa: float, bits: int) -> float:
        """Standard deviation of the noise on a sum, in units of 2^-bits. Raises ConfigError as `bound` does."""
        return self.noise_multiplier * self.bound(kappa, bits)

    def draw(
        self, devices: Sequence[str], share: float, *, key: bytes, round_number: int
    ) -> tuple[tuple[str, ...], "Draw"]:
        """The cohort of a round, the same after a restart, and how it was drawn: may be empty under "poisson".

        devices: who can be asked, at least one. share: of them that are asked on average, above 0, at most 1.
        """
        if self.sampling == "poisson":
            cohort = poisson_cohort(devices, share, key=key, round_number=round_number)
            return cohort, Draw(rate=share, expected=share * len(devices))
        size = max(1, round(share * len(devices)))
        cohort = fixed_cohort(devices, size, key=key, round_number=round_number)
        return cohort, Draw(rate=size / len(devices), expected=float(size))


class Draw(msgspec.Struct, frozen=True, kw_only=True):
    """How the cohort of a round was drawn. rate: the chance of a device to be in it. expected: its size on average."""

    rate: float
    expected: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What it takes to let out the sum of one round: the key of its noise, and the divisor of its mean."""

    key: bytes = field(repr=False)
    round_number: int
    expected: float


def clip_factor(step: Steps, bound: int) -> int:
    """A factor f in units of 2^-16 for which rint(f kappa d), (p,), surely has a Euclidean norm of at most `bound`.

    step: rint(kappa d), what the dual would move by. 65536 where that is short enough, else below the largest such
    factor by no more than the two roundings, sqrt(p) units together, make uncertain.
    """
    norm = float(np.linalg.norm(step.astype(np.float64))) * (1.0 + 1e-9)  # more than float64 can be wrong by
    if norm <= bound:
        return WHOLE
    room = max(bound - math.sqrt(step.size), 0.0)
    return math.floor(WHOLE * (room / norm))


def noised(total: Steps, std: float, *, key: bytes, round_number: int) -> Steps:
    """`total`, (p,), plus Gaussian noise of `std` units, rounded to whole units.

    key: 32 secret bytes that never leave the aggregator. The noise is a function of key, round and total (SHAKE-256, on
    one machine to the bit): a restarted aggregator publishes the same sum again, whereas fresh noise on the same sum
    would average out, and the same noise on another sum would give away the difference.
    """
    digest = hashlib.sha256(total.astype("<i8", copy=False).tobytes()).digest()
    stream = hashlib.shake_256(_keyed(b"noise", key, round_number) + digest)
    return total + np.rint(std * _gaussian(stream.digest(16 * -(-total.size // 2)), total.size)).astype(np.int64)


def poisson_cohort(devices: Iterable[str], rate: float, *, key: bytes, round_number: int) -> tuple[str, ...]:
    """Each device with probability `rate`, independently: the cohort of this round, the same after a restart."""
    return tuple(device for device in devices if _uniform(_keyed(b"cohort", key, round_number), device) < rate)


def fixed_cohort(devices: Iterable[str], size: int, *, key: bytes, round_number: int) -> tuple[str, ...]:
    """`size` of the devices, every such set with the same chance; the same after a restart."""
    prefix = _keyed(b"cohort", key, round_number)
    return tuple(sorted(sorted(devices, key=lambda device: _uniform(prefix, device))[:size]))


class Accountant:
    """What the rounds so far have spent, by the Renyi accountant of Google's dp-accounting (extra "privacy").

    Under "poisson" two fleets are neighbours if one has a device more; under "fixed", if one device is another, which
    counts the bound twice. Bounds from above: the library's slower PLD accountant is about 10 % lower.
    history: sampling rate -> rounds, as another Accountant's `history` was kept on disk.
    """

    def __init__(self, privacy: Privacy, history: Mapping[float, int] | None = None) -> None:
        self._privacy = privacy
        self._history = dict(history or {})

    @property
    def history(self) -> dict[float, int]:
        """Sampling rate -> rounds that were published with it."""
        return dict(self._history)

    def record(self, rate: float) -> None:
        """One more noised sum is out, of a cohort of this share of the members. Raises ConfigError."""
        _check_rate(rate)
        self._history[rate] = self._history.get(rate, 0) + 1

    def epsilon(self, *, planned: int = 0, rate: float = 1.0) -> float:
        """Epsilon so far, or after `planned` more rounds at `rate`. Raises ConfigError without the library."""
        _check_rate(rate)
        rounds = self.history
        if planned:
            rounds[rate] = rounds.get(rate, 0) + planned
        return _spent(self._privacy, tuple(sorted(rounds.items()))) if rounds else 0.0


@functools.lru_cache(maxsize=16)  # a status is written twice a second, and epsilon moves once a round
def _spent(privacy: Privacy, rounds: tuple[tuple[float, int], ...]) -> float:
    try:
        import dp_accounting as dp  # noqa: PLC0415  # brings scipy: 2 s and 70 MB for who asks for privacy
        from dp_accounting.rdp import RdpAccountant  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError("privacy: the accountant is not installed; pip install 'fedeq-edge[privacy]'") from error
    relation = dp.NeighboringRelation
    neighbours = relation.ADD_OR_REMOVE_ONE if privacy.sampling == "poisson" else relation.REPLACE_ONE
    accountant = RdpAccountant(_ORDERS, neighbours)
    for rate, count in rounds:
        accountant.compose(_event(privacy, rate), count)
    return float(accountant.get_epsilon(privacy.delta))


def _event(privacy: Privacy, rate: float) -> "DpEvent":
    """One round. The library takes a rate without replacement as sample / source size: millionths are near enough."""
    import dp_accounting as dp  # noqa: PLC0415  # as above

    if privacy.sampling == "poisson":
        return dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(privacy.noise_multiplier))
    # One device in place of another moves the sum by up to twice the bound.
    replaced = dp.GaussianDpEvent(privacy.noise_multiplier / 2)
    return dp.SampledWithoutReplacementDpEvent(10**6, math.ceil(rate * 10**6), replaced)


def _check_rate(rate: float) -> None:
    if not 0.0 < rate <= 1.0:
        raise ConfigError(f"privacy: sampling rate is {rate}; give a share of the members above 0, at most 1")


def _keyed(purpose: bytes, key: bytes, round_number: int) -> bytes:
    return b"fedeq-edge privacy " + purpose.ljust(8) + key + round_number.to_bytes(8, "little")


def _uniform(prefix: bytes, device: str) -> float:
    return int.from_bytes(hashlib.sha256(prefix + device.encode()).digest()[:8], "little") / 2.0**64


def _gaussian(random_bytes: bytes, size: int) -> NDArray[np.float64]:
    """Standard normal values from 16 bytes a pair, by Box and Muller; 64 bits reach out to 9.4 standard deviations."""
    words = np.frombuffer(random_bytes, "<u8").reshape(2, -1)
    radius = np.sqrt(-2.0 * np.log((words[0].astype(np.float64) + 1.0) * 2.0**-64))
    angle = (words[1] >> np.uint64(11)).astype(np.float64) * (2.0**-53 * 2.0 * math.pi)
    return np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:size]

"""Anderson acceleration for cells that contract slowly, and the choice between it and plain iteration.

Theory of operation. After each window of `every` evaluations, of which all but the first are plain steps, the last m
pairs (f_i, r_i = f_i - z_i) of a sample are mixed:

    z_next = sum_i alpha_i (f_i - (1 - beta) r_i),   alpha minimises |sum_i alpha_i r_i|  subject to  sum_i alpha_i = 1

alpha = H^-1 1 / (1^T H^-1 1), H = G + ridge * diag(G), with the Gram matrix G of the r_i: every r_i is regularised in
proportion to itself, so that neither the size of the activations nor of the residuals matters (an absolute ridge of
1e-4 makes torchdeq 0.1.0's Anderson worse than plain iteration at activations of 0.01). `every` = 1 is the classic type
II; 3 halves the cost of mixing at about the same number of evaluations (alternating Anderson-Picard).

Guards. The driver keeps the best answer. A residual that is not finite, or `growth` times the best, sends the sample
back there and clears its history: f is next evaluated at the best answer, and the windows begin anew. A guard that
refuses every growth instead cost thousands of evaluations on benign problems. And a sample that is still far off does
not mix while its plain steps show a non-normal map, whose transient a mix would only prolong: for a normal Jacobian J
|J^k r|^2 <= |J^(k-1) r| |J^(k+1) r| (Cauchy-Schwarz), so that steps whose growth slackens are the sign of another one.

Everything is per sample: batch mates share the arrays, never a weight.

Sources: Walker & Ni, SIAM J. Numer. Anal. 49 (2011); Banerjee et al., J. Comput. Phys. 2016
(alternating); the guards are ours.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from fedeq_edge.deq.batch import norms, per_sample, put, relative_residual
from fedeq_edge.deq.method import Look, Memory
from fedeq_edge.errors import ConfigError

# A relative residual above this is that of a state still being formed. Three equal steps from zero end at 1/3: a slow
# cell, which gains most by mixing, must not be held up.
FAR = 0.4
# |s_2|^2 over |s_1| |s_3| beyond which three steps show a non-normal map; from 1.01 to 1.1 it makes little difference.
SLACKENING = 1.05
# Mixes that a sample goes without at most: more gained nothing in transients and slowed cells that do not contract.
RESTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Anderson:
    """Anderson acceleration type II, per sample: for cells that contract slowly (rate above 0.6).

    memory: evaluations kept (m), two states each. mixing: beta, the weight of f against z in the mix. every:
    evaluations per mix (module's docstring). ridge: relative to each diagonal element of the Gram matrix. growth: a
    residual so many times the best sends a sample back to its best answer.
    """

    memory: int = 5
    mixing: float = 1.0
    every: int = 3
    ridge: float = 1e-6
    growth: float = 1e3

    def __post_init__(self) -> None:
        if self.memory < 1 or self.every < 1:
            raise ConfigError(f"Anderson: memory {self.memory} and every {self.every} must be at least 1")
        if not (0.0 < self.mixing <= 1.0 and self.ridge > 0.0 and self.growth > 1.0):
            raise ConfigError(
                "Anderson: needs 0 < mixing <= 1, ridge > 0 and growth > 1, "
                f"not {self.mixing}, {self.ridge}, {self.growth}"
            )

    @property
    def interval(self) -> int:
        """One look per mix, which needs the residuals anyway."""
        return self.every

    @property
    def damping(self) -> float:
        """Plain steps are undamped: the history reads f off the next state."""
        return 1.0

    @property
    def keeps_best(self) -> bool:
        """Yes: a mixed state may be worse than the one before."""
        return True

    def init(self, z0: Tensor) -> Memory:
        """Empty history for the batch z0 (B, ...)."""
        return _Mixing(self, z0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptive:
    """Plain iteration that turns to Anderson for those samples whose measured contraction rate is above `threshold`.

    The rate is the factor by which one evaluation changes the relative residual: the last one at the first look, the
    geometric mean since the look before from then on. Below 0.6 plain iteration is done before a mix has paid for
    itself (measured on dense and convolutional cells). A sample that has turned stays accelerated.
    """

    threshold: float = 0.6
    accelerated: Anderson = field(default_factory=Anderson)

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold <= 1.0:
            raise ConfigError(f"Adaptive: threshold is {self.threshold}, a contraction rate; choose 0 to 1")

    @property
    def interval(self) -> int:
        """That of the acceleration, for fast samples too: when a sample is looked at must not depend on its mates."""
        return max(2, self.accelerated.every)

    @property
    def damping(self) -> float:
        """Plain steps are undamped."""
        return 1.0

    @property
    def keeps_best(self) -> bool:
        """Yes, for the sake of the accelerated samples."""
        return True

    def init(self, z0: Tensor) -> Memory:
        """An empty history, used once a sample is slow."""
        return _Turning(self, z0)


class _Mixing:
    """Ring of the last m pairs (f, f - z) of each sample."""

    def __init__(self, settings: Anderson, z0: Tensor) -> None:
        self._settings = settings
        # History first: an entry is written as one contiguous block.
        self._images = z0.new_empty(settings.memory, len(z0), z0[0].numel())
        self._steps = torch.empty_like(self._images)
        self._slots = [
            (image.view(z0.shape), step.view(z0.shape)) for image, step in zip(self._images, self._steps, strict=True)
        ]
        self._count = 0
        self._ones = z0.new_ones(len(z0), settings.memory)
        # Added to the diagonal of the Gram matrix: the smallest number, so that a difference of exactly zero does not
        # make it singular; for an entry that does not count so large a one that its weight is nothing.
        limits = torch.finfo(z0.dtype)
        self._counts, self._barred = limits.tiny, limits.max**0.8
        self._bars = torch.full_like(self._ones, self._counts)
        self._forgotten: int | None = None  # the count at which some entries last ceased to count
        self._rests: Counter[int] = Counter()

    def advance(self, look: Look) -> Tensor:
        return self.mix(look, range(len(look.image)))

    def mix(self, look: Look, samples: Collection[int]) -> Tensor:
        """Where f is evaluated next: `samples` are accelerated, unless they rest; all others step plainly."""
        refused = [] if look.clean else [i for i in samples if not self._accepts(look.residual[i], look.held[i])]
        for z, fz in pairwise((*look.trail[-self._settings.memory :], look.image)):
            self._remember(z, fz)
        samples = self._without_resting(look, samples)
        plain = None if len(samples) == len(look.image) else self._all_but(samples)
        self._forget(refused, plain)
        mixed = self._mixed().reshape(look.image.shape)
        if plain is not None:
            mixed = torch.where(per_sample(plain, mixed), look.image, mixed)
        put(mixed, refused, look.best)
        return mixed

    def _without_resting(self, look: Look, samples: Collection[int]) -> Collection[int]:
        """`samples` but those whose last three steps show a transient; without a window of three, all of them."""
        entries = self._settings.memory
        # A clean look has no NaN, so that its largest residual is one.
        if min(len(look.trail), entries) < 3 or (look.clean and max(look.residual) <= FAR):
            return samples
        steps = [self._steps[(self._count - back) % entries] for back in (3, 2, 1)]
        first, second, third = torch.stack([norms(step) for step in steps]).tolist()
        resting = {
            i
            for i in samples
            if look.residual[i] > FAR
            and second[i] * second[i] > SLACKENING * first[i] * third[i]
            and self._rests[i] < RESTS
        }
        self._rests.update(resting)
        return set(samples) - resting if resting else samples

    def _all_but(self, samples: Collection[int]) -> Tensor:
        """(B,) whether a sample is not among `samples`."""
        return torch.tensor([i not in samples for i in range(len(self._ones))], device=self._ones.device)

    def _accepts(self, residual: float, held: float) -> bool:
        # Written so that a NaN residual is not accepted.
        return residual <= self._settings.growth * held

    def _remember(self, z: Tensor, fz: Tensor) -> None:
        slot = self._count % self._settings.memory
        self._count += 1
        image, step = self._slots[slot]
        image.copy_(fz)
        torch.sub(fz, z, out=step)
        if self._forgotten is not None:
            self._bars[:, slot] = self._counts
            if self._count - self._forgotten >= self._settings.memory:
                self._forgotten = None

    def _forget(self, refused: list[int], plain: Tensor | None) -> None:
        """No entry counts for these samples."""
        if plain is not None:
            self._forgotten = self._count
            self._bars.masked_fill_(plain[:, None], self._barred)
        if refused:
            self._forgotten = self._count
            self._bars[refused] = self._barred
            # The NaN of a refused evaluation would survive any weight of zero.
            self._images[:, refused] = 0.0
            self._steps[:, refused] = 0.0

    def _mixed(self) -> Tensor:
        """(B, n) sum_i alpha_i (f_i - (1 - beta) r_i)."""
        entries = min(self._count, self._settings.memory)
        steps, images = self._steps[:entries].transpose(0, 1), self._images[:entries].transpose(0, 1)
        weights = self._weights(torch.bmm(steps, steps.transpose(1, 2)), entries)[:, None, :]
        mixed = torch.bmm(weights, images)
        if self._settings.mixing < 1.0:
            mixed -= (1.0 - self._settings.mixing) * torch.bmm(weights, steps)
        return mixed[:, 0]

    def _weights(self, gram: Tensor, entries: int) -> Tensor:
        """alpha (B, entries), zero for entries that do not count; gram, the Gram matrix of the r_i, is overwritten."""
        gram.diagonal(dim1=1, dim2=2).mul_(1.0 + self._settings.ridge).add_(self._bars[:, :entries])
        # solve_ex never raises: a singular system gives non-finite weights, and the next look refuses what they make.
        raw = torch.linalg.solve_ex(gram, self._ones[:, :entries])[0]
        # Contiguous: solve leaves columns, and the product with such a row falls back to a loop over the batch (5x).
        weights: Tensor = (raw / raw.sum(dim=1, keepdim=True)).contiguous()
        return weights


class _Turning:
    """Plain until a sample's rate is above the threshold; its history begins with the window in which it turned."""

    def __init__(self, settings: Adaptive, z0: Tensor) -> None:
        self._settings, self._start = settings, z0
        self._mixing: _Mixing | None = None
        self._turned: set[int] = set()
        self._first = True

    def advance(self, look: Look) -> Tensor:
        if len(self._turned) < len(look.residual):
            self._turn(look)
        if not self._turned:
            return look.image
        if self._mixing is None:
            self._mixing = _Mixing(self._settings.accelerated, self._start)
        return self._mixing.mix(look, self._turned)

    def _turn(self, look: Look) -> None:
        """Samples whose residual fell too slowly since the last look are accelerated from now on."""
        bar = self._settings.threshold ** len(look.trail)
        before = look.held
        if self._first:
            # Two residuals are needed and the first look has one: the step before gives the other.
            z, fz = look.trail[-2], look.trail[-1]
            before = relative_residual(z, fz).tolist()
            bar, self._first = self._settings.threshold, False
        slow = (i for i, (new, old) in enumerate(zip(look.residual, before, strict=True)) if new > bar * old)
        self._turned.update(slow)

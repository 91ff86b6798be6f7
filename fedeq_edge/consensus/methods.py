"""The methods that one engine runs: ours, and the published ones that it is compared with.

Each is a configuration, none has code of its own, so that a comparison differs by nothing but these fields.
Sources: FeDEQ, arXiv 2309.15659; DEQ-FL, arXiv 2305.18646; FedAvg, arXiv 1602.05629; FedProx, arXiv 1812.06127;
FedPer, arXiv 1912.00818; FedRep, arXiv 2102.07078; Ditto, arXiv 2012.04221; FedDyn, arXiv 2111.04263.
"""

import difflib
import math
from typing import Literal

import msgspec

from fedeq_edge.consensus.quality import Rule, Weighting
from fedeq_edge.errors import ConfigError

Heads = Literal["personal", "consensus_refit"]


class Method(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One configuration of the engine, checked when made (ConfigError).

    exchange: devices contribute at all. duals: the client keeps nu_i and its gradient holds nu_i.
    proximal: its gradient holds kappa_i (theta_i - z). rho: kappa_i before quality weighting, > 0.
    server: "fresh" adds H / R to this round's mean; "mean" is the mean alone, duals left out.
    heads: "personal" stay on the device; "consensus_refit" are part of z and refitted where they are used.
    head_step: "refit" fits the head before the body is trained; "joint" trains both together.
    ditto: lambda of a second, personal model pulled towards z; 0 is none.
    quality: rule for the scores; r0: residual at which a score has halved, > 0.
    weighting: where q goes (quality.weights); blend: its exponent a in [0, 1] where weighting is "blend".
    quality_until: share of the rounds after which q is frozen, as a moving q keeps the last rounds from settling.
    robust: "clip" bounds every difference at `clip` times the median norm, > 0 (robust.py); "trimmed" leaves out the
    share `trim` in [0, 0.5) at either end of every coordinate; "median" needs no number.
    norm_limit: differences of more than this many median norms are refused, > 1; None is off.
    min_cosine: differences with a smaller cosine to the fleet's last step are refused, in (-1, 1); None is off.
    """

    name: str
    exchange: bool = True
    duals: bool = True
    proximal: bool = True
    rho: float = 0.1
    server: Literal["fresh", "mean"] = "fresh"
    heads: Heads = "personal"
    head_step: Literal["refit", "joint"] = "refit"
    ditto: float = 0.0
    quality: Rule = "residual"
    r0: float = 1e-2
    weighting: Weighting = "metric"
    blend: float = 0.5
    quality_until: float = 0.8
    robust: Literal["none", "clip", "trimmed", "median"] = "none"
    trim: float = 0.25
    clip: float = 0.5
    norm_limit: float | None = None
    min_cosine: float | None = None

    def __post_init__(self) -> None:
        for field in ("rho", "r0", "clip"):
            value = getattr(self, field)
            if not (value > 0.0 and math.isfinite(value)):
                raise ConfigError(f"method {self.name}: {field} is {value}; give a finite number above 0")
        if not (self.ditto >= 0.0 and math.isfinite(self.ditto)):
            raise ConfigError(f"method {self.name}: ditto is {self.ditto}; give 0 or a finite number above 0")
        for field in ("blend", "quality_until"):
            value = getattr(self, field)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"method {self.name}: {field} is {value}; give a number from 0 to 1")
        if self.server == "fresh" and not (self.duals and self.proximal):
            raise ConfigError(
                f'method {self.name}: server = "fresh" adds the sum of the duals, so it needs duals and proximal; '
                'set both to true, or server = "mean"'
            )
        self._check_robust()

    def _check_robust(self) -> None:
        if not 0.0 <= self.trim < 0.5:
            raise ConfigError(f"method {self.name}: trim is {self.trim}; give a number from 0 to below 0.5")
        if self.norm_limit is not None and not 1.0 < self.norm_limit < math.inf:
            raise ConfigError(f"method {self.name}: norm_limit is {self.norm_limit}; give a finite number above 1")
        if self.min_cosine is not None and not -1.0 < self.min_cosine < 1.0:
            raise ConfigError(f"method {self.name}: min_cosine is {self.min_cosine}; give a number between -1 and 1")
        if self.robust in ("trimmed", "median") and self.server != "mean":
            raise ConfigError(
                f'method {self.name}: robust = "{self.robust}" leaves devices out that the sum of duals still holds; '
                'set server = "mean", or robust = "clip"'
            )

    @property
    def exponent(self) -> float:
        """Exponent a of q_i in omega_i; kappa_i has 1 - a."""
        return {"metric": 0.0, "objective": 1.0, "blend": self.blend}[self.weighting]

    @property
    def sees_each(self) -> bool:
        """Whether the server looks at every single contribution, so that sums of several are of no use to it."""
        return self.robust != "none" or self.norm_limit is not None or self.min_cosine is not None

    def quality_moves(self, done: int, rounds: int) -> bool:
        """Whether reports still move q after `done` of `rounds` rounds."""
        return self.quality != "uniform" and done < self.quality_until * rounds


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(name="admm", head_step="joint"),
        Method(name="local", exchange=False, duals=False, proximal=False, server="mean", quality="uniform"),
        Method(
            name="fedavg",
            duals=False,
            proximal=False,
            server="mean",
            heads="consensus_refit",
            quality="uniform",
        ),
        Method(name="fedprox", duals=False, server="mean", heads="consensus_refit", quality="uniform"),
        Method(
            name="fedper",
            duals=False,
            proximal=False,
            server="mean",
            head_step="joint",
            quality="uniform",
        ),
        Method(name="fedrep", duals=False, proximal=False, server="mean", quality="uniform"),
        Method(
            name="ditto",
            duals=False,
            proximal=False,
            server="mean",
            heads="consensus_refit",
            ditto=0.1,  # middle of the grid 0.05 to 2 of the paper's appendix, and equal to rho here
            quality="uniform",
        ),
        Method(name="fedeq-published", server="mean", quality="uniform"),
        # q in the average alone is what "objective" does to a server without duals: omega_i = n_i q_i, kappa_i = rho
        Method(
            name="quality-average",
            duals=False,
            proximal=False,
            server="mean",
            heads="consensus_refit",
            weighting="objective",
        ),
    )
}
"""The presets by name; rho and the like are changed with `msgspec.structs.replace`."""


def method(name: str) -> Method:
    """The preset of that name. Raises ConfigError naming the nearest one."""
    if name in METHODS:
        return METHODS[name]
    nearest = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.0)
    raise ConfigError(f"there is no method {name!r}, nearest is {nearest[0]!r}; known are {', '.join(METHODS)}")

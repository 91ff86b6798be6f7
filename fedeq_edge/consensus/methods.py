"""The methods that one engine runs: ours, and the published ones that it is compared with.

Each is a configuration, none has code of its own, so that a comparison differs by nothing but these fields.
Sources: FeDEQ, arXiv 2309.15659; DEQ-FL, arXiv 2305.18646; FedAvg, arXiv 1602.05629; FedProx, arXiv 1812.06127;
FedPer, arXiv 1912.00818; FedRep, arXiv 2102.07078; Ditto, arXiv 2012.04221; FedDyn, arXiv 2111.04263;
server momentum (FedAvgM), arXiv 1909.06335; fine-tuning after FedAvg, arXiv 2108.07313; kNN-Per, arXiv 2111.09360.
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
    server: "fresh" adds H / R to this round's mean; "mean" is the mean alone, duals left out; "sums" is z = A / R over
    the last theta_i of all members, as a control: it keeps every one of them in memory (server.py).
    server_momentum: beta in [0, 1) of v <- beta v + step, z <- z_hat + v, with "mean" alone; 0 is none.
    heads: "personal" stay on the device; "consensus_refit" are part of z and refitted where they are used.
    head_step: "joint" trains head and body together; "refit" fits the head before the body is trained (FedRep, FeDEQ).
    ditto: lambda of a second, personal model pulled towards z; 0 is none.
    finetune_epochs: passes of a device over its data, at delivery, that train body and head of z; 0 is none.
    finetune_rate: their step size, > 0; None is the one with which the plan's schedule ends.
    neighbours: k of kNN-Per, whose answers are z's mixed with those of the k nearest training samples; 0 is none. They
    need the training data, so a model file is that of z, and simulation/evaluation.py measures the mixture.
    neighbour_scale: distance in feature space at which a neighbour counts 1 / e, > 0.
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
    server: Literal["fresh", "mean", "sums"] = "fresh"
    server_momentum: float = 0.0
    heads: Heads = "personal"
    head_step: Literal["joint", "refit"] = "joint"
    ditto: float = 0.0
    finetune_epochs: int = 0
    finetune_rate: float | None = None
    neighbours: int = 0
    neighbour_scale: float = 1.0
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
        for field in ("rho", "r0", "clip", "neighbour_scale", "finetune_rate"):
            value = getattr(self, field)
            if value is not None and not (value > 0.0 and math.isfinite(value)):
                raise ConfigError(f"method {self.name}: {field} is {value}; give a finite number above 0")
        if not (self.ditto >= 0.0 and math.isfinite(self.ditto)):
            raise ConfigError(f"method {self.name}: ditto is {self.ditto}; give 0 or a finite number above 0")
        for field in ("blend", "quality_until"):
            value = getattr(self, field)
            if not 0.0 <= value <= 1.0:
                raise ConfigError(f"method {self.name}: {field} is {value}; give a number from 0 to 1")
        self._check_server()
        self._check_personal()
        self._check_robust()

    def _check_server(self) -> None:
        if self.keeps_duals and not (self.duals and self.proximal):
            raise ConfigError(
                f'method {self.name}: server = "{self.server}" adds the sum of the duals, so it needs duals and '
                'proximal; set both to true, or server = "mean"'
            )
        if not 0.0 <= self.server_momentum < 1.0:
            raise ConfigError(
                f"method {self.name}: server_momentum is {self.server_momentum}; give a number from 0 to below 1"
            )
        if self.server_momentum and self.server != "mean":
            raise ConfigError(
                f'method {self.name}: server_momentum lengthens steps that server = "{self.server}" has corrected, '
                'which diverges; set server = "mean", or server_momentum = 0'
            )

    def _check_personal(self) -> None:
        for field in ("finetune_epochs", "neighbours"):
            if getattr(self, field) < 0:
                raise ConfigError(f"method {self.name}: {field} is {getattr(self, field)}; give 0 for none, or more")
        personal = [field for field in ("ditto", "finetune_epochs", "neighbours") if getattr(self, field)]
        if len(personal) > 1:
            raise ConfigError(
                f"method {self.name}: {' and '.join(personal)} each make a personal model of their own; keep one"
            )
        if not self.exchange and (personal or self.server_momentum):
            raise ConfigError(
                f"method {self.name}: exchange = false makes no consensus to start from; leave out "
                f"{', '.join([*personal, *(['server_momentum'] if self.server_momentum else [])])}"
            )

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
    def keeps_duals(self) -> bool:
        """Whether the server adds H / R, and so needs every member's dual."""
        return self.server != "mean"

    @property
    def sees_each(self) -> bool:
        """Whether the server looks at every single contribution, so that sums of several are of no use to it."""
        bounds = self.robust != "none" or self.norm_limit is not None or self.min_cosine is not None
        return bounds or self.server == "sums"

    @property
    def remembers(self) -> bool:
        """Whether z depends on more of the past than z_hat, H and R."""
        return self.server == "sums" or self.server_momentum > 0.0

    def quality_moves(self, done: int, rounds: int) -> bool:
        """Whether reports still move q after `done` of `rounds` rounds."""
        return self.quality != "uniform" and done < self.quality_until * rounds


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(name="admm"),
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
            quality="uniform",
        ),
        Method(name="fedrep", duals=False, proximal=False, server="mean", head_step="refit", quality="uniform"),
        Method(
            name="ditto",
            duals=False,
            proximal=False,
            server="mean",
            heads="consensus_refit",
            ditto=0.1,  # middle of the grid 0.05 to 2 of the paper's appendix, and equal to rho here
            quality="uniform",
        ),
        Method(
            name="fedavg-finetune",
            duals=False,
            proximal=False,
            server="mean",
            heads="consensus_refit",
            finetune_epochs=5,
            quality="uniform",
        ),
        Method(
            name="knn-per",
            duals=False,
            proximal=False,
            server="mean",
            heads="consensus_refit",
            neighbours=10,  # as in the paper's experiments
            quality="uniform",
        ),
        Method(
            name="fedavg-momentum",
            duals=False,
            proximal=False,
            server="mean",
            server_momentum=0.9,  # the paper's middle value
            heads="consensus_refit",
            quality="uniform",
        ),
        # with equal kappa, mean(theta + nu / kappa) extrapolates: what of ADMM's gain is that, and not its duals
        Method(
            name="fedper-momentum",
            duals=False,
            proximal=False,
            server="mean",
            server_momentum=0.5,  # 0.9, as above, overshoots in federations of tens of rounds
            quality="uniform",
        ),
        Method(name="admm-sums", server="sums"),
        Method(name="fedeq-published", server="mean", head_step="refit", quality="uniform"),
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

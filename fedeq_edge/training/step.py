"""What one round asks of a device and what the device gives back: the seam between algorithm and backend.

A `Learner` (learner.py) owns one device's data and model, a `Backend` computes. Vectors are flat float32 arrays:

    theta  (p,)  the equilibrium part (stem and cell)
    head   (h,)  the explicit layers after the equilibrium
    z      (s,)  the consensus: theta alone (`heads = "personal"`, s = p) or theta then head
                 (`heads = "consensus_refit"`, s = p + h)

Source of names and steps: algorithm.md, section 4 (weighted consensus ADMM) after FeDEQ, arXiv 2309.15659.
"""

import math
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedeq_edge.deq.budget import LARGEST_BUDGET
from fedeq_edge.deq.certificate import Certificate
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError

Vector = NDArray[np.float32]
BackendName = Literal["torch", "onnx"]
"""The library that trains: torch, or onnxruntime on a training graph (onnx/training.py)."""
_AT_ONCE_BYTES = 4 << 20  # of the widest tensors of the samples that are differentiated at once


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """Solver work for one sample: `forward` cell evaluations K (>= 1), `adjoint` terms k (>= 0; 0 is JFB)."""

    forward: int
    adjoint: int


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much work a device does in a round, and how; set by the aggregator, travels in the manifest.

    What the work is for (duals, penalty, heads) is the `Method`'s (consensus/methods.py), which travels beside it.

    rounds: length of the federation, for the learning-rate schedule. epochs: local passes over the data.
    learning_rate decays by a half cosine over the rounds to `learning_rate * final_rate`.
    clip: largest norm of the loss's gradient over theta and head together.
    budgets: the range of K over which the fleet trains; a device draws K per batch from those that it can afford.
    adjoint_ratio: k is about K times this.
    unrolled: 0 takes the gradient at the last evaluation, by k adjoint terms, in the memory of one evaluation. A number
    is how many of the last evaluations are differentiated through, each of them kept; from K on it is the exact
    gradient of K evaluations, the start z_0 included: an explicit network of equal payload has budgets = [1] and
    unrolled = 1. Devices with backend onnx decline.
    microbatch: at most so many samples of a batch are differentiated at once, 0: all of them. The step is that of the
    whole batch to rounding, as every sample is solved and normalised by itself; what the gradient keeps of the forward
    pass is of so many. Kept evenly: 32 by at most 12 are 10, 11 and 11. None: all, until `for_model` has set it, as
    each federation does.
    jacobian_penalty: lambda of the term lambda / d |J^T eps|^2 in the loss (algorithm.md, section 3), for cells without
    certificate; 0: none. Above 0 each step makes one evaluation with graph beyond its K, and its double backward, which
    doubles a step of K = 6; calibration measures it, so it counts against compute_s. Devices with backend onnx decline.
    compute_s: device seconds that training may take in one round.
    energy_j: joules that training may take in one round; devices whose profile states active_watts lower compute_s to
    energy_j / active_watts, the others go by compute_s alone. None: no limit.
    accuracy: a device whose theta is certified (deq/wellposed.py) draws no K beyond what |z_K - z*| <= accuracy is
    proven to need, in the unit of its certificate. None: all that it affords.
    refit_steps: Adam steps on cached equilibrium features when a head is fitted (`refit_rate` its step size).
    refit_pull: tau of a prior of variance 1 / tau around the head that a device got, for the head of its personal
    model: with few samples it stays there, with many it has no weight (refit.py); 0: none. None: 0.1, unless
    cross-validation on a device's training samples says clearly that another, or the head that it got, predicts better.
    alone_rounds: how many rounds' steps a model gets that is trained without exchange: that of a method that has none,
    Ditto's, and what compare_local compares with. None: as many as a device is asked for on average (`for_share`).
    compare_local: at the end, train alone from the same start with the same number of steps, for comparison.
    """

    rounds: int = 15
    epochs: int = 1
    batch: int = 16
    learning_rate: float = 0.1
    final_rate: float = 0.1
    momentum: float = 0.9
    clip: float = 1.0
    weight_decay: float = 0.0
    budgets: tuple[int, ...] = (2, 3, 4, 6, 8, 12)
    adjoint_ratio: float = 0.4
    unrolled: int = 0
    microbatch: int | None = None
    jacobian_penalty: float = 0.0
    compute_s: float = 30.0
    energy_j: float | None = None
    accuracy: float | None = None
    refit_steps: int = 100
    refit_rate: float = 0.01
    refit_pull: float | None = None
    alone_rounds: int | None = None
    compare_local: bool = False

    def __post_init__(self) -> None:
        """Refuse what no device could carry out."""
        _check_counts(self)
        _check_amounts(self)

    def for_share(self, share: float) -> "Plan":
        """This plan where a round asks `share` of the devices: alone_rounds are a device's own, unless set."""
        if self.alone_rounds is not None:
            return self
        return msgspec.structs.replace(self, alone_rounds=max(1, round(self.rounds * share)))

    def for_model(self, spec: ModelSpec) -> "Plan":
        """This plan for that model: microbatch keeps its widest tensors within 4 MiB together, unless set.

        Measured on the published layers: a sixth to a quarter of the memory that 32 at once take, for the same
        processor time. Small models have their batches whole: there the number of calls counts.
        """
        if self.microbatch is not None:
            return self
        kept = max(1, min(self.unrolled, max(self.budgets)))
        most = _AT_ONCE_BYTES // (kept * spec.widest_bytes)
        return msgspec.structs.replace(self, microbatch=0 if most >= self.batch else max(1, most))


class LocalTask(msgspec.Struct, frozen=True, kw_only=True):
    """One round's work for one device. z, nu: (s,) float32; head: (h,) float32; kappa > 0; seed picks batches.

    round: how many rounds the federation had completed before this one.
    """

    round: int
    z: Vector
    nu: Vector
    kappa: float
    head: Vector
    seed: int


class LocalResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a device knows after a round. difference = theta_i - z, (s,) float32, before coding.

    loss: mean training loss over the last epoch. residual, backward_residual: means over the last epoch of the
    forward relative residual and of the last adjoint term relative to the sum. budget: the most that a batch used.
    accuracy_consensus: z with the head as received, on this device's test part (NaN without one).
    seconds: device seconds spent (emulated devices: scaled), reduced: budget was lowered while the round ran.
    """

    difference: Vector
    head: Vector
    loss: float
    residual: float
    backward_residual: float
    budget: Budget
    steps: int
    seconds: float
    reduced: bool
    accuracy_consensus: float


class Personal(msgspec.Struct, frozen=True, kw_only=True):
    """A device's own model after the federation: consensus theta with a head refitted on its data where that helps.

    accuracy_*: on the test part, NaN without one. budget: the middle of the K that it affords. certificate: what is
    proven of theta after that K, None without a proof.
    local_only: accuracy of training alone with the same number of steps (None unless the plan asks for it).
    """

    theta: Vector
    head: Vector
    budget: Budget
    residual: float
    certificate: Certificate | None
    accuracy_personal: float
    accuracy_consensus: float
    local_only: float | None


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """Measured cost of this model on this device, seconds for one batch of `batch` samples.

    step_s = fixed_s + K * evaluation_s + k * adjoint_s  (one training step; least squares over several K and k).
    slowdown: factor applied for an emulated board (1.0 on the real device).
    """

    batch: int
    fixed_s: float
    evaluation_s: float
    adjoint_s: float
    slowdown: float = 1.0


def _check_counts(plan: Plan) -> None:
    for name in ("rounds", "epochs", "batch"):
        if getattr(plan, name) < 1:
            raise ConfigError(f"train.{name} is {getattr(plan, name)}; give at least 1")
    if not plan.budgets or min(plan.budgets) < 1 or max(plan.budgets) > LARGEST_BUDGET:
        raise ConfigError(f"train.budgets is {list(plan.budgets)}; give values of K from 1 to {LARGEST_BUDGET}")
    if plan.alone_rounds is not None and plan.alone_rounds < 1:
        raise ConfigError(f"train.alone_rounds is {plan.alone_rounds}; give at least 1, or leave it out")
    for name in ("refit_steps", "unrolled", "microbatch"):
        if (getattr(plan, name) or 0) < 0:
            raise ConfigError(f"train.{name} is {getattr(plan, name)}; give at least 0")


def _check_amounts(plan: Plan) -> None:
    for name in ("learning_rate", "final_rate", "clip", "compute_s", "refit_rate"):
        if not 0.0 < getattr(plan, name) < math.inf:
            raise ConfigError(f"train.{name} is {getattr(plan, name)}; give a finite number above 0")
    for name in ("energy_j", "accuracy"):
        limit = getattr(plan, name)
        if limit is not None and not 0.0 < limit < math.inf:
            raise ConfigError(f"train.{name} is {limit}; give a finite number above 0, or leave it out")
    for name in ("weight_decay", "jacobian_penalty", "refit_pull"):
        if not 0.0 <= (getattr(plan, name) or 0.0) < math.inf:
            raise ConfigError(f"train.{name} is {getattr(plan, name)}; give a finite number, 0 for none")
    if not (0.0 <= plan.momentum < 1.0 and 0.0 <= plan.adjoint_ratio <= 1.0):
        raise ConfigError("train.momentum must be in [0, 1), adjoint_ratio in [0, 1]")

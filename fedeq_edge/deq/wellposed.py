"""What makes a cell well posed, how theta is kept so, and what that promises about a small budget.

Theory. In z -> tanh(W * z + u) the rows of W (over input channels and taps) have l1 norm at most gamma < 1. Zero
padding only drops terms, so the linear map is bounded by gamma in the infinity norm; tanh is 1-Lipschitz; the cell is a
contraction of rate gamma for every u (Banach). Hence one fixed point, linear convergence from anywhere, and

    |z_K - z*|_inf <= gamma^K / (1 - gamma) |z_1 - z_0|_inf                  (a posteriori: `error_bound`)
    |z_K - z*|_inf <= gamma^(K+1)   from z_0 = tanh(u), since |W * z*|_inf <= gamma     (a priori: `evaluations_for`)

The l1 ball is convex: any convex combination of well-posed theta is well posed. z of the consensus is not such a
combination once duals enter (H / R, algorithm.md section 4), so it is projected again after every server step.
GroupNorm in the loop breaks the argument: the residual cell has no certificate.

Source: algorithm.md section 1(a), *ours*; projection: Duchi et al., ICML 2008.
"""

from math import ceil, log

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.consensus.constraint import project
from fedeq_edge.deq.layout import row_bounds, theta_layout
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError


def constrain(theta: NDArray[np.floating], spec: ModelSpec) -> None:
    """theta (p,) lies in the constraint set of the spec afterwards, moved in place by the least distance."""
    project(theta, row_bounds(spec))


def contraction_rate(theta: NDArray[np.floating], spec: ModelSpec) -> float:
    """gamma of a contractive cell: the largest l1 norm over the rows of W. Raises ConfigError for another cell."""
    if spec.cell != "contractive":
        raise ConfigError(
            f'model: a {spec.cell} cell has no contraction rate; use cell = "contractive" for certificates'
        )
    weight = next(slot for slot in theta_layout(spec) if slot.name == "cell.weight")
    rows = weight.view(theta).reshape(weight.shape[0], -1)
    return float(np.abs(rows).sum(axis=1, dtype=np.float64).max())


def error_bound(gamma: float, evaluations: int, first_step: float) -> float:
    """Largest |z_K - z*|_inf after K plain evaluations; first_step = |z_1 - z_0|_inf. Infinite for gamma >= 1."""
    return gamma**evaluations / (1.0 - gamma) * first_step if gamma < 1.0 else float("inf")


def evaluations_for(gamma: float, accuracy: float) -> int:
    """Least K with |z_K - z*|_inf <= accuracy for every input, from the cell's own start. gamma < 1, accuracy > 0."""
    if not 0.0 <= gamma < 1.0 or accuracy <= 0.0:
        raise ConfigError(
            f"certificate: needs 0 <= gamma < 1 and accuracy > 0, not gamma = {gamma} and accuracy = {accuracy}"
        )
    return 1 if gamma <= accuracy else max(1, ceil(log(accuracy) / log(gamma)) - 1)

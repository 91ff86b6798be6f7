"""What makes a cell well posed, and what that promises about a small budget.

Theory. A map of rate gamma < 1 in some norm has one fixed point z*, and plain iteration reaches it from anywhere:

    |z_K - z*| <= gamma^K |z_0 - z*|                              (a priori: `certificate`, `evaluations_for`)
    |z_K - z*| <= gamma^K / (1 - gamma) |z_1 - z_0|               (a posteriori: `error_bound`)

contractive, z -> tanh(W * z + u): tanh is 1-Lipschitz, so gamma is the norm of z -> W * z, whatever u is. Maximum
    norm: the largest l1 norm of a row of W, taps included; zero padding only drops terms. L2: the largest singular
    value; of a convolution, see `_operator_norm`. Entries of z* are below 1, so |z_0 - z*| <= |W * z*| <= gamma from
    z_0 = tanh(u).
monotone, z = relu(W z + u): M = I - W has <z, M z> >= m |z|^2. relu is the projection onto z >= 0, so
    f_a(z) = relu(z - a (M z - u)) has the same fixed points for every a > 0, and gamma = |I - a M|_2. With a = beta,
    the largest number for which <z, M z> >= beta |M z|^2 (`step_size`), gamma^2 <= 1 - beta m: a contraction however
    large |W| is. (The usual m / |M|^2 is at most beta: a random W of 64 units gave gamma 0.96, with beta 0.79.)
    z*' M z* = z*' u, so |z*| <= |u| / m, and z_0 = relu(a u) is one evaluation from 0: |z_0 - z*| <= gamma |z*|.
residual: GroupNorm in the loop breaks the argument; the cell has no certificate.

All sets of constrained W are convex (consensus/constraint.py), so any convex combination of well-posed theta is well
posed. z of the consensus is none once duals enter (H / R, algorithm.md section 4): it is projected after every step.

Source: algorithm.md section 1, *ours*; monotone cell: Winston & Kolter, NeurIPS 2020; beta: Baillon & Haddad 1977.
"""

from math import ceil, inf, log, sqrt

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.consensus.constraint import project
from fedeq_edge.deq.certificate import Certificate, Rate
from fedeq_edge.deq.description import PROOFS, Description, Proof, describe
from fedeq_edge.deq.layout import constraints
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError

Matrix = NDArray[np.float64]

# Half the spacing of float32 at 1, and room above the root of the number of terms by which rounding errors of a sum
# grow (Higham & Mary, SIAM J. Sci. Comput. 41 (2019)).
_FLOAT32_ROUNDOFF = 2.0**-24
_ROUNDING_ROOM = 4.0


def constrain(theta: NDArray[np.floating], spec: ModelSpec) -> None:
    """theta (p,) lies in the constraint set of the spec afterwards, moved in place by the least distance."""
    project(theta, constraints(spec))


def certificate(theta: NDArray[np.floating], spec: ModelSpec, evaluations: int) -> Certificate | None:
    """What theta (p,) promises at so many evaluations >= 1; None where nothing is proven (residual, gamma >= 1)."""
    if evaluations < 1:
        raise ConfigError(f"certificate: evaluations is {evaluations}; certify at least 1")
    found = rate(theta, spec)
    return None if found is None else found.certificate(evaluations)


def rate(theta: NDArray[np.floating], spec: ModelSpec) -> Rate | None:
    """What theta (p,) promises at every budget; None where nothing is proven (residual, gamma >= 1)."""
    return proven(theta, describe(spec))


def proven(theta: NDArray[np.floating], description: Description) -> Rate | None:
    """What theta (p,) of the model described promises at every budget; None where nothing is proven.

    rows, spectral: f is gamma-Lipschitz in z by its one layer W, z_0 = f(0), entries of z* are at most 1 (as in the
    theory of contractive cells above). monotone: as there.
    """
    proof = description.proof
    if proof is None or proof.kind not in PROOFS:
        return None
    weight = _weight(theta, description, proof)
    gamma = _gamma(weight, proof)
    if not gamma < 1.0:
        return None
    monotone = proof.kind == "monotone"
    return Rate(
        norm="max" if proof.kind == "rows" else "rms",
        gamma=gamma,
        scale=1.0 / _monotonicity(weight) if monotone else 1.0,
        rounding=_rounding(gamma, weight),
        unit="injection" if monotone else "state",
    )


def contraction_rate(theta: NDArray[np.floating], spec: ModelSpec) -> float:
    """gamma of the cell, 1 or more where it need not contract: in the maximum norm if spec.norm says so, else in L2.

    Raises ConfigError for a residual cell.
    """
    description = describe(spec)
    if description.proof is None:
        raise ConfigError('model: a residual cell has no contraction rate; use cell = "contractive" for certificates')
    return _gamma(_weight(theta, description, description.proof), description.proof)


def step_size(weight: NDArray[np.floating]) -> float:
    """a of the monotone cell with this W (n, n): beta = least eigenvalue of the symmetric part of (I - W)^-1.

    With y = M x, <x, M x> >= beta |M x|^2 reads <M^-1 y, y> >= beta |y|^2. Every step below 2 beta converges; beta
    gives the least bound on gamma, and a gamma within 0.1 of the best step's on random W (within 0.01 where |W| > 1.5).
    1 where I - W is not monotone: nothing is promised there.
    """
    identity = np.eye(len(weight))
    try:
        inverse = np.linalg.inv(identity - weight.astype(np.float64))
        beta = float(np.linalg.eigvalsh(0.5 * (inverse + inverse.T))[0])
    except np.linalg.LinAlgError:
        return 1.0
    return beta if beta > 0.0 else 1.0


def error_bound(gamma: float, evaluations: int, first_step: float) -> float:
    """Largest |z_K - z*| after K plain evaluations; first_step = |z_1 - z_0|, same norm. Infinite for gamma >= 1."""
    return gamma**evaluations / (1.0 - gamma) * first_step if gamma < 1.0 else inf


def evaluations_for(gamma: float, accuracy: float, *, distance: float | None = None) -> int:
    """Least K >= 1 with gamma^K distance <= accuracy, for 0 <= gamma < 1 and accuracy > 0.

    distance: bound on |z_0 - z*|; None: gamma, that of a contractive cell for every input. A monotone cell has
    gamma |u| / m. Rounding (some 1e-6 / (1 - gamma) in float32) is left out: ask for no less.
    """
    _check_accuracy(gamma, accuracy)
    start = gamma if distance is None else distance
    return 1 if gamma * start <= accuracy else ceil(log(accuracy / start) / log(gamma))


def adjoint_terms_for(gamma: float, accuracy: float) -> int:
    """Least k >= 0 with gamma^(k+1) / (1 - gamma) <= accuracy: |u - u_k| <= accuracy |v| for the k-term adjoint.

    In the dual norm of gamma's: l1 for the maximum norm, L2 for L2. 0 <= gamma < 1, accuracy > 0.
    """
    _check_accuracy(gamma, accuracy)
    target = accuracy * (1.0 - gamma)
    return 0 if gamma <= target else ceil(log(target) / log(gamma)) - 1


def _check_accuracy(gamma: float, accuracy: float) -> None:
    if not 0.0 <= gamma < 1.0 or not accuracy > 0.0:
        raise ConfigError(
            f"certificate: needs 0 <= gamma < 1 and accuracy > 0, not gamma = {gamma} and accuracy = {accuracy}"
        )


def _weight(theta: NDArray[np.floating], description: Description, proof: Proof) -> Matrix:
    return description.slot(proof.parameter).view(theta).astype(np.float64)


def _gamma(weight: Matrix, proof: Proof) -> float:
    if proof.kind == "monotone":
        a, identity = step_size(weight), np.eye(len(weight))
        return float(np.linalg.norm((1.0 - a) * identity + a * weight, 2))
    if proof.kind == "rows":
        return float(np.abs(weight).reshape(len(weight), -1).sum(axis=1).max())
    return _operator_norm(weight, proof.lengths)


def _monotonicity(weight: Matrix) -> float:
    """m: least eigenvalue of the symmetric part of I - W."""
    return 1.0 - float(np.linalg.eigvalsh(0.5 * (weight + weight.T))[-1])


def _operator_norm(weight: Matrix, lengths: tuple[int, ...]) -> float:
    """Bound on the L2 norm of the zero-padded layer W (out, in, *taps) over states of these lengths; exact if dense.

    With one more place per dimension, always zero, zero padding is the wrapping of a torus: the layer is a corner of a
    circular convolution, whose norm is the largest over the frequencies of its grid. Never above the sum over the
    taps; some 1 % above the layer's own norm for 16 places. Half the frequencies do: those of a real W come in pairs.
    """
    if not lengths:
        return float(np.linalg.norm(weight, 2))
    grid = tuple(max(length + 1, taps) for length, taps in zip(lengths, weight.shape[2:], strict=True))
    spectrum = np.fft.rfftn(weight, s=grid, axes=tuple(range(2, weight.ndim)))
    return float(np.linalg.norm(spectrum, 2, axis=(0, 1)).max())


def _rounding(gamma: float, weight: Matrix) -> float:
    """What float32 adds to |z_K - z*|, relative to the bound on |z*|: one evaluation's error, accumulated."""
    terms = weight[0].size
    return _ROUNDING_ROOM * sqrt(terms) * _FLOAT32_ROUNDOFF / (1.0 - gamma)

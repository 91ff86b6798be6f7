"""Inference of dense models with numpy alone: for devices without torch, and faster than torch at these sizes.

Theory of operation. The loop works in place on three arrays (B, d): matmul into f, add the injection, activation, swap.
It counts, measures and stops as `solvers.Picard(check_every=1)` and the exported ONNX loop do:

    f = step(z);  r = |f - z| / max(|f|, 1e-9);  done = r <= tol of the evaluation before
    z, r = (f, r) where not done;  evaluations += not done;  stop when all are done, or the budget is spent

Without a tolerance the residual of the last evaluation alone is measured, so an evaluation costs a product and a tanh.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedeq_edge.deq.layout import Layout, head_layout, size, theta_layout
from fedeq_edge.deq.spec import SMALLEST_NORM, ModelSpec
from fedeq_edge.deq.wellposed import step_size
from fedeq_edge.errors import ConfigError, DataError

Array = NDArray[np.floating]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """Answers for B samples: logits (B, classes), evaluations (B,) int64 of the cell,
    residual (B,) of the last one; infinite where a sample holds NaN.
    """

    logits: Array
    evaluations: NDArray[np.int64]
    residual: Array


class _Activation(Protocol):
    def __call__(self, states: Array, /, *, out: Array) -> Array: ...


class NumpyDEQ:
    """The dense model that `spec` describes with parameters theta (p,) and head (h,), in their dtype.

    Answers equal those of `model.DEQ` with Picard to rounding. It holds no buffers between calls, so threads may share
    it; theta and head must not change. Raises ConfigError for a model that is not dense or parameters of another size.
    """

    def __init__(self, spec: ModelSpec, theta: Array, head: Array) -> None:
        if spec.spatial:
            raise ConfigError(
                f"numpy: input_shape {spec.input_shape} makes a convolutional model; only dense ones run without torch "
                "or onnxruntime"
            )
        self.spec = spec
        weights = _named(theta_layout(spec), theta, "theta") | _named(head_layout(spec), head, "head")
        self._stem, self._bias = weights["stem.map.weight"].T, weights["stem.map.bias"]
        self._head, self._head_bias = weights["head.weight"].T, weights["head.bias"]
        self._weight = weights["cell.weight"].T
        self._activation: _Activation = np.tanh
        if spec.cell == "monotone":
            self._fold_step_size()
            self._activation = _relu

    def _fold_step_size(self) -> None:
        """relu((1 - a) z + a (W z + u)) as relu(W_a z + u_a), the step a folded into cell and stem."""
        dtype = self._weight.dtype
        weight = self._weight.astype(np.float64)
        a = step_size(weight.T)
        self._weight = ((1.0 - a) * np.eye(len(weight)) + a * weight).astype(dtype)
        self._stem, self._bias = (a * self._stem).astype(dtype), (a * self._bias).astype(dtype)

    def infer(self, x: ArrayLike, *, budget: int, tol: float | None = None) -> Inference:
        """Answers for x (B, features) with at most `budget` evaluations per sample.

        tol: relative residual at which a sample stops; None spends the whole budget. Raises ConfigError for a budget
        below 1 or a tolerance that is not above 0, DataError for another shape.
        """
        if budget < 1 or (tol is not None and not tol > 0.0):
            raise ConfigError(f"infer: budget {budget} must be at least 1 and tol {tol} above 0 (None: no early stop)")
        # A sample that holds NaN or infinity is reported by its residual.
        with np.errstate(invalid="ignore", over="ignore"):
            injection = self._inject(x)
            start = self._activation(injection, out=np.empty_like(injection))
            if tol is None:
                z, evaluations, residual = self._spend(start, injection, budget)
            else:
                z, evaluations, residual = self._converge(start, injection, budget, tol)
            return Inference(logits=z @ self._head + self._head_bias, evaluations=evaluations, residual=residual)

    def _inject(self, x: ArrayLike) -> Array:
        """a (U normalised(x) + b), (B, d); a = 1 but for a monotone cell."""
        dtype, features = self._weight.dtype, self.spec.input_shape[0]
        samples = np.asarray(x, dtype=dtype)
        if samples.ndim != 2 or samples.shape[1] != features:
            raise DataError(f"infer: x has shape {samples.shape}, expected (batch, {features})")
        if self.spec.shift or self.spec.scale:
            shift, scale = (np.asarray(values, dtype=dtype) for values in self._normalisation())
            samples = (samples - shift) / scale
        return samples @ self._stem + self._bias

    def _normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.spec.shift or (0.0,), self.spec.scale or (1.0,)

    def _step(self, z: Array, injection: Array, out: Array) -> None:
        """One evaluation of the cell, written to `out`."""
        np.matmul(z, self._weight, out=out)
        out += injection
        self._activation(out, out=out)

    def _spend(self, z: Array, injection: Array, budget: int) -> tuple[Array, NDArray[np.int64], Array]:
        """Exactly `budget` evaluations, the last of them measured."""
        f = np.empty_like(z)
        for _ in range(budget - 1):
            self._step(z, injection, f)
            z, f = f, z
        self._step(z, injection, f)
        return f, np.full(len(f), budget), _relative(np.subtract(f, z, out=z), f)

    def _converge(self, z: Array, injection: Array, budget: int, tol: float) -> tuple[Array, NDArray[np.int64], Array]:
        """Evaluations until every sample has reached `tol`; one that has keeps its answer and count."""
        f, step = np.empty_like(z), np.empty_like(z)
        residual = np.full(len(z), np.inf, dtype=z.dtype)
        evaluations = np.zeros(len(z), dtype=np.int64)
        active = np.ones(len(z), dtype=bool)
        for _ in range(budget):
            self._step(z, injection, f)
            measured = _relative(np.subtract(f, z, out=step), f)
            evaluations += active
            accepted = active & np.isfinite(measured)
            residual[accepted] = measured[accepted]
            if not accepted.all():
                np.copyto(f, z, where=~accepted[:, None])
            z, f = f, z
            active = ~(residual <= tol)
            if not active.any():
                break
        return z, evaluations, residual


def _relu(states: Array, /, *, out: Array) -> Array:
    positive: Array = np.maximum(states, 0.0, out=out)
    return positive


def _relative(step: Array, f: Array) -> Array:
    """(B,) |step| / max(|f|, 1e-9); infinite where that is NaN or the squares overflow."""
    length: Array = np.sqrt(np.einsum("bi,bi->b", f, f))
    moved: Array = np.sqrt(np.einsum("bi,bi->b", step, step))
    # A finite step over an overflown length would be 0, and an expanding cell converged.
    return np.where(np.isfinite(length + moved), moved / np.maximum(length, SMALLEST_NORM), np.inf)


def _named(layout: Layout, vector: Array, name: str) -> dict[str, Array]:
    if vector.shape != (size(layout),):
        raise ConfigError(
            f"numpy: {name} has shape {vector.shape}, this spec needs ({size(layout)},); was it made for another model?"
        )
    return {slot.name: slot.view(vector) for slot in layout}

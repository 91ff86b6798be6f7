"""Does the exported model answer as torch does? Same logits, same iteration counts, same isolation of a bad sample."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from fedeq_edge.deq.method import Picard
from fedeq_edge.deq.model import DEQ
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.onnx.runtime import Prediction, Predictor
from fedeq_edge.training.curve import noise

Samples = NDArray[np.float32]

# float32 sums in another order move a residual by some 1e-4 of itself (measured near r = 1e-5: 4e-3). Where it falls
# that close to the tolerance, stopping one evaluation earlier or later is equally right.
TIE = 0.01
# A tenth of the usual limit on the difference: where float32 is off by more, two correct programs may differ by it.
NOISE = 1e-5
LATENCY_RUNS = 20


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """How an exported model compares with torch.

    max_abs_diff: largest difference of a finite logit; infinite where one side alone is NaN or infinite.
    iterations_equal: counts agree for every sample, but for ties at the tolerance. iterations_mean: over random inputs.
    latency_ms: median for one sample on one thread of this machine. samples: how many were compared.
    """

    max_abs_diff: float
    iterations_equal: bool
    iterations_mean: float
    latency_ms: float
    samples: int


@dataclass(frozen=True, slots=True)
class _Answer:
    logits: NDArray[np.floating]
    iterations: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Budget:
    forward: int
    adjoint: int = 0


def verify(
    model: bytes, spec: ModelSpec, theta: NDArray[np.float32], head: NDArray[np.float32], *, budget: int, tol: float
) -> Verification:
    """The exported `model` compared with torch's solve of the same spec and parameters; raises nothing of its own.

    Inputs: batches of 1, 3 and 32 (seeded, in the scale of the model's normalisation), all zeros, and a batch whose
    middle sample holds NaN; each with the full budget and tolerance, and with both cut.
    """
    reference, exact = DEQ(spec), DEQ(spec, dtype=torch.float64)
    for twin in (reference, exact):
        twin.load(theta, head)
    predictor = Predictor(model)
    typical, edges = list(_typical(spec)), list(_edges(spec))
    settings = [(budget, tol), (max(1, budget // 2), 10 * tol)]
    checks = [
        *(_compare(predictor, reference, x, *setting) for x in typical for setting in settings),
        *(_compare(predictor, reference, x, *setting, exact) for x in edges for setting in settings),
    ]
    return Verification(
        max_abs_diff=max(difference for difference, _ in checks),
        iterations_equal=all(equal for _, equal in checks),
        iterations_mean=float(predictor.infer(typical[-1]).iterations.mean()),
        latency_ms=_latency_ms(predictor, typical[0]),
        samples=len(settings) * sum(map(len, [*typical, *edges])),
    )


def _typical(spec: ModelSpec) -> Iterator[Samples]:
    generator = np.random.default_rng(0)
    for count in (1, 3, 32):
        yield noise(spec, generator, count)


def _edges(spec: ModelSpec) -> Iterator[Samples]:
    yield np.zeros((2, *spec.input_shape), dtype=np.float32)
    spoilt = noise(spec, np.random.default_rng(1), 3)
    spoilt[1].flat[0] = np.nan
    yield spoilt


def _compare(
    predictor: Predictor, reference: DEQ, x: Samples, budget: int, tol: float, exact: DEQ | None = None
) -> tuple[float, bool]:
    """(largest difference of a logit, iteration counts agree).

    exact: the reference in float64; with it, samples on which torch itself does not know its answer are excused from
    all but being finite on both sides. GroupNorm blows up the rounding of a constant state: the published block
    answers an all-zero input with noise.
    """
    found = predictor.infer(x, budget=budget, tol=tol)
    expected, agreeing = _settle_ties(reference, x, budget, tol, found)
    excused = np.zeros(len(x), dtype=np.bool_) if exact is None else _rounded_away(reference, exact, x, budget, tol)
    return _difference(found.logits, expected, excused), bool((agreeing | excused).all())


def _rounded_away(reference: DEQ, exact: DEQ, x: Samples, budget: int, tol: float) -> NDArray[np.bool_]:
    """(B,) samples whose logits in float32 and float64 differ by more than `NOISE`; NaN is no difference."""
    gap = _answer(reference, x, budget, tol).logits - _answer(exact, x.astype(np.float64), budget, tol).logits
    return np.asarray((np.abs(gap) > NOISE).any(axis=1))


def _settle_ties(
    reference: DEQ, x: Samples, budget: int, tol: float, found: Prediction
) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """torch's logits per sample, at the tolerance within `TIE` that gives the found count, and whether one does."""
    first = _answer(reference, x, budget, tol)
    logits, agreeing = first.logits, first.iterations == found.iterations
    for nearby in (tol * (1 - TIE), tol * (1 + TIE)):
        if agreeing.all():
            break
        other = _answer(reference, x, budget, nearby)
        settled = ~agreeing & (other.iterations == found.iterations)
        logits = np.where(settled[:, None], other.logits, logits)
        agreeing |= settled
    return logits, agreeing


def _answer(reference: DEQ, x: NDArray[np.floating], budget: int, tol: float) -> _Answer:
    with torch.no_grad():
        output = reference(torch.from_numpy(x), budget=_Budget(budget), tol=tol or None, solver=Picard(check_every=1))
    return _Answer(output.logits.numpy(), output.evaluations.numpy())


def _difference(found: NDArray[np.float32], expected: NDArray[np.floating], excused: NDArray[np.bool_]) -> float:
    if not np.array_equal(np.isfinite(found), np.isfinite(expected)):
        return float("inf")
    compared = np.isfinite(found) & ~excused[:, None]
    return float(np.abs(found[compared] - expected[compared]).max(initial=0.0))


def _latency_ms(predictor: Predictor, x: Samples) -> float:
    spans = []
    for _ in range(LATENCY_RUNS):
        began = time.perf_counter()
        predictor.infer(x)
        spans.append(time.perf_counter() - began)
    return 1e3 * float(np.median(spans))

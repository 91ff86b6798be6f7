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
from fedeq_edge.onnx import cross
from fedeq_edge.onnx.recipe import Recipe
from fedeq_edge.onnx.runtime import Prediction, Predictor, evaluate
from fedeq_edge.training.curve import noise

Samples = NDArray[np.float32]
Parameters = tuple[NDArray[np.float32], NDArray[np.float32]]

# float32 sums in another order move a residual by some 1e-4 of itself (measured near r = 1e-5: 4e-3). Where it falls
# that close to the tolerance, stopping one evaluation earlier or later is equally right.
TIE = 0.01
# A tenth of the usual limit on the difference: where float32 is off by more, two correct programs may differ by it.
NOISE = 1e-5
LATENCY_RUNS = 20
# Real samples that are compared: spread over the file, and few enough for a device's whole data not to take minutes.
MOST_REAL = 256
# A sum over a batch may be taken in another order than over one sample. An int8 cell makes a step out of that.
BATCH_NOISE = {"float32": 1e-4, "float16": 1e-4, "int8": 0.1}


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """How an exported model compares with torch.

    max_abs_diff: largest difference of a finite logit from torch with the file's parameters; infinite where one side
    alone is NaN or infinite. iterations_equal: counts agree for every sample, but for ties at the tolerance.
    iterations_mean: over typical inputs, real ones if given. latency_ms: median for one sample on one thread of this
    machine. samples: how many were compared, real_samples: how many of them were real.
    agreement: share of typical inputs whose answer is that of torch with the model's own parameters; logit_error: L2
    error of their logits, relative. isolated: a sample answers alone as in a batch, whatever else the batch holds.
    cross_check: what came of the comparison with torch's own exporter; cross_check_diff: its largest difference of a
    logit, None where it was not made.
    """

    max_abs_diff: float
    iterations_equal: bool
    iterations_mean: float
    latency_ms: float
    samples: int
    real_samples: int
    agreement: float
    logit_error: float
    isolated: bool
    cross_check: str
    cross_check_diff: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was exported. theta, head: the model's own parameters; parameters: those that the file stands for.

    budget, tol: the file's defaults. samples: real ones, (n, *input_shape).
    """

    spec: ModelSpec
    theta: NDArray[np.float32]
    head: NDArray[np.float32]
    parameters: Parameters
    recipe: Recipe
    budget: int
    tol: float
    samples: Samples | None
    cross_check: bool

    @property
    def settings(self) -> list[tuple[int, float]]:
        """(budget, tol) pairs to compare at: the file's own and, if it takes any, half of it."""
        own = [(self.budget, self.tol)]
        return own if self.recipe.form == "unrolled" else [*own, (max(1, self.budget // 2), 10 * self.tol)]


@dataclass(frozen=True, slots=True)
class _Answer:
    logits: NDArray[np.floating]
    iterations: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Budget:
    forward: int
    adjoint: int = 0


def verify(model: bytes, request: Request) -> Verification:
    """The exported `model` compared with torch's solve of the same spec and parameters.

    Raises ExportError where the model, or the second one that torch's exporter writes for comparison, does not run.

    Inputs: batches of 1, 3 and 32 (seeded, in the scale of the model's normalisation), real ones, all zeros, and a
    batch whose middle sample holds NaN; each with the full budget and tolerance, and with both cut.
    """
    spec, settings = request.spec, request.settings
    reference, exact = (_torch(spec, request.parameters, dtype) for dtype in (torch.float32, torch.float64))
    predictor = Predictor(model)
    typical, edges = [*_random(spec), *_real(request.samples)], list(_edges(spec))
    checks = [
        *(_compare(predictor, reference, x, *setting) for x in typical for setting in settings),
        *(_compare(predictor, reference, x, *setting, exact) for x in edges for setting in settings),
    ]
    agreement, logit_error = _kept(predictor, request, typical[-1])
    outcome, cross_check_diff = _cross_check(model, request, reference)
    return Verification(
        max_abs_diff=max(difference for difference, _ in checks),
        iterations_equal=all(equal for _, equal in checks),
        iterations_mean=float(predictor.infer(typical[-1]).iterations.mean()),
        latency_ms=_latency_ms(predictor, typical[0]),
        samples=len(settings) * sum(map(len, [*typical, *edges])),
        real_samples=0 if request.samples is None else len(typical[-1]),
        agreement=agreement,
        logit_error=logit_error,
        isolated=_isolated(predictor, request, typical[-1][:32]),
        cross_check=outcome,
        cross_check_diff=cross_check_diff,
    )


def _torch(spec: ModelSpec, parameters: Parameters, dtype: torch.dtype = torch.float32) -> DEQ:
    model = DEQ(spec, dtype=dtype)
    model.load(*parameters)
    return model


def _random(spec: ModelSpec) -> Iterator[Samples]:
    generator = np.random.default_rng(0)
    for count in (1, 3, 32):
        yield noise(spec, generator, count)


def _real(samples: Samples | None) -> Iterator[Samples]:
    if samples is not None:
        yield samples[:: -(-len(samples) // MOST_REAL)].astype(np.float32)


def _edges(spec: ModelSpec) -> Iterator[Samples]:
    yield np.zeros((2, *spec.input_shape), dtype=np.float32)
    yield _spoilt(noise(spec, np.random.default_rng(1), 3))


def _spoilt(x: Samples) -> Samples:
    """The samples with NaN in the middle one."""
    spoilt = x.copy()
    spoilt[len(x) // 2].flat[0] = np.nan
    return spoilt


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


def _kept(predictor: Predictor, request: Request, x: Samples) -> tuple[float, float]:
    """(share of equal answers, relative L2 error of logits) against torch with the model's own parameters.

    torch spends the whole budget: what a smaller precision needs a larger tolerance for counts as its error.
    """
    own = _answer(_torch(request.spec, (request.theta, request.head)), x, request.budget, 0.0).logits
    found = predictor.infer(x).logits
    scale = float(np.linalg.norm(own)) or 1.0  # of a model without weights
    return float(np.mean(found.argmax(1) == own.argmax(1))), float(np.linalg.norm(found - own)) / scale


def _isolated(predictor: Predictor, request: Request, x: Samples) -> bool:
    """Whether the samples answer alone as together, and exactly as before beside one that is spoilt."""
    together, beside = predictor.infer(x), predictor.infer(_spoilt(x))
    others = np.arange(len(x)) != len(x) // 2
    if (
        not np.array_equal(together.logits[others], beside.logits[others])
        or np.isfinite(beside.residual[~others]).any()
    ):
        return False
    alone = [predictor.infer(row[None]) for row in x]
    scale = max(1.0, float(np.abs(together.logits).max()))
    limit = scale * BATCH_NOISE[request.recipe.precision] + 2 * request.tol * scale  # two answers that stop at a tie
    logits = np.concatenate([one.logits for one in alone])
    return bool(np.abs(logits - together.logits).max() <= limit)


def _cross_check(model: bytes, request: Request, reference: DEQ) -> tuple[str, float | None]:
    """(what came of it, largest difference of a logit from the file that torch's own exporter makes)."""
    if not request.cross_check:
        return "not asked for", None
    lacking = cross.missing()
    if lacking is not None:
        return f"not run: {lacking}", None
    x = noise(request.spec, np.random.default_rng(2), 3)
    feeds: dict[str, NDArray[np.generic]] = {
        "x": x,
        "tol": np.array(0.0, dtype=np.float32),
        "max_iter": np.array(request.budget, dtype=np.int64),
    }
    try:
        written = cross.second_model(reference, x)
    except cross.UnsupportedError as reason:
        return f"not run: {reason}", None
    second = evaluate(written, feeds, "the file of torch's own exporter")
    found = Predictor(model).infer(x, tol=0.0)
    difference = float(np.abs(found.logits - second["logits"]).max())
    return f"torch's own exporter differs by at most {difference:.1e}", difference


def _latency_ms(predictor: Predictor, x: Samples) -> float:
    spans = []
    for _ in range(LATENCY_RUNS):
        began = time.perf_counter()
        predictor.infer(x)
        spans.append(time.perf_counter() - began)
    return 1e3 * float(np.median(spans))

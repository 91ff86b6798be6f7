"""What a trained model's budget buys: accuracy, residual, proof and time against the number of evaluations K.

Answers are those of exactly K plain evaluations from the cell's own start: what a device gives that affords no more.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from fedeq_edge.deq.certificate import Certificate, Rate
from fedeq_edge.deq.numeric import Inference
from fedeq_edge.deq.spec import ModelSpec

Samples = NDArray[np.float32]

BATCH = 32
"""Samples asked at once in the second timing; one alone, as a sensor delivers them, is the first."""
# Solved at once: bounds the memory whatever the size of the test part.
ANSWERED_AT_ONCE = 256
# More sweeps than this no longer move a median.
MOST_SWEEPS = 15


class Engine(Protocol):
    """A loaded model behind one library (deq/engine.py, deq/numeric.py)."""

    def infer(self, x: Samples, *, budget: int, tol: float | None = None) -> Inference:
        """Answers with at most `budget` evaluations per sample; tol None spends all of them."""
        ...


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Median microseconds of processor time per sample, all layers included: asked alone, and `BATCH` at a time."""

    alone_us: float
    batch_us: float


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """What K = `evaluations` give.

    accuracy: share of right answers, None without labels. residual_mean, residual_max: relative residual over samples.
    certificate: what is proven of |z_K - z*|, None without a proof. change: |logits - logits at the largest K|
    relative to the latter, over all samples. timings: by engine.
    """

    evaluations: int
    accuracy: float | None
    residual_mean: float
    residual_max: float
    certificate: Certificate | None
    change: float
    timings: dict[str, Timing]

    @property
    def bound(self) -> float | None:
        """Of the certificate."""
        return None if self.certificate is None else self.certificate.bound


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """Points by ascending K, over `samples` samples.

    memory_mb: by engine, resident in a process that has answered `BATCH` samples; None where that failed. K, which
    repeats a loop, does not change it.
    """

    samples: int
    points: tuple[Point, ...]
    memory_mb: dict[str, float | None] = {}

    def ratio(self, engine: str, other: str) -> tuple[float, float]:
        """Time of `engine` over that of `other`, summed over K: (alone, in batches)."""
        first, second = ([point.timings[name] for point in self.points] for name in (engine, other))
        alone = sum(timing.alone_us for timing in first) / sum(timing.alone_us for timing in second)
        batch = sum(timing.batch_us for timing in first) / sum(timing.batch_us for timing in second)
        return alone, batch


def measure(
    engines: Mapping[str, Engine],
    rate: Rate | None,
    x: Samples,
    y: NDArray[np.int64] | None,
    budgets: Sequence[int],
    *,
    limit_s: float = 5.0,
) -> Curve:
    """The curve of a model over samples x (n, *input_shape), n >= 1, with labels y (n,) or without.

    engines: the same model behind one library or more; the first one answers, all are timed. rate: what its parameters
    promise, None without a proof. budgets: ascending.
    limit_s: seconds after which no further sweep of timings begins (one is always completed).
    """
    reference = next(iter(engines.values()))
    answers = {K: _answers(reference, x, K) for K in budgets}
    last = answers[budgets[-1]].logits
    scale = float(np.linalg.norm(last)) or 1.0  # of a model without weights
    timings = _timings(engines, np.resize(x, (BATCH, *x.shape[1:])), budgets, limit_s)
    points = (
        Point(
            evaluations=K,
            accuracy=None if y is None else float(np.mean(answer.logits.argmax(axis=1) == y)),
            residual_mean=float(answer.residual.mean()),
            residual_max=float(answer.residual.max()),
            certificate=None if rate is None else rate.certificate(K),
            change=float(np.linalg.norm(answer.logits - last)) / scale,
            timings={name: timings[name, K] for name in engines},
        )
        for K, answer in answers.items()
    )
    return Curve(samples=len(x), points=tuple(points))


def noise(spec: ModelSpec, generator: np.random.Generator, count: int) -> Samples:
    """(count, *input_shape) samples, standard normal after the model's own normalisation."""
    per_channel = (-1, *(1,) * spec.spatial)
    shift, scale = (np.reshape(values, per_channel) for values in (spec.shift or (0.0,), spec.scale or (1.0,)))
    drawn = generator.standard_normal((count, *spec.input_shape))
    return (shift + scale * drawn).astype(np.float32)


def _answers(engine: Engine, x: Samples, K: int) -> Inference:
    parts = [engine.infer(x[at : at + ANSWERED_AT_ONCE], budget=K) for at in range(0, len(x), ANSWERED_AT_ONCE)]
    return Inference(
        logits=np.concatenate([part.logits for part in parts]),
        evaluations=np.concatenate([part.evaluations for part in parts]),
        residual=np.concatenate([part.residual for part in parts]),
    )


def _timings(
    engines: Mapping[str, Engine], x: Samples, budgets: Sequence[int], limit_s: float
) -> dict[tuple[str, int], Timing]:
    """By engine and K; sweeps go over all of them, so that a slow moment of the machine hits all alike."""
    calls = [(name, K, part) for name in engines for K in budgets for part in (x[:1], x)]
    ends, sweeps = time.monotonic() + limit_s, list[list[float]]()
    while not sweeps or (len(sweeps) < MOST_SWEEPS and time.monotonic() < ends):
        sweeps.append([_microseconds(engines[name].infer, part, K) for name, K, part in calls])
    medians = np.median(np.array(sweeps), axis=0)
    return {
        (name, K): Timing(alone_us=float(alone), batch_us=float(batch))
        for (name, K, _), alone, batch in zip(calls[::2], medians[::2], medians[1::2], strict=True)
    }


def _microseconds(infer: Callable[..., Inference], x: Samples, K: int) -> float:
    infer(x, budget=K)  # from caches that another library has filled, a first answer took six times as long
    began = time.thread_time()  # neighbours on the same cores are not what an answer costs
    infer(x, budget=K)
    return 1e6 * (time.thread_time() - began) / len(x)

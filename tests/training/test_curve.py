"""What a budget buys is told by K as it is: answers of exactly K evaluations, their proof and their cost."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from fedeq_edge.deq.engine import TorchEngine
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.numeric import Inference, NumpyDEQ
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.deq.wellposed import certificate, rate
from fedeq_edge.errors import DataError
from fedeq_edge.training.curve import BATCH, Curve, Point, Samples, Timing, measure, noise

DENSE = ModelSpec(input_shape=(6,), classes=3, channels=8, shift=(1.0,), scale=(2.0,))
IMAGE = ModelSpec(input_shape=(1, 6, 6), classes=3, cell="residual", channels=8, groups=4)


@dataclass
class Stepwise:
    """Answers class 1 from three evaluations on, class 0 before; the residual of sample i after K is i / K."""

    calls: list[tuple[int, int]] = field(default_factory=list)

    def infer(self, x: Samples, *, budget: int, tol: float | None = None) -> Inference:
        assert tol is None
        self.calls.append((len(x), budget))
        logits = np.zeros((len(x), 3))
        logits[:, int(budget >= 3)] = budget
        return Inference(logits=logits, evaluations=np.full(len(x), budget), residual=x[:, 0] / budget)


def test_accuracy_residual_and_change_are_those_of_each_budget() -> None:
    x = np.repeat(np.arange(600.0, dtype=np.float32)[:, None], 6, axis=1)
    theta, _ = initial(DENSE, 0)

    curve = measure({"torch": Stepwise()}, rate(theta, DENSE), x, np.ones(600, np.int64), [2, 3, 6], limit_s=0.0)

    assert curve.samples == 600
    assert [point.evaluations for point in curve.points] == [2, 3, 6]
    assert [point.accuracy for point in curve.points] == [0.0, 1.0, 1.0]
    assert [point.residual_max for point in curve.points] == pytest.approx([599 / 2, 599 / 3, 599 / 6])
    assert [point.residual_mean for point in curve.points] == pytest.approx([299.5 / 2, 299.5 / 3, 299.5 / 6])
    assert [point.change for point in curve.points] == pytest.approx([np.hypot(2, 6) / 6, 0.5, 0.0])
    assert [point.certificate for point in curve.points] == [certificate(theta, DENSE, K) for K in (2, 3, 6)]


def test_every_engine_is_timed_alone_and_in_batches_and_the_first_one_answers() -> None:
    first, second = Stepwise(), Stepwise()
    theta, _ = initial(DENSE, 0)

    curve = measure(
        {"numpy": first, "torch": second},
        rate(theta, DENSE),
        noise(DENSE, np.random.default_rng(0), 5),
        None,
        [1, 4],
        limit_s=0.0,
    )

    assert {size for size, _ in second.calls} == {1, BATCH}
    assert {size for size, _ in first.calls} == {1, BATCH, 5}
    assert all(set(point.timings) == {"numpy", "torch"} for point in curve.points)
    assert all(point.accuracy is None for point in curve.points)


def test_a_curve_says_how_two_engines_compare() -> None:
    def point(K: int, numpy_us: float, torch_us: float) -> Point:
        timings = {
            "numpy": Timing(alone_us=numpy_us, batch_us=1.0),
            "torch": Timing(alone_us=torch_us, batch_us=0.5),
        }
        return Point(
            evaluations=K, accuracy=None, residual_mean=0, residual_max=0, certificate=None, change=0, timings=timings
        )

    curve = Curve(samples=1, points=(point(1, 10, 30), point(2, 20, 30)))

    assert curve.ratio("torch", "numpy") == (2.0, 0.5)


def test_noise_has_the_scale_of_the_models_inputs_and_is_the_same_every_time() -> None:
    drawn = noise(DENSE, np.random.default_rng(0), 4000)

    assert drawn.shape == (4000, 6)
    assert (drawn.mean(), drawn.std()) == (pytest.approx(1.0, abs=0.05), pytest.approx(2.0, abs=0.05))
    assert np.array_equal(drawn[:10], noise(DENSE, np.random.default_rng(0), 4000)[:10])


@pytest.mark.parametrize("tol", [None, 1e-3])
def test_torch_and_numpy_answer_alike(tol: float | None) -> None:
    theta, head = initial(DENSE, 3)
    x = noise(DENSE, np.random.default_rng(0), 20)

    ours = NumpyDEQ(DENSE, theta, head).infer(x, budget=7, tol=tol)
    reference = TorchEngine(DENSE, theta, head).infer(x, budget=7, tol=tol)

    np.testing.assert_allclose(ours.logits, reference.logits, atol=1e-6)
    np.testing.assert_array_equal(ours.evaluations, reference.evaluations)
    np.testing.assert_allclose(ours.residual, reference.residual, atol=1e-6)


def test_torch_answers_for_images_and_names_the_shape_that_it_expects() -> None:
    engine = TorchEngine(IMAGE, *initial(IMAGE, 0))

    assert engine.infer(noise(IMAGE, np.random.default_rng(0), 3), budget=4).logits.shape == (3, 3)
    with pytest.raises(DataError, match=r"expected \(batch, 1, 6, 6\)"):
        engine.infer(noise(DENSE, np.random.default_rng(0), 3), budget=4)

"""Inference by numpy against the same model in torch: answers, counts and residuals, and what it refuses."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.layout import cell_weight
from fedeq_edge.deq.method import Picard
from fedeq_edge.deq.model import DEQ
from fedeq_edge.deq.numeric import Array, Inference, NumpyDEQ
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError, DataError

SPECS = {
    "contractive": ModelSpec(input_shape=(12,), classes=3, channels=40, radius=0.95),
    "spectral": ModelSpec(input_shape=(12,), classes=3, channels=40, norm="spectral"),
    "monotone": ModelSpec(input_shape=(12,), classes=3, channels=40, cell="monotone"),
    "normalised": ModelSpec(
        input_shape=(3,), classes=4, channels=8, shift=(0.5, -1.0, 2.0), scale=(0.25, 2.0, 1.0), radius=None
    ),
}
TOLERANCES = {np.dtype(np.float32): 1e-6, np.dtype(np.float64): 1e-13}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
each_dtype = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])


def parameters(spec: ModelSpec, dtype: type[np.floating]) -> tuple[Array, Array]:
    theta, head = initial(spec, 3)
    return theta.astype(dtype), head.astype(dtype)


def samples(spec: ModelSpec, batch: int, dtype: type[np.floating]) -> Array:
    """Samples whose solves take unlike numbers of evaluations: sizes from 0.01 to 10."""
    drawn = np.random.default_rng(0).standard_normal((batch, *spec.input_shape))
    return (drawn * np.geomspace(0.01, 10.0, batch)[:, None]).astype(dtype)


def by_torch(spec: ModelSpec, theta: Array, head: Array, x: Array, *, budget: int, tol: float | None) -> Inference:
    model = DEQ(spec, dtype=torch.from_numpy(theta[:1]).dtype)
    model.load(theta, head)
    with torch.no_grad():
        found = model.solve(torch.from_numpy(x), budget=budget, tol=tol, solver=Picard(check_every=1))
        logits = model.head(model.features(found.value))
    return Inference(logits=logits.numpy(), evaluations=found.evaluations.numpy(), residual=found.residual.numpy())


def assert_alike(mine: Inference, other: Inference) -> None:
    tolerance = TOLERANCES[mine.logits.dtype]
    assert mine.logits.dtype == other.logits.dtype
    np.testing.assert_allclose(mine.logits, other.logits, rtol=tolerance, atol=tolerance * abs(other.logits).max())
    np.testing.assert_allclose(mine.residual, other.residual, rtol=1e-2, atol=tolerance)
    assert mine.evaluations.tolist() == other.evaluations.tolist()


@each_spec
@each_dtype
@pytest.mark.parametrize("budget", [1, 2, 12])
@pytest.mark.parametrize("tol", [None, 1e-3])
def test_the_answers_are_those_of_torch(
    spec: ModelSpec, dtype: type[np.floating], budget: int, tol: float | None
) -> None:
    theta, head = parameters(spec, dtype)
    x = samples(spec, 20, dtype)
    mine = NumpyDEQ(spec, theta, head).infer(x, budget=budget, tol=tol)
    assert_alike(mine, by_torch(spec, theta, head, x, budget=budget, tol=tol))


@each_spec
def test_every_sample_stops_at_its_own_residual(spec: ModelSpec) -> None:
    model = NumpyDEQ(spec, *parameters(spec, np.float64))
    x = samples(spec, 20, np.float64)
    together = model.infer(x, budget=200, tol=1e-4)
    assert (together.residual <= 1e-4).all()
    assert len(set(together.evaluations.tolist())) > 2
    for index in range(len(x)):
        alone = model.infer(x[index : index + 1], budget=200, tol=1e-4)
        assert alone.evaluations[0] == together.evaluations[index]
        np.testing.assert_allclose(alone.logits[0], together.logits[index], rtol=1e-12)


def test_a_tolerance_within_reach_saves_evaluations_and_no_tolerance_spends_all() -> None:
    spec = SPECS["contractive"]
    model, x = NumpyDEQ(spec, *parameters(spec, np.float32)), samples(spec, 4, np.float32)
    assert (model.infer(x, budget=50, tol=1e-2).evaluations < 20).all()
    assert model.infer(x, budget=50).evaluations.tolist() == [50] * 4


@pytest.mark.parametrize("tol", [None, 1e-3])
def test_a_sample_that_holds_nan_is_told_by_its_residual_and_disturbs_nobody(tol: float | None) -> None:
    spec = SPECS["contractive"]
    model, x = NumpyDEQ(spec, *parameters(spec, np.float32)), samples(spec, 5, np.float32)
    clean = model.infer(x, budget=9, tol=tol)
    x[2, 1] = np.nan
    found = model.infer(x, budget=9, tol=tol)
    mates = [0, 1, 3, 4]
    assert found.residual[2] == np.inf
    assert found.evaluations[2] == 9
    np.testing.assert_array_equal(found.logits[mates], clean.logits[mates])
    np.testing.assert_array_equal(found.evaluations[mates], clean.evaluations[mates])


@pytest.mark.parametrize("budget", range(50, 140, 6))
def test_an_expanding_cell_is_not_called_converged_where_its_squares_overflow(budget: int) -> None:
    spec = SPECS["monotone"]
    theta, head = parameters(spec, np.float32)
    cell_weight(spec).view(theta)[:] = 3.0 * np.eye(40)
    found = NumpyDEQ(spec, theta, head).infer(np.ones((2, 12)), budget=budget, tol=1e-3)
    assert (found.residual > 1e-3).all()


def test_the_samples_and_the_parameters_stay_as_they_are() -> None:
    for spec in SPECS.values():
        theta, head = parameters(spec, np.float32)
        x = samples(spec, 3, np.float32)
        before: list[NDArray[np.floating]] = [theta.copy(), head.copy(), x.copy()]
        NumpyDEQ(spec, theta, head).infer(x, budget=4, tol=1e-3)
        for kept, now in zip(before, (theta, head, x), strict=True):
            np.testing.assert_array_equal(kept, now)


def test_an_empty_batch_has_no_answers() -> None:
    spec = SPECS["contractive"]
    found = NumpyDEQ(spec, *parameters(spec, np.float32)).infer(np.zeros((0, 12)), budget=3, tol=1e-3)
    assert found.logits.shape == (0, 3)


def test_what_it_cannot_compute_is_refused_with_a_reason() -> None:
    image = ModelSpec(input_shape=(1, 8, 8), classes=3, channels=8)
    with pytest.raises(ConfigError, match="only dense ones"):
        NumpyDEQ(image, *initial(image, 0))
    spec = SPECS["contractive"]
    theta, head = parameters(spec, np.float32)
    with pytest.raises(ConfigError, match=r"head has shape \(5,\)"):
        NumpyDEQ(spec, theta, head[:5])
    model = NumpyDEQ(spec, theta, head)
    with pytest.raises(DataError, match=r"shape \(2, 11\), expected \(batch, 12\)"):
        model.infer(np.zeros((2, 11)), budget=3)
    for budget, tol in ((0, None), (3, 0.0), (3, float("nan"))):
        with pytest.raises(ConfigError, match="infer: budget"):
            model.infer(np.zeros((2, 12)), budget=budget, tol=tol)


def test_it_needs_no_torch() -> None:
    code = "import sys, fedeq_edge.deq.numeric; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

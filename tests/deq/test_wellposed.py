"""Well-posed cells: what projection promises, and that the promise holds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedeq_edge.consensus.constraint import feasible
from fedeq_edge.deq.layout import row_bounds, size, theta_layout
from fedeq_edge.deq.model import DEQ
from fedeq_edge.deq.solution import Result
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.deq.wellposed import constrain, contraction_rate, error_bound, evaluations_for
from fedeq_edge.errors import ConfigError

CONTRACTIVE = [
    ModelSpec(input_shape=(6,), classes=3, channels=7),
    ModelSpec(input_shape=(2, 9), classes=3, channels=4, radius=0.7),
    ModelSpec(input_shape=(1, 5, 4), classes=3, channels=3, radius=0.95),
]
kinds = st.sampled_from(CONTRACTIVE)
seeds = st.integers(0, 2**32 - 1)
quick = settings(deadline=None, max_examples=30, derandomize=True)


def random_model(spec: ModelSpec, seed: int, width: float = 3.0) -> DEQ:
    generator = np.random.default_rng(seed)
    model = DEQ(spec, dtype=torch.float64)
    model.load(generator.normal(0.0, width, model.theta.shape), generator.normal(0.0, 1.0, model.head_vector.shape))
    return model


def random_batch(spec: ModelSpec, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0.0, 3.0, (4, *spec.input_shape)))


@quick
@given(spec=kinds, seed=seeds)
def test_any_parameters_converge_once_projected(spec: ModelSpec, seed: int) -> None:
    model = random_model(spec, seed)
    model.project()
    solution = model.solve(random_batch(spec, seed), budget=600, tol=1e-8)
    assert (solution.result == Result.CONVERGED).all()


@quick
@given(spec=kinds, seed=seeds, evaluations=st.integers(1, 25))
def test_both_certificates_bound_the_true_error(spec: ModelSpec, seed: int, evaluations: int) -> None:
    model = random_model(spec, seed)
    model.project()
    gamma = contraction_rate(model.theta.numpy(), spec)
    injection = model.inject(random_batch(spec, seed)).detach()
    with torch.no_grad():
        states = [model.cell.start(injection)]
        for _ in range(700):
            states.append(model.cell.step(states[-1], injection))
    error = float((states[evaluations] - states[-1]).abs().max())
    first_step = float((states[1] - states[0]).abs().max())
    assert error <= error_bound(gamma, evaluations, first_step) + 1e-12
    assert error <= gamma ** (evaluations + 1) + 1e-12


@quick
@given(spec=kinds, seed=seeds, share=st.floats(0.0, 1.0))
def test_a_convex_combination_of_well_posed_parameters_is_well_posed(spec: ModelSpec, seed: int, share: float) -> None:
    first, second = random_model(spec, seed), random_model(spec, seed + 1)
    first.project()
    second.project()
    mixed = share * first.theta.numpy() + (1.0 - share) * second.theta.numpy()
    assert feasible(mixed, row_bounds(spec), tolerance=1e-12)


def test_constraining_moves_the_cell_alone() -> None:
    spec = CONTRACTIVE[0]
    theta = np.full(size(theta_layout(spec)), 2.0)
    constrain(theta, spec)
    assert contraction_rate(theta, spec) == pytest.approx(spec.radius)
    assert (theta[: theta_layout(spec)[-1].offset] == 2.0).all()


def test_the_rate_is_the_largest_row_norm_even_unconstrained() -> None:
    spec = ModelSpec(input_shape=(2,), classes=2, channels=2, radius=None)
    theta = np.zeros(size(theta_layout(spec)), dtype=np.float32)
    theta[-4:] = [0.5, -0.25, 1.0, -2.0]
    assert contraction_rate(theta, spec) == 3.0
    assert error_bound(3.0, 10, 1e-9) == float("inf")


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("accuracy", [2.0, 1e-2, 1e-4])
def test_the_promised_evaluations_are_the_least_that_suffice(gamma: float, accuracy: float) -> None:
    evaluations = evaluations_for(gamma, accuracy)
    assert gamma ** (evaluations + 1) <= accuracy * (1 + 1e-12)
    assert evaluations == 1 or gamma**evaluations > accuracy


def test_certificates_refuse_what_they_cannot_certify() -> None:
    with pytest.raises(ConfigError, match='use cell = "contractive"'):
        contraction_rate(np.zeros(1), ModelSpec(input_shape=(1, 8), classes=2, cell="residual"))
    with pytest.raises(ConfigError, match="gamma < 1"):
        evaluations_for(1.0, 1e-3)
    with pytest.raises(ConfigError, match="accuracy > 0"):
        evaluations_for(0.9, 0.0)

"""Well-posed cells: what projection promises, and that the promise holds."""

import copy
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from fedeq_edge.consensus.constraint import feasible
from fedeq_edge.deq.cell import MonotoneCell
from fedeq_edge.deq.certificate import Certificate
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.layout import cell_weight, constraints, size, theta_layout
from fedeq_edge.deq.model import DEQ
from fedeq_edge.deq.solution import Result
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.deq.wellposed import (
    adjoint_terms_for,
    certificate,
    constrain,
    contraction_rate,
    error_bound,
    evaluations_for,
    step_size,
)
from fedeq_edge.errors import ConfigError

Array = NDArray[np.float64]

WELL_POSED = {
    "dense": ModelSpec(input_shape=(6,), classes=3, channels=7),
    "sequence": ModelSpec(input_shape=(2, 9), classes=3, channels=4, radius=0.7),
    "image": ModelSpec(input_shape=(1, 5, 4), classes=3, channels=3, radius=0.95),
    "dense spectral": ModelSpec(input_shape=(6,), classes=3, channels=7, norm="spectral"),
    "sequence spectral": ModelSpec(input_shape=(2, 9), classes=3, channels=4, norm="spectral", radius=0.95),
    "image spectral": ModelSpec(input_shape=(1, 5, 4), classes=3, channels=3, norm="spectral", radius=0.8),
    "monotone": ModelSpec(input_shape=(6,), classes=3, cell="monotone", channels=7, radius=0.5),
}
MONOTONE = WELL_POSED["monotone"]
kinds = st.sampled_from(list(WELL_POSED.values()))
seeds = st.integers(0, 2**32 - 1)
quick = settings(deadline=None, max_examples=40, derandomize=True, database=None)


def random_model(spec: ModelSpec, seed: int, dtype: torch.dtype = torch.float64) -> DEQ:
    """A projected model whose W was drawn far outside its set, unless it is monotone: |I - W| sets the rate there."""
    generator = np.random.default_rng(seed)
    width = 0.5 if spec.cell == "monotone" else 3.0
    model = DEQ(spec, dtype=dtype)
    model.load(generator.normal(0.0, width, model.theta.shape), generator.normal(0.0, 1.0, model.head_vector.shape))
    model.project()
    return model


def random_batch(spec: ModelSpec, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0.0, 3.0, (4, *spec.input_shape)))


def in_norm(name: str, states: Tensor) -> Tensor:
    """(B,) sizes of states (B, ...) in the norm of a certificate."""
    flat = states.flatten(1).double()
    return flat.abs().amax(dim=1) if name == "max" else flat.pow(2).mean(dim=1).sqrt()


def trajectory(model: DEQ, injection: Tensor, evaluations: int) -> list[Tensor]:
    with torch.no_grad():
        states = [model.cell.start(injection)]
        for _ in range(evaluations):
            states.append(model.cell.step(states[-1], injection))
    return states


def monotone_cell(model: DEQ) -> MonotoneCell:
    assert isinstance(model.cell, MonotoneCell)
    return model.cell


def in_float64(model: DEQ) -> DEQ:
    exact = DEQ(model.spec, dtype=torch.float64)
    exact.load(model.theta.numpy(), model.head_vector.numpy())
    return exact


@quick
@given(spec=kinds, seed=seeds)
def test_any_parameters_converge_once_projected(spec: ModelSpec, seed: int) -> None:
    solution = random_model(spec, seed).solve(random_batch(spec, seed), budget=2000, tol=1e-7)
    assert (solution.result == Result.CONVERGED).all()


@quick
@given(spec=kinds, seed=seeds, evaluations=st.integers(1, 25))
def test_both_bounds_hold_for_the_true_error(spec: ModelSpec, seed: int, evaluations: int) -> None:
    model = random_model(spec, seed)
    proven = certificate(model.theta.numpy(), spec, evaluations)
    assert proven is not None
    injection = model.inject(random_batch(spec, seed)).detach()
    states = trajectory(model, injection, 2000)
    error = in_norm(proven.norm, states[evaluations] - states[-1])
    first_step = in_norm(proven.norm, states[1] - states[0])
    scale = in_norm(proven.norm, injection) if proven.unit == "injection" else torch.ones(4)
    assert (error <= proven.bound * scale).all()
    assert (error <= error_bound(proven.gamma, evaluations, 1.0) * first_step + 1e-9).all()


@quick
@given(spec=kinds, seed=seeds, evaluations=st.sampled_from([1, 5, 25, 400]))
def test_the_certificate_holds_in_float32_even_where_only_rounding_is_left(
    spec: ModelSpec, seed: int, evaluations: int
) -> None:
    model = random_model(spec, seed, torch.float32)
    proven = certificate(model.theta.numpy(), spec, evaluations)
    assert proven is not None
    injection = model.inject(random_batch(spec, seed).float()).detach()
    found = trajectory(model, injection, evaluations)[-1]
    equilibrium = trajectory(in_float64(model), injection.double(), 2000)[-1]
    scale = in_norm(proven.norm, injection) if proven.unit == "injection" else torch.ones(4)
    assert (in_norm(proven.norm, found - equilibrium) <= proven.bound * scale).all()


@quick
@given(spec=kinds, seed=seeds, weights=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=4))
def test_any_convex_fusion_of_well_posed_clients_is_well_posed(
    spec: ModelSpec, seed: int, weights: list[float]
) -> None:
    clients = [random_model(spec, seed + i) for i in range(len(weights))]
    fused = np.average([client.theta.numpy() for client in clients], axis=0, weights=weights)
    assert feasible(fused, constraints(spec), tolerance=1e-12)
    proven = certificate(fused, spec, 10)
    assert proven is not None
    if spec.cell == "contractive":
        assert spec.radius is not None
        assert proven.gamma <= spec.radius * (1 + 1e-12)
    model = DEQ(spec, dtype=torch.float64)
    model.load(fused, clients[0].head_vector.numpy())
    solution = model.solve(random_batch(spec, seed), budget=2000, tol=1e-7)
    assert (solution.result == Result.CONVERGED).all()


def test_a_monotone_cell_converges_where_plain_iteration_of_the_same_equation_does_not() -> None:
    model = random_model(MONOTONE, 5)
    weight = model.get_parameter("cell.weight").detach()
    weight -= 3.0 * torch.eye(7, dtype=torch.float64)
    model.project()
    assert torch.linalg.matrix_norm(weight, 2) > 3.0
    injection = model.inject(random_batch(MONOTONE, 5)).detach()
    z = plain = trajectory(model, injection, 500)[-1]
    for _ in range(20):
        plain = torch.relu(plain + 1e-9).mm(weight.t()).add(injection).relu()
    torch.testing.assert_close(z, torch.relu(z @ weight.t() + injection))
    assert float((plain - z).abs().max()) > 1.0


@pytest.mark.parametrize("name", ["sequence spectral", "image spectral"])
@pytest.mark.parametrize("seed", range(5))
def test_the_rate_of_a_convolution_lies_between_the_norm_of_its_matrix_and_the_sum_over_its_taps(
    name: str, seed: int
) -> None:
    spec = WELL_POSED[name]
    model = random_model(spec, seed)
    zero = torch.zeros(1, *spec.state_shape, dtype=torch.float64)
    basis = torch.eye(zero.numel(), dtype=torch.float64).reshape(-1, *spec.state_shape)
    layer = nn.functional.conv1d if spec.spatial == 1 else nn.functional.conv2d
    matrix = layer(basis, model.get_parameter("cell.weight").detach(), padding=1).flatten(1)
    rate = contraction_rate(model.theta.numpy(), spec)
    (constraint,) = constraints(spec)
    level = constraint.level(cell_weight(spec).view(model.theta.numpy()).reshape(constraint.shape).astype(np.float64))
    exact = float(torch.linalg.matrix_norm(matrix, 2))
    assert exact <= rate * (1 + 1e-12) <= level * (1 + 2e-12)
    assert rate <= 1.2 * exact  # 5 x 4 places; the sum over the taps lies further off


def test_a_convolution_over_a_single_place_is_certified_too() -> None:
    spec = ModelSpec(input_shape=(2, 1), classes=2, channels=3, norm="spectral")
    theta, _ = initial(spec, 0)
    centre = cell_weight(spec).view(theta)[..., 1]
    assert np.linalg.norm(centre, 2) <= contraction_rate(theta, spec) <= 0.9


@quick
@given(seed=seeds, spread=st.floats(0.01, 2.0))
def test_the_step_of_a_monotone_cell_is_the_largest_for_which_its_operator_is_cocoercive(
    seed: int, spread: float
) -> None:
    generator = np.random.default_rng(seed)
    theta = generator.normal(0.0, spread, size(theta_layout(MONOTONE)))
    constrain(theta, MONOTONE)
    weight = cell_weight(MONOTONE).view(theta)
    M, a = np.eye(7) - weight, step_size(weight)
    gap = np.linalg.eigvalsh((M + M.T) / 2 - a * M.T @ M)[0]
    assert gap == pytest.approx(0.0, abs=1e-9 * float(np.linalg.norm(M)) ** 2)
    m, L = np.linalg.eigvalsh((M + M.T) / 2)[0], np.linalg.norm(M, 2)
    gamma = contraction_rate(theta, MONOTONE)
    assert gamma**2 <= 1.0 - a * m + 1e-9
    assert a >= m / L**2 - 1e-12
    assert gamma <= np.sqrt(1.0 - (m / L) ** 2) + 1e-9


def test_the_fixed_point_does_not_depend_on_the_step_and_neither_does_the_gradient() -> None:
    spec = ModelSpec(input_shape=(3,), classes=2, cell="monotone", channels=5, radius=0.5)
    gradients = []
    for share in (1.0, 0.5):
        model = DEQ(spec, dtype=torch.float64)
        model.load(*initial(spec, 3))
        monotone_cell(model).step_size *= share
        x = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 3)))
        z = model.inject(x).detach()
        injection = z.clone().requires_grad_()
        state = trajectory(model, z, 300)[-1].requires_grad_()
        value = model.cell.step(state, injection)
        v = u = torch.ones_like(value)
        for _ in range(300):
            u = v + torch.autograd.grad(value, state, u, retain_graph=True)[0]
        gradients.append(torch.autograd.grad(value, (injection, model.get_parameter("cell.weight")), u))
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_the_products_with_the_transposed_jacobian_are_those_of_autograd() -> None:
    model = random_model(MONOTONE, 2)
    injection = model.inject(random_batch(MONOTONE, 2)).detach()
    z = trajectory(model, injection, 1)[-1].requires_grad_()
    value = model.cell.step(z, injection)
    v, u = torch.from_numpy(np.random.default_rng(1).normal(size=(2, *value.shape)))
    expected = v + torch.autograd.grad(value, z, u)[0]
    torch.testing.assert_close(monotone_cell(model).linearise(value.detach())(v, u), expected)


def test_a_step_follows_the_weight_through_loading_projecting_and_copying() -> None:
    model = random_model(MONOTONE, 0)
    expected = step_size(cell_weight(MONOTONE).view(model.theta.numpy()))
    assert expected < 1.0
    for built in (model, in_float64(model), copy.deepcopy(model)):
        assert monotone_cell(built).step_size == expected
    model.theta.mul_(2.0)
    model.project()
    assert monotone_cell(model).step_size == step_size(cell_weight(MONOTONE).view(model.theta.numpy())) != expected


@pytest.mark.parametrize("spoil", [np.eye(3), 2.0 * np.eye(3), np.full((3, 3), np.nan)])
def test_a_weight_that_is_not_monotone_is_iterated_plainly_and_certifies_nothing(spoil: Array) -> None:
    assert step_size(spoil) == 1.0
    spec = ModelSpec(input_shape=(2,), classes=2, cell="monotone", channels=3)
    theta, _ = initial(spec, 0)
    if np.isfinite(spoil).all():
        cell_weight(spec).view(theta)[:] = spoil
        assert certificate(theta, spec, 5) is None


def test_constraining_moves_the_cell_alone() -> None:
    spec = WELL_POSED["dense"]
    theta = np.full(size(theta_layout(spec)), 2.0)
    constrain(theta, spec)
    assert contraction_rate(theta, spec) == pytest.approx(spec.radius)
    assert (theta[: cell_weight(spec).offset] == 2.0).all()


def test_the_rate_is_the_largest_row_norm_even_unconstrained() -> None:
    spec = ModelSpec(input_shape=(2,), classes=2, channels=2, radius=None)
    theta = np.zeros(size(theta_layout(spec)), dtype=np.float32)
    theta[-4:] = [0.5, -0.25, 1.0, -2.0]
    assert contraction_rate(theta, spec) == 3.0
    assert certificate(theta, spec, 10) is None
    assert error_bound(3.0, 10, 1e-9) == float("inf")


def test_a_certificate_travels_as_json() -> None:
    proven = certificate(initial(MONOTONE, 0)[0], MONOTONE, 12)
    assert proven is not None
    assert (proven.norm, proven.unit, proven.evaluations) == ("rms", "injection", 12)
    assert msgspec.json.decode(msgspec.json.encode(proven), type=Certificate) == proven


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("accuracy", [2.0, 1e-2, 1e-4])
@pytest.mark.parametrize("distance", [None, 5.0])
def test_the_promised_evaluations_are_the_least_that_suffice(
    gamma: float, accuracy: float, distance: float | None
) -> None:
    evaluations = evaluations_for(gamma, accuracy, distance=distance)
    start = gamma if distance is None else distance
    assert start * gamma**evaluations <= accuracy * (1 + 1e-12)
    assert evaluations == 1 or start * gamma ** (evaluations - 1) > accuracy


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("accuracy", [2.0, 1e-1, 1e-4])
def test_the_promised_adjoint_terms_are_the_least_that_suffice(gamma: float, accuracy: float) -> None:
    terms = adjoint_terms_for(gamma, accuracy)
    assert gamma ** (terms + 1) / (1.0 - gamma) <= accuracy * (1 + 1e-12)
    assert terms == 0 or gamma**terms / (1.0 - gamma) > accuracy


@pytest.mark.parametrize("name", WELL_POSED)
def test_the_k_term_adjoint_is_as_exact_as_promised(name: str) -> None:
    """In the dual of the certificate's norm: the sum of magnitudes, or L2."""
    spec = WELL_POSED[name]
    model = random_model(spec, 1)
    proven = certificate(model.theta.numpy(), spec, 1)
    assert proven is not None
    injection = model.inject(random_batch(spec, 1)).detach()
    z = trajectory(model, injection, 500)[-1].requires_grad_()
    value = model.cell.step(z, injection)
    v = term = torch.from_numpy(np.random.default_rng(2).normal(size=value.shape))
    sums = [v]
    for _ in range(1500):
        term = torch.autograd.grad(value, z, term, retain_graph=True)[0]
        sums.append(sums[-1] + term)
    order = 1 if proven.norm == "max" else 2
    for accuracy in (0.5, 1e-2):
        error = (sums[adjoint_terms_for(proven.gamma, accuracy)] - sums[-1]).flatten(1).norm(p=order, dim=1)
        assert (error <= accuracy * v.flatten(1).norm(p=order, dim=1) + 1e-9).all()


REFUSALS: list[tuple[Callable[[], object], str]] = [
    (
        lambda: contraction_rate(np.zeros(1), ModelSpec(input_shape=(1, 8), classes=2, cell="residual")),
        'use cell = "contractive"',
    ),
    (lambda: evaluations_for(1.0, 1e-3), "gamma < 1"),
    (lambda: evaluations_for(0.9, 0.0), "accuracy > 0"),
    (lambda: adjoint_terms_for(0.9, float("nan")), "accuracy > 0"),
    (lambda: certificate(np.zeros(1), MONOTONE, 0), "at least 1"),
]


@pytest.mark.parametrize(("ask", "message"), REFUSALS)
def test_what_cannot_be_certified_is_refused(ask: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ask()


def test_a_residual_cell_has_no_certificate() -> None:
    spec = ModelSpec(input_shape=(1, 8), classes=2, cell="residual")
    assert certificate(initial(spec, 0)[0], spec, 5) is None

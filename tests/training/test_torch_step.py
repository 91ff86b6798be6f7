"""The training step in torch: its direction, and the penalty that it alone has."""

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.model import DEQ
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.training.backend import Pull
from fedeq_edge.training.step import Budget, Vector
from fedeq_edge.training.torch_step import Descent
from tests.training.local_rounds import PLAN, RESIDUAL, SPEC, blobs, first_task, learner_on


def unrolled_gradient(model: DEQ, x: torch.Tensor, y: torch.Tensor, lagrangian_of: Pull, steps: int) -> Vector:
    """Gradient of the Lagrangian over [theta | head] by differentiating through every evaluation."""
    parameters = list(model.parameters())
    injection = model.inject(x)
    z = model.cell.start(injection)
    for _ in range(steps):
        z = model.cell.step(z, injection)
    w = torch.cat([parameter.flatten() for parameter in parameters])
    z_hat, nu = torch.from_numpy(lagrangian_of.z), torch.from_numpy(lagrangian_of.nu)
    gap = w[: len(z_hat)] - z_hat
    loss = torch.nn.functional.cross_entropy(model.head(model.features(z)), y)
    value = loss + nu @ gap + 0.5 * lagrangian_of.kappa * gap @ gap
    gradients = torch.autograd.grad(value, parameters)
    return torch.cat([gradient.flatten() for gradient in gradients]).numpy()


@pytest.mark.parametrize("shares_head", [False, True])
def test_the_direction_is_the_gradient_of_the_lagrangian(shares_head: bool) -> None:
    model, data = DEQ(SPEC), blobs(SPEC)
    model.load(*initial(SPEC, 0))
    x, y = torch.from_numpy(data.x_train), torch.from_numpy(data.y_train)
    shared = len(model.theta) + (len(model.head_vector) if shares_head else 0)
    z, nu = np.random.default_rng(0).normal(size=(2, shared)).astype(np.float32)
    pull = Pull(z=z, nu=nu, kappa=0.7)
    expected = unrolled_gradient(model, x, y, pull, steps=60)
    descent = Descent(model, replace(PLAN, clip=1e6), rate=0.0, pull=pull, frozen_head=False)
    descent.step(data.x_train, data.y_train, Budget(forward=60, adjoint=60))
    np.testing.assert_allclose(descent.direction().numpy(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("spec", [SPEC, RESIDUAL], ids=["dense", "residual"])
@pytest.mark.parametrize(("forward", "unrolled"), [(1, 1), (3, 3), (3, 8)])
def test_unrolled_as_far_as_the_budget_is_plain_autograd_the_start_included(
    spec: ModelSpec, forward: int, unrolled: int
) -> None:
    model, data = DEQ(spec), blobs(spec)
    model.load(*initial(spec, 0))
    x, y = torch.from_numpy(data.x_train), torch.from_numpy(data.y_train)
    pull = Pull(z=model.theta.numpy().copy(), nu=np.zeros_like(model.theta.numpy()), kappa=0.0)
    expected = unrolled_gradient(model, x, y, pull, steps=forward)
    found = []
    for plan in (replace(PLAN, clip=1e6, unrolled=unrolled), replace(PLAN, clip=1e6)):
        descent = Descent(model, plan, rate=0.0, pull=pull, frozen_head=False)
        descent.step(data.x_train, data.y_train, Budget(forward=forward, adjoint=0))
        found.append(descent.direction().numpy())
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-6)
    # the gradient of an equilibrium leaves out how z_0 depends on the stem: an explicit layer must not be trained so
    assert not np.allclose(found[1], expected, rtol=1e-2, atol=1e-4)


def test_clipping_bounds_the_gradient_of_the_loss_and_not_the_pull() -> None:
    model, data = DEQ(SPEC), blobs(SPEC)
    model.load(*initial(SPEC, 0))
    nu = np.full(len(model.theta), 3.0, np.float32)
    pull = Pull(z=model.theta.numpy().copy(), nu=nu, kappa=1.0)
    descent = Descent(model, replace(PLAN, clip=1e-3), rate=0.0, pull=pull, frozen_head=False)
    descent.step(data.x_train, data.y_train, Budget(forward=4, adjoint=1))
    direction = descent.direction()
    direction[: len(nu)] -= torch.from_numpy(nu)
    assert float(direction.norm()) == pytest.approx(1e-3, rel=1e-2)


def test_global_random_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    learner = learner_on("torch", plan=replace(PLAN, compare_local=True))
    result = learner.train(first_task())
    learner.personalise(first_task().z, result.head)
    assert torch.equal(before, torch.get_rng_state())


def jacobian_sizes(model: DEQ, x: torch.Tensor) -> tuple[float, float]:
    """Spectral radius and |J|_F^2 per coordinate, means over the states of x."""
    found = model.solve(x, budget=12).state
    radii, squares = [], []
    for z, u in zip(found, model.inject(x).detach(), strict=True):
        J = torch.func.jacrev(lambda z, u=u: model.cell.step(z[None], u[None])[0].flatten())(z).detach().flatten(1)
        radii.append(float(torch.linalg.eigvals(J).abs().max()))
        squares.append(float(J.square().sum()) / len(J))
    return float(np.mean(radii)), float(np.mean(squares))


def test_the_jacobian_penalty_lowers_the_spectral_radius_of_a_cell_without_certificate() -> None:
    data = blobs(RESIDUAL)
    x = torch.from_numpy(data.x_train)
    sizes = {}
    for penalty in (0.0, 3.0):
        model = DEQ(RESIDUAL)
        model.load(*initial(RESIDUAL, 0))
        plan = replace(PLAN, jacobian_penalty=penalty)
        descent = Descent(model, plan, rate=0.05, pull=None, frozen_head=False)
        for _ in range(40):
            descent.step(data.x_train, data.y_train, Budget(forward=6, adjoint=2))
        sizes[penalty] = jacobian_sizes(model, x[:3])
    assert sizes[3.0][0] < 0.95 * sizes[0.0][0]
    assert sizes[3.0][1] < 0.5 * sizes[0.0][1]


def test_a_round_with_jacobian_penalty_is_reproducible_and_its_loss_is_without() -> None:
    plan = replace(PLAN, jacobian_penalty=0.5)
    results = [learner_on("torch", RESIDUAL, plan).train(first_task(RESIDUAL, seed=seed)) for seed in (7, 7)]
    plain = learner_on("torch", RESIDUAL).train(first_task(RESIDUAL))
    assert np.array_equal(results[0].difference, results[1].difference)
    assert not np.array_equal(results[0].difference, plain.difference)
    assert results[0].loss == pytest.approx(plain.loss, rel=0.5)


def test_the_jacobian_penalty_costs_one_evaluation_beyond_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = DEQ(RESIDUAL), blobs(RESIDUAL)
    model.load(*initial(RESIDUAL, 0))
    calls = []
    step = model.cell.step

    def counted(z: torch.Tensor, injection: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return step(z, injection)

    monkeypatch.setattr(model.cell, "step", counted)
    descent = Descent(model, replace(PLAN, jacobian_penalty=0.5), rate=0.0, pull=None, frozen_head=False)
    descent.step(data.x_train, data.y_train, Budget(forward=4, adjoint=2))
    assert len(calls) == 5

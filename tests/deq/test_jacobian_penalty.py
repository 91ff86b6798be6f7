"""The Jacobian penalty against closed forms and finite differences, in float64."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fedeq_edge.deq.model import DEQ, Output
from fedeq_edge.deq.penalty import jacobian_penalty


@dataclass(frozen=True)
class Work:
    """A budget, as training gives it."""

    forward: int = 6
    adjoint: int = 2


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_diagonal_jacobian_has_the_mean_of_its_squares() -> None:
    slopes = torch.linspace(-2.0, 2.0, 7, dtype=torch.float64)
    z = torch.randn(3, 7, generator=seeded(1), dtype=torch.float64)
    found = jacobian_penalty(lambda z: slopes * z + 1.0, z, seeded())
    torch.testing.assert_close(found, slopes.square().mean())


def test_the_mean_over_probes_is_the_frobenius_norm_per_coordinate() -> None:
    W = torch.randn(5, 5, generator=seeded(1), dtype=torch.float64)
    z = torch.zeros(200, 5, dtype=torch.float64)
    found = jacobian_penalty(lambda z: z @ W, z, seeded())
    assert float(found) == pytest.approx(float(W.square().sum()) / 5, rel=0.1)


def test_its_gradient_agrees_with_finite_differences(model: DEQ, batch: Tensor) -> None:
    output = model(batch, budget=Work())

    def penalty() -> Tensor:
        return model.jacobian_penalty(replace(output, injection=model.inject(batch)), seeded())

    model.zero_grad()
    model.backward(penalty())
    direction = torch.randn(len(model.theta), generator=seeded(1), dtype=torch.float64)
    values = []
    for sign in (1.0, -1.0):
        model.theta.add_(direction, alpha=sign * 1e-6)
        values.append(float(penalty().detach()))
        model.theta.sub_(direction, alpha=sign * 1e-6)
    slope = (values[0] - values[1]) / 2e-6
    # The monotone cell's relu has J piecewise constant, where both are exact all the same.
    assert float(model.theta_grad @ direction) == pytest.approx(slope, rel=1e-5)
    assert not model.head_grad.any()


def test_it_adds_its_gradient_to_that_of_the_loss(model: DEQ, batch: Tensor) -> None:
    def gradient(loss: float, penalty: float) -> Tensor:
        output: Output = model(batch, budget=Work())
        model.zero_grad()
        model.backward(loss * output.logits.square().sum() + penalty * model.jacobian_penalty(output, seeded()))
        return model.theta_grad.clone()

    torch.testing.assert_close(gradient(1.0, 3.0), gradient(1.0, 0.0) + 3.0 * gradient(0.0, 1.0))


def test_probes_come_from_the_given_generator_alone(model: DEQ, batch: Tensor) -> None:
    output = model(batch, budget=Work())
    before = torch.get_rng_state()
    values = [float(model.jacobian_penalty(output, seeded(seed)).detach()) for seed in (0, 0, 1)]
    assert values[0] == values[1]
    assert values[0] != values[2]
    assert torch.equal(before, torch.get_rng_state())

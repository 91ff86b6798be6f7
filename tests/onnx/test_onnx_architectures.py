"""An architecture of which nothing in the package knows, as a graph that describes itself."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedeq_edge.consensus.constraint import feasible
from fedeq_edge.deq.initial import start
from fedeq_edge.deq.wellposed import proven
from fedeq_edge.onnx.trainer import TrainingGraph
from fedeq_edge.onnx.training import compile_training
from tests.system.later_gateway import CLASSES, DESCRIPTION, FEATURES, pieces, states

Vector = NDArray[np.float32]


@pytest.fixture(scope="module")
def graph() -> TrainingGraph:
    return TrainingGraph(compile_training(pieces()))


@pytest.fixture
def point() -> tuple[Vector, Vector]:
    """(theta, head), theta well inside its set."""
    theta, head = start(DESCRIPTION, 5)
    DESCRIPTION.slot("cell.mixing").view(theta)[:] *= 0.5
    return theta, head


def batch(size: int = 6) -> tuple[Vector, NDArray[np.int64]]:
    draw = np.random.default_rng(2)
    return draw.standard_normal((size, FEATURES)).astype(np.float32), draw.integers(0, CLASSES, size)


def differentiated(theta: Vector, head: Vector, evaluations: int, terms: int) -> tuple[float, Vector]:
    """Loss and its gradient by torch: u = v + J^T u, k times, through the last evaluation."""
    x, y = (torch.from_numpy(part) for part in batch())
    p = [torch.from_numpy(slot.view(theta).copy()).requires_grad_() for slot in DESCRIPTION.theta_layout]
    q = [torch.from_numpy(slot.view(head).copy()).requires_grad_() for slot in DESCRIPTION.head_layout]
    U, b, g, W = p
    before = torch.from_numpy(states(x.numpy(), theta, evaluations - 1).astype(np.float32)).requires_grad_()
    z = torch.tanh(g) * torch.tanh(torch.relu(before) @ W.T + x @ U.T + b)
    loss = torch.nn.functional.cross_entropy(z @ q[0].T + q[1], y)
    v, *heads = torch.autograd.grad(loss, [z, *q], retain_graph=True)
    u = v
    for _ in range(terms):
        (product,) = torch.autograd.grad(z, before, u, retain_graph=True)
        u = v + product
    found = [*torch.autograd.grad(z, p, u), *heads]
    return float(loss.detach()), np.concatenate([part.numpy().reshape(-1) for part in found])


@pytest.mark.parametrize(("evaluations", "terms"), [(1, 0), (4, 2)])
def test_its_step_is_that_of_its_formula(
    graph: TrainingGraph, point: tuple[Vector, Vector], evaluations: int, terms: int
) -> None:
    theta, head = point
    loss, gradient = differentiated(theta, head, evaluations, terms)
    steps = graph.descent(theta, head, rate=0.1, momentum=0.0, clip=1e9)

    found = steps.step(*batch(), forward=evaluations, adjoint=terms)

    assert found.loss == pytest.approx(loss, rel=1e-5)
    moved = np.concatenate([steps.theta - theta, steps.head - head])
    np.testing.assert_allclose(moved, -0.1 * gradient, rtol=1e-3, atol=2e-7)


def test_its_features_are_those_of_its_formula(graph: TrainingGraph, point: tuple[Vector, Vector]) -> None:
    x, _ = batch()
    features, _ = graph.solver.solve(x, point[0], forward=5)
    np.testing.assert_allclose(features, states(x, point[0], 5), atol=1e-6)


def test_it_stays_in_its_set_under_a_wild_step_size_and_keeps_what_is_proven_of_it(
    graph: TrainingGraph, point: tuple[Vector, Vector]
) -> None:
    steps = graph.descent(*point, rate=5.0, momentum=0.9, clip=10.0)
    for _ in range(5):
        steps.step(*batch(), forward=3, adjoint=1)
    rate = proven(steps.theta, graph.description)
    assert feasible(steps.theta, DESCRIPTION.constraints)
    assert rate is not None
    assert rate.gamma <= 0.8 + 1e-6
    x, _ = batch()
    errors = np.abs(states(x, steps.theta, 3) - states(x, steps.theta, 500))
    assert errors.max() <= rate.certificate(3).bound

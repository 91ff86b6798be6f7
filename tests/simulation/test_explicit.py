"""Explicit networks: sizes as published, gradients of torch, the training step and learner of equilibrium models."""

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from fedeq_edge.consensus.methods import METHODS
from fedeq_edge.deq.initial import start
from fedeq_edge.errors import ConfigError
from fedeq_edge.simulation.explicit import Explicit, ExplicitBackend, describe, multiplications
from fedeq_edge.simulation.networks import NETWORKS, ExplicitSpec, network
from fedeq_edge.training.backend import Pull
from fedeq_edge.training.learner import Learner
from fedeq_edge.training.step import Budget, Plan
from tests.training.local_rounds import CHEAP, SPEC, TickingClock, blobs, first_task

RESNET = ExplicitSpec(
    network="resnet", input_shape=(3, 8, 8), classes=4, widths=(8, 16), blocks=(1, 2), dense=(12, 8), groups=4
)
SMALL = (
    ExplicitSpec(network="mlp", input_shape=(6,), classes=3, widths=(10, 7), shift=(0.5,), scale=(2.0,)),
    ExplicitSpec(network="cnn", input_shape=(2, 13), classes=3, widths=(4, 6), dense=(5,)),
    ExplicitSpec(network="cnn", input_shape=(1, 8, 8), classes=3, widths=(4,), kernel=5),
    RESNET,
    replace(RESNET, shortcut="projected", dense=()),
)
BUDGET = Budget(forward=5, adjoint=2)


def batch(spec: ExplicitSpec, size: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(size, *spec.input_shape)).astype(np.float32)
    return x, rng.integers(0, spec.classes, size)


@pytest.mark.parametrize(
    ("name", "shape", "theta", "head"),
    [
        # algorithm.md, section 1, after FeDEQ: the shared part for CIFAR-100
        ("resnet34-cifar", (3, 32, 32), 10_876_608, 100 * 129),
        # arXiv 1602.05629: 1,663,370 with the head
        ("cnn-fedavg", (1, 28, 28), 1_663_370 - 5_130, 5_130),
    ],
)
def test_published_networks_have_the_published_numbers_of_parameters(
    name: str, shape: tuple[int, ...], theta: int, head: int
) -> None:
    model = Explicit(NETWORKS[name](shape, 100 if "cifar" in name else 10))
    assert (model.theta.numel(), model.head_vector.numel()) == (theta, head)


def test_multiplications_are_counted_at_every_position_of_a_convolution() -> None:
    one = ExplicitSpec(network="cnn", input_shape=(1, 8, 8), classes=3, widths=(4,), kernel=5, dense=(7,))
    assert multiplications(one) == 25 * 4 * 64 + 4 * 16 * 7 + 7 * 3
    halved = ExplicitSpec(network="resnet", input_shape=(8, 8, 8), classes=2, widths=(8, 16), blocks=(1, 1))
    assert multiplications(halved) == 9 * (3 * 8 * 8 * 64 + (8 * 16 + 16 * 16) * 16) + 16 * 2


def test_an_unknown_network_is_named_with_the_nearest_known_one() -> None:
    assert network("cnn-fedavg", (1, 28, 28), 10, shift=(0.1,)).shift == (0.1,)
    with pytest.raises(ConfigError, match="no network 'resnet34', nearest is 'resnet34-cifar'"):
        network("resnet34", (1, 28, 28), 10)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_answers_an_image(name: str) -> None:
    spec = NETWORKS[name]((1, 28, 28), 10)
    backend = ExplicitBackend(spec, Plan())
    backend.load(*start(describe(spec), 0))
    features, residual = backend.solve(np.ones((2, 1, 28, 28), np.float32), 4)
    assert features.shape == (2, spec.features)
    assert np.isfinite(features).all()
    assert not residual.any()


@pytest.mark.parametrize("spec", SMALL)
def test_parameters_go_round_through_the_flat_vectors(spec: ExplicitSpec) -> None:
    backend = ExplicitBackend(spec, Plan())
    theta, head = start(describe(spec), 4)
    backend.load(theta, head)
    found = backend.parameters()
    assert np.array_equal(found[0], theta)
    assert np.array_equal(found[1], head)
    again, other = start(describe(spec), 4), start(describe(spec), 5)
    assert np.array_equal(again[0], theta)
    assert not np.array_equal(other[0], theta)


@pytest.mark.parametrize("spec", SMALL)
def test_the_flat_gradient_is_that_of_autograd_through_an_ordinary_module(spec: ExplicitSpec) -> None:
    model, (x, y) = Explicit(spec), batch(spec)
    theta, head = start(describe(spec), 1)
    model.load(theta, head)
    # an ordinary module: a tensor of its own per parameter, gradients from autograd.grad
    values = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.named_parameters()}
    body = {name.removeprefix("body."): tensor for name, tensor in values.items() if name.startswith("body.")}
    features = torch.func.functional_call(model.body, body, torch.from_numpy(x))
    logits = features @ values["head.weight"].T + values["head.bias"]
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, torch.from_numpy(y)), [*values.values()])
    model.zero_grad()
    output = model(torch.from_numpy(x), budget=BUDGET)
    model.backward(torch.nn.functional.cross_entropy(output.logits, torch.from_numpy(y)))
    flat = torch.cat([gradient.flatten() for gradient in expected])
    torch.testing.assert_close(torch.cat([model.theta_grad, model.head_grad]), flat)


@pytest.mark.parametrize("spec", SMALL)
def test_steps_lower_the_loss_and_a_pull_keeps_the_network_near(spec: ExplicitSpec) -> None:
    plan = Plan(learning_rate=0.05)
    x, y = batch(spec, 12)
    begin = start(describe(spec), 2)
    gaps = []
    for kappa in (0.0, 5.0):
        backend = ExplicitBackend(spec, plan)
        backend.load(*begin)
        descent = backend.descent(rate=0.05, pull=Pull(z=begin[0], nu=np.zeros_like(begin[0]), kappa=kappa))
        losses = [descent.step(x, y, BUDGET).loss for _ in range(12)]
        gaps.append(np.linalg.norm(backend.parameters()[0] - begin[0]))
        assert losses[-1] < losses[0]
    assert gaps[1] < 0.7 * gaps[0]


def test_a_learner_trains_an_explicit_network_as_it_trains_an_equilibrium() -> None:
    spec = ExplicitSpec(network="mlp", input_shape=(6,), classes=3, widths=(16,))
    plan = Plan(rounds=5, epochs=3, batch=8, compute_s=100.0, accuracy=1e-3)
    learner = Learner(
        ExplicitBackend(spec, plan),
        blobs(SPEC),
        plan,
        METHODS["admm"],
        start=start(describe(spec), 0),
        clock=TickingClock(0.0),
        calibration=CHEAP,
    )
    theta, head = start(describe(spec), 0)
    task = replace(first_task(), z=theta, nu=np.zeros_like(theta), head=head)
    first = learner.train(task)
    second = learner.train(replace(task, z=theta + first.difference, head=first.head, round=1))
    personal = learner.personalise(theta + first.difference, first.head)
    assert second.loss < first.loss
    assert first.residual == first.backward_residual == 0.0
    assert personal.accuracy_personal > 0.6
    assert personal.certificate is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": ()}, "at least one width"),
        ({"classes": 1}, "at least 2"),
        ({"input_shape": (3, 8)}, "give images"),
        ({"blocks": (1,)}, "as many blocks as widths"),
        ({"widths": (8, 15)}, "15 is not divisible"),
        ({"network": "mlp"}, "blocks belong to a resnet"),
        ({"network": "cnn", "blocks": (), "kernel": 4}, "odd kernel"),
        ({"network": "cnn", "blocks": (), "widths": (8,) * 4}, "fewer widths"),
        ({"shift": (0.1, 0.2)}, "shift has 2 values"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(RESNET, **changes)

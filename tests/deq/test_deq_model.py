"""The whole model: flat parameters, published formula, budgets, gradients."""

import copy
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedeq_edge.consensus.constraint import feasible
from fedeq_edge.deq.acceleration import Anderson
from fedeq_edge.deq.adjoints import Adjoint, Implicit, KTerm, Unrolled
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.layout import constraints, theta_layout
from fedeq_edge.deq.method import Picard
from fedeq_edge.deq.model import DEQ
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError


@dataclass(frozen=True)
class Work:
    """A budget, as training gives it."""

    forward: int
    adjoint: int = 0


def loss_of(model: DEQ, x: Tensor, budget: Work, adjoint: Adjoint | None = None) -> Tensor:
    labels = torch.arange(len(x)) % model.spec.classes
    return functional.cross_entropy(model(x, budget=budget, adjoint=adjoint).logits, labels)


def count_steps(model: DEQ, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A list that grows by one at each cell evaluation: whether it recorded a graph."""
    recorded: list[bool] = []
    step = model.cell.step

    def counted(z: Tensor, injection: Tensor) -> Tensor:
        recorded.append(torch.is_grad_enabled())
        return step(z, injection)

    monkeypatch.setattr(model.cell, "step", counted)
    return recorded


def test_parameters_and_gradients_stay_views_of_the_flat_vectors(model: DEQ, batch: Tensor) -> None:
    theta, head = initial(model.spec, 9)
    model.load(theta, head)
    model.zero_grad()
    model.backward(loss_of(model, batch, Work(forward=4, adjoint=2)))
    named = dict(model.named_parameters())
    for slot in theta_layout(model.spec):
        gradient = named[slot.name].grad
        assert gradient is not None
        assert torch.equal(named[slot.name].flatten(), model.theta[slot.offset : slot.end])
        assert torch.equal(gradient.flatten(), model.theta_grad[slot.offset : slot.end])
    assert model.theta_grad.any()
    assert model.head_grad.any()
    model.theta.add_(1.0)
    first = theta_layout(model.spec)[0]
    np.testing.assert_allclose(named[first.name].detach().numpy(), first.view(theta) + 1.0)


def test_loading_copies_so_that_the_senders_vector_is_safe(model: DEQ) -> None:
    theta, head = initial(model.spec, 9)
    model.load(theta, head)
    model.theta.zero_()
    assert theta.any()


def test_vectors_of_another_model_are_refused(model: DEQ) -> None:
    theta, head = initial(model.spec, 0)
    with pytest.raises(ConfigError, match="theta has shape"):
        model.load(theta[:-1], head)
    with pytest.raises(ConfigError, match="made for another model"):
        model.load(theta, np.append(head, head))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parameters_that_are_not_finite_are_refused_by_name_before_anything_changes(model: DEQ, value: float) -> None:
    before = model.theta.clone()
    theta, head = initial(model.spec, 0)
    slot = next(slot for slot in theta_layout(model.spec) if slot.name.startswith("cell."))
    spoilt = theta.copy()
    spoilt[slot.end - 1] = value
    with pytest.raises(ConfigError, match=rf"theta: {slot.name} holds {value}"):
        model.load(spoilt, head)
    head[-1] = value
    with pytest.raises(ConfigError, match=rf"head: head.bias holds {value}"):
        model.load(theta, head)
    assert torch.equal(model.theta, before)


def test_building_and_loading_draw_no_global_random_numbers(spec: ModelSpec) -> None:
    state = torch.random.get_rng_state()
    DEQ(spec).load(*initial(spec, 0))
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_copy_has_its_own_flat_vectors_and_views(model: DEQ) -> None:
    twin = copy.deepcopy(model)
    twin.theta.add_(1.0)
    assert not torch.equal(twin.theta, model.theta)
    first = next(twin.parameters())
    assert torch.equal(first.flatten(), twin.theta[: first.numel()])


def test_projection_moves_theta_into_the_constraint_set_in_place(model: DEQ) -> None:
    model.theta.mul_(100.0)
    model.project()
    assert feasible(model.theta.numpy(), constraints(model.spec), tolerance=1e-12)


@pytest.mark.parametrize("forward", [1, 2, 5])
def test_training_spends_the_whole_budget_and_records_only_the_last(
    model: DEQ, batch: Tensor, forward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = count_steps(model, monkeypatch)
    output = model(batch, budget=Work(forward=forward, adjoint=1))
    assert recorded == [False] * (forward - 1) + [True]
    assert output.evaluations.tolist() == [forward] * len(batch)
    assert output.report is not None


@pytest.mark.parametrize(("adjoint", "graphed"), [(Implicit(budget=3), 1), (Unrolled(steps=3), 3), (Unrolled(), 7)])
@pytest.mark.parametrize("forward", [2, 7])
def test_every_gradient_method_spends_the_same_budget(
    model: DEQ, batch: Tensor, adjoint: Adjoint, graphed: int, forward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = count_steps(model, monkeypatch)
    output = model(batch, budget=Work(forward=forward), adjoint=adjoint)
    graphed = min(graphed, forward)
    assert recorded == [False] * (forward - graphed) + [True] * graphed
    plain = model(batch, budget=Work(forward=forward))
    torch.testing.assert_close(output.logits, plain.logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.residual, plain.residual, rtol=1e-9, atol=1e-12)


def test_unrolling_the_whole_budget_is_autograd_through_hand_written_steps_bit_for_bit(
    model: DEQ, batch: Tensor
) -> None:
    model.zero_grad()
    model.backward(loss_of(model, batch, Work(forward=6), Unrolled()))
    found = torch.cat([model.theta_grad, model.head_grad])
    injection = model.inject(batch)
    z = model.cell.start(injection)
    for _ in range(6):
        z = model.cell.step(z, injection)
    labels = torch.arange(len(batch)) % model.spec.classes
    loss = functional.cross_entropy(model.head(model.features(z)), labels)
    expected = torch.autograd.grad(loss, [*model.parameters()])
    assert torch.equal(found, torch.cat([gradient.flatten() for gradient in expected]))


def test_a_warm_start_goes_on_where_an_earlier_pass_ended(model: DEQ, batch: Tensor) -> None:
    with torch.no_grad():
        first = model(batch, budget=Work(forward=4))
        resumed = model(batch, budget=Work(forward=3), start=first.state)
        whole = model(batch, budget=Work(forward=7))
    torch.testing.assert_close(resumed.logits, whole.logits, rtol=1e-12, atol=1e-12)
    trained = model(batch, budget=Work(forward=3), start=first.state)
    torch.testing.assert_close(trained.logits, whole.logits, rtol=1e-12, atol=1e-12)
    assert not trained.state.requires_grad


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=["picard", "anderson"])
@pytest.mark.parametrize("budget", [1, 2, 7])
def test_inference_keeps_its_budget(
    model: DEQ, batch: Tensor, solver: Picard | Anderson, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = count_steps(model, monkeypatch)
    with torch.no_grad():
        output = model(batch, budget=Work(forward=budget), solver=solver)
    assert recorded == [False] * budget
    assert output.report is None


def test_training_and_inference_compute_the_same_function(model: DEQ, batch: Tensor) -> None:
    trained = model(batch, budget=Work(forward=6))
    with torch.no_grad():
        answered = model(batch, budget=Work(forward=6))
    torch.testing.assert_close(trained.logits.detach(), answered.logits, rtol=0, atol=0)
    torch.testing.assert_close(trained.residual, answered.residual, rtol=0, atol=0)
    assert trained.features.shape == (len(batch), model.spec.features)


def test_a_sample_gets_the_same_answer_alone_and_in_a_batch(model: DEQ, batch: Tensor) -> None:
    with torch.no_grad():
        together = model(batch, budget=Work(forward=40), tol=1e-5)
        for i in range(len(batch)):
            alone = model(batch[i : i + 1], budget=Work(forward=40), tol=1e-5)
            assert alone.evaluations[0] == together.evaluations[i]
            torch.testing.assert_close(alone.logits[0], together.logits[i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "adjoint", [KTerm(terms=150), Implicit(budget=150, tol=1e-11), Unrolled()], ids=["k terms", "implicit", "unrolled"]
)
def test_gradients_of_theta_and_head_agree_with_finite_differences(model: DEQ, batch: Tensor, adjoint: Adjoint) -> None:
    budget = Work(forward=200)
    model.zero_grad()
    model.backward(loss_of(model, batch, budget, adjoint))
    for flat, gradient in ((model.theta, model.theta_grad), (model.head_vector, model.head_grad)):
        direction = torch.randn(len(flat), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        expected = _slope(model, flat, direction, batch, budget)
        assert float(gradient @ direction) == pytest.approx(expected, rel=1e-6)


def _slope(model: DEQ, flat: Tensor, direction: Tensor, x: Tensor, budget: Work) -> float:
    """Central difference of the loss along the direction."""
    losses = []
    for sign in (1.0, -1.0):
        flat.add_(direction, alpha=sign * 1e-6)
        with torch.no_grad():
            losses.append(float(loss_of(model, x, budget)))
        flat.sub_(direction, alpha=sign * 1e-6)
    return (losses[0] - losses[1]) / 2e-6


def test_another_gradient_method_may_be_named() -> None:
    spec = ModelSpec(input_shape=(3,), classes=2, channels=4)
    model = DEQ(spec)
    model.load(*initial(spec, 1))
    output = model(torch.ones(2, 3), budget=Work(forward=30), adjoint=Implicit(budget=50, tol=1e-5))
    model.backward(output.logits.sum())
    assert output.report is not None
    assert 0 < output.report.terms < 50
    assert output.report.residual <= 1e-5


def test_gradients_add_up_until_they_are_zeroed(model: DEQ, batch: Tensor) -> None:
    for _ in range(2):
        model.backward(loss_of(model, batch, Work(forward=2, adjoint=1)))
    twice = model.theta_grad.clone()
    model.zero_grad()
    assert not model.theta_grad.any()
    model.backward(loss_of(model, batch, Work(forward=2, adjoint=1)))
    torch.testing.assert_close(twice, 2.0 * model.theta_grad)


def test_a_nan_sample_does_not_disturb_its_batch_mates(model: DEQ, batch: Tensor) -> None:
    spoilt = batch.clone()
    spoilt[1] = torch.nan
    with torch.no_grad():
        clean = model(batch, budget=Work(forward=12), tol=1e-4)
        found = model(spoilt, budget=Work(forward=12), tol=1e-4)
    mates = [0, 2, 3, 4]
    torch.testing.assert_close(found.logits[mates], clean.logits[mates], rtol=1e-9, atol=1e-9)
    assert found.evaluations[mates].tolist() == clean.evaluations[mates].tolist()


def test_a_zero_input_is_solved(model: DEQ, batch: Tensor) -> None:
    with torch.no_grad():
        output = model(torch.zeros_like(batch), budget=Work(forward=10), tol=1e-4)
    assert torch.isfinite(output.logits).all()


def test_the_contractive_image_cell_is_its_formula() -> None:
    spec = ModelSpec(input_shape=(1, 6, 6), classes=2, channels=3, shift=(0.5,), scale=(0.2,))
    model = DEQ(spec, dtype=torch.float64)
    model.load(*initial(spec, 4))
    x = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, b, W = (parameter.detach() for parameter in (*model.stem.parameters(), *model.cell.parameters()))
    u = functional.conv2d((x - 0.5) / 0.2, U, b, padding=1)
    z = torch.tanh(u)
    for _ in range(3):
        z = torch.tanh(functional.conv2d(z, W, padding=1) + u)
    torch.testing.assert_close(model.solve(x, budget=3).value, z)


def group_norm(states: Tensor, groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """GroupNorm by its definition: biased variance over a group's channels and places, eps 1e-5."""
    grouped = states.reshape(len(states), groups, -1)
    mean = grouped.mean(dim=2, keepdim=True)
    variance = ((grouped - mean) ** 2).mean(dim=2, keepdim=True)
    normed = ((grouped - mean) / torch.sqrt(variance + 1e-5)).reshape(states.shape)
    return normed * weight[:, None, None] + bias[:, None, None]


def test_a_damped_cell_goes_its_share_of_the_way_of_the_published_block() -> None:
    spec = ModelSpec(input_shape=(2, 16), classes=3, cell="residual", channels=8, groups=4)
    block, damped = (DEQ(msgspec.structs.replace(spec, damping=share), dtype=torch.float64) for share in (1.0, 0.25))
    theta, head = initial(spec, 0)
    for model in (block, damped):
        model.load(theta, head)
    generator = torch.Generator().manual_seed(0)
    z, x = torch.randn(2, 3, 8, 16, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(damped.cell.step(z, x) - z, 0.25 * (block.cell.step(z, x) - z))


def test_the_residual_cell_is_the_published_block() -> None:
    spec = ModelSpec(
        input_shape=(1, 5, 5),
        classes=2,
        cell="residual",
        activation="softplus",
        channels=8,
        inner_channels=12,
        groups=4,
    )
    model = DEQ(spec, dtype=torch.float64)
    generator = np.random.default_rng(0)
    model.load(generator.normal(size=model.theta.shape), generator.normal(size=model.head_vector.shape))
    p = {name: parameter.detach() for name, parameter in model.cell.named_parameters()}
    x = torch.from_numpy(generator.normal(size=(2, 8, 5, 5)))
    z = torch.from_numpy(generator.normal(size=(2, 8, 5, 5)))

    def softplus(t: Tensor) -> Tensor:
        return torch.log1p(torch.exp(t))

    inner = softplus(functional.conv2d(z, p["conv1.weight"], padding=1))
    inner = group_norm(inner, 6, p["norm1.weight"], p["norm1.bias"])
    update = x + functional.conv2d(inner, p["conv2.weight"], padding=1)
    update = group_norm(update, 4, p["norm2.weight"], p["norm2.bias"])
    expected = group_norm(softplus(z + update), 4, p["norm3.weight"], p["norm3.bias"])
    with torch.no_grad():
        torch.testing.assert_close(model.cell.step(z, x), expected, rtol=1e-8, atol=1e-8)
        assert torch.equal(model.cell.start(x), x)


def test_features_average_overlapping_windows_on_odd_states() -> None:
    spec = ModelSpec(input_shape=(1, 7), classes=2, channels=1, pool=2)
    model = DEQ(spec)
    z = torch.arange(7.0).reshape(1, 1, 7)
    assert model.features(z).tolist() == [[1.5, 4.5]]

from dataclasses import replace as replaced

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.consensus.constraint import feasible
from fedeq_edge.consensus.fixed import dual_step, dual_value
from fedeq_edge.consensus.methods import METHODS, Method
from fedeq_edge.data.npz import ClientData
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.layout import constraints
from fedeq_edge.deq.model import DEQ
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError, SolverError
from fedeq_edge.training.refit import cross_entropy
from fedeq_edge.training.step import Budget, Calibration, LocalTask, Plan, Vector
from fedeq_edge.training.torch_step import Descent, Pull, TorchLearner

SPEC = ModelSpec(input_shape=(6,), classes=3, channels=8)
RESIDUAL = ModelSpec(input_shape=(1, 6, 6), classes=3, cell="residual", channels=8, groups=4, pool=2)
PLAN = Plan(rounds=5, epochs=2, batch=8, learning_rate=0.1, budgets=(2, 4, 8), compute_s=100.0, refit_steps=40)
ADMM = METHODS["admm"]
SHARED = replace(ADMM, heads="consensus_refit")
CHEAP = Calibration(batch=8, fixed_s=1e-3, evaluation_s=1e-4, adjoint_s=1e-4)


class TickingClock:
    """Every reading is `tick_s` later than the one before."""

    def __init__(self, tick_s: float) -> None:
        self.tick_s = tick_s
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += self.tick_s
        return self.now_s


def blobs(spec: ModelSpec, *, classes: tuple[int, ...] = (0, 1, 2), seed: int = 0, tests: int = 30) -> ClientData:
    """30 training samples around one centre per class; the centres are the same for every seed."""
    centres = np.random.default_rng(99).normal(size=(3, *spec.input_shape))
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.resize(classes, 30 + tests)).astype(np.int64)
    x = (centres[labels] + 0.5 * generator.normal(size=(30 + tests, *spec.input_shape))).astype(np.float32)
    return ClientData(x_train=x[:30], y_train=labels[:30], x_test=x[30:], y_test=labels[30:])


def learner_of(
    spec: ModelSpec = SPEC,
    plan: Plan = PLAN,
    data: ClientData | None = None,
    tick_s: float = 0.0,
    method: Method = ADMM,
) -> TorchLearner:
    data = blobs(spec) if data is None else data
    return TorchLearner(spec, data, plan, method, start=initial(spec, 0), clock=TickingClock(tick_s), calibration=CHEAP)


def first_task(spec: ModelSpec = SPEC, method: Method = ADMM, **changes: object) -> LocalTask:
    theta, head = initial(spec, 0)
    z = np.concatenate([theta, head]) if method.heads == "consensus_refit" else theta
    task = LocalTask(round=0, z=z, nu=np.zeros_like(z), kappa=0.1, head=head, seed=7)
    return replace(task, **changes)


def unrolled_gradient(model: DEQ, x: torch.Tensor, y: torch.Tensor, lagrangian_of: Pull, steps: int) -> Vector:
    """Gradient of the Lagrangian over [theta | head] by differentiating through every evaluation."""
    parameters = list(model.parameters())
    injection = model.inject(x)
    z = model.cell.start(injection)
    for _ in range(steps):
        z = model.cell.step(z, injection)
    w = torch.cat([parameter.flatten() for parameter in parameters])
    gap = w[: len(lagrangian_of.z)] - lagrangian_of.z
    loss = torch.nn.functional.cross_entropy(model.head(model.features(z)), y)
    value = loss + lagrangian_of.nu @ gap + 0.5 * lagrangian_of.kappa * gap @ gap
    gradients = torch.autograd.grad(value, parameters)
    return torch.cat([gradient.flatten() for gradient in gradients]).numpy()


@pytest.mark.parametrize("shares_head", [False, True])
def test_the_direction_is_the_gradient_of_the_lagrangian(shares_head: bool) -> None:
    model, data = DEQ(SPEC), blobs(SPEC)
    model.load(*initial(SPEC, 0))
    x, y = torch.from_numpy(data.x_train), torch.from_numpy(data.y_train)
    shared = len(model.theta) + (len(model.head_vector) if shares_head else 0)
    generator = torch.Generator().manual_seed(0)
    pull = Pull(z=torch.randn(shared, generator=generator), nu=torch.randn(shared, generator=generator), kappa=0.7)
    expected = unrolled_gradient(model, x, y, pull, steps=60)
    descent = Descent(model, replace(PLAN, clip=1e6), rate=0.0, pull=pull, frozen_head=False)
    descent.step(x, y, Budget(forward=60, adjoint=60))
    np.testing.assert_allclose(descent.direction().numpy(), expected, rtol=1e-3, atol=1e-5)


def test_clipping_bounds_the_gradient_of_the_loss_and_not_the_pull() -> None:
    model, data = DEQ(SPEC), blobs(SPEC)
    model.load(*initial(SPEC, 0))
    nu = torch.full((len(model.theta),), 3.0)
    pull = Pull(z=model.theta.clone(), nu=nu, kappa=1.0)
    descent = Descent(model, replace(PLAN, clip=1e-3), rate=0.0, pull=pull, frozen_head=False)
    descent.step(torch.from_numpy(data.x_train), torch.from_numpy(data.y_train), Budget(forward=4, adjoint=1))
    direction = descent.direction()
    direction[: len(nu)] -= nu
    assert float(direction.norm()) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("spec", [SPEC, RESIDUAL])
def test_a_round_lowers_the_training_loss(spec: ModelSpec) -> None:
    learner = learner_of(spec)
    first = learner.train(first_task(spec))
    task = first_task(spec, round=1, head=first.head)
    second = learner.train(replace(task, z=task.z + first.difference))
    assert second.loss < 0.8 * first.loss
    assert second.accuracy_consensus > first.accuracy_consensus


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    results = [learner_of().train(first_task(seed=seed)) for seed in (7, 7, 8)]
    assert np.array_equal(results[0].difference, results[1].difference)
    assert results[0].loss == results[1].loss
    assert not np.array_equal(results[0].difference, results[2].difference)


def test_global_random_generators_are_left_alone() -> None:
    before = torch.get_rng_state()
    learner = learner_of(plan=replace(PLAN, compare_local=True))
    result = learner.train(first_task())
    learner.personalise(first_task().z, result.head)
    assert torch.equal(before, torch.get_rng_state())


def test_a_round_does_not_depend_on_the_rounds_before_it() -> None:
    used = learner_of()
    used.train(first_task(seed=1))
    assert np.array_equal(used.train(first_task()).difference, learner_of().train(first_task()).difference)


def test_personal_heads_stay_out_of_the_difference() -> None:
    theta, head = initial(SPEC, 0)
    result = learner_of().train(first_task())
    assert result.difference.shape == theta.shape
    assert result.head.shape == head.shape
    assert not np.array_equal(result.head, head)


def test_shared_heads_follow_theta_in_the_difference() -> None:
    theta, head = initial(SPEC, 0)
    ignored = np.full_like(head, 5.0)
    result = learner_of(method=SHARED).train(first_task(method=SHARED, head=ignored))
    assert result.difference.shape == (theta.size + head.size,)
    assert result.difference.dtype == np.float32
    np.testing.assert_array_equal(result.difference[theta.size :], result.head - head)


def test_a_stiff_penalty_keeps_theta_at_the_consensus() -> None:
    loose = learner_of().train(first_task())
    stiff = learner_of().train(first_task(kappa=5.0))
    assert np.linalg.norm(stiff.difference) < 0.5 * np.linalg.norm(loose.difference)


def test_duals_and_penalty_are_ignored_where_the_plan_leaves_them_out() -> None:
    fedper = METHODS["fedper"]
    pulled = first_task(kappa=9.0)
    with_dual = replace(pulled, nu=np.ones_like(pulled.z))
    plain = learner_of(method=fedper).train(first_task())
    assert np.array_equal(learner_of(method=fedper).train(with_dual).difference, plain.difference)


def test_theta_stays_well_posed_under_a_wild_step_size() -> None:
    task = first_task()
    result = learner_of(plan=replace(PLAN, learning_rate=5.0)).train(task)
    assert feasible(task.z + result.difference, constraints(SPEC))


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
    x, y = torch.from_numpy(data.x_train), torch.from_numpy(data.y_train)
    sizes = {}
    for penalty in (0.0, 3.0):
        model = DEQ(RESIDUAL)
        model.load(*initial(RESIDUAL, 0))
        plan = replace(PLAN, jacobian_penalty=penalty)
        descent = Descent(model, plan, rate=0.05, pull=None, frozen_head=False)
        for _ in range(40):
            descent.step(x, y, Budget(forward=6, adjoint=2))
        sizes[penalty] = jacobian_sizes(model, x[:3])
    assert sizes[3.0][0] < 0.95 * sizes[0.0][0]
    assert sizes[3.0][1] < 0.5 * sizes[0.0][1]


def test_a_round_with_jacobian_penalty_is_reproducible_and_its_loss_is_without() -> None:
    plan = replace(PLAN, jacobian_penalty=0.5)
    results = [learner_of(RESIDUAL, plan=plan).train(first_task(RESIDUAL, seed=seed)) for seed in (7, 7)]
    plain = learner_of(RESIDUAL).train(first_task(RESIDUAL))
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
    descent.step(torch.from_numpy(data.x_train), torch.from_numpy(data.y_train), Budget(forward=4, adjoint=2))
    assert len(calls) == 5


def test_a_refitted_head_stays_as_fitted_while_theta_moves() -> None:
    alternating = replace(ADMM, head_step="refit")
    once = learner_of(method=alternating).train(first_task())
    wild = learner_of(method=alternating, plan=replace(PLAN, learning_rate=0.5)).train(first_task())
    assert np.array_equal(once.head, wild.head)
    assert not np.array_equal(once.difference, wild.difference)


def test_a_clock_that_runs_fast_lowers_the_budget_and_the_round_still_ends_in_time() -> None:
    plan = replace(PLAN, epochs=8, compute_s=1.0)
    unhurried = learner_of(plan=plan).train(first_task())
    hurried = learner_of(plan=plan, tick_s=0.02).train(first_task())
    assert not unhurried.reduced
    assert unhurried.steps == 32
    assert hurried.reduced
    assert 1 <= hurried.steps < 32
    assert hurried.seconds <= plan.compute_s


def test_a_slow_round_makes_the_next_one_plan_less() -> None:
    learner = learner_of(plan=replace(PLAN, compute_s=0.02), tick_s=2e-3)
    learner.train(first_task())
    assert learner.drift > 1.2
    assert learner.train(first_task()).budget.forward < 8


def test_a_device_that_allows_itself_less_draws_smaller_budgets() -> None:
    plan = replace(PLAN, compute_s=0.0155)
    start = initial(SPEC, 0)
    full, eased = (
        TorchLearner(
            SPEC, blobs(SPEC), plan, ADMM, start=start, clock=TickingClock(0.0), calibration=CHEAP, speed=speed
        )
        for speed in (lambda: 1.0, lambda: 0.8)
    )
    assert eased.train(first_task()).budget.forward < full.train(first_task()).budget.forward


def test_calibration_measures_and_leaves_the_start_as_it_was() -> None:
    learner = TorchLearner(SPEC, blobs(SPEC), PLAN, ADMM, start=initial(SPEC, 0), clock=TickingClock(1e-3))
    calibration = learner.calibrate()
    assert calibration.batch == PLAN.batch
    assert calibration.fixed_s + calibration.evaluation_s > 0.0
    assert np.array_equal(learner.train(first_task()).difference, learner_of().train(first_task()).difference)


def test_a_personal_model_fits_the_training_data_better_than_the_consensus() -> None:
    learner, data = learner_of(), blobs(SPEC)
    theta, head = initial(SPEC, 0)
    personal = learner.personalise(theta, head)
    model = DEQ(SPEC)
    model.load(personal.theta, personal.head)
    found = model.solve(torch.from_numpy(data.x_train), budget=personal.budget.forward)
    features = model.features(found.value).numpy()
    assert np.array_equal(personal.theta, theta)
    assert np.isfinite(personal.head).all()
    assert cross_entropy(features, data.y_train, personal.head) < 0.8 * cross_entropy(features, data.y_train, head)
    assert personal.budget.forward in PLAN.budgets
    assert personal.accuracy_personal > personal.accuracy_consensus
    assert personal.local_only is None


def test_training_alone_is_measured_when_the_plan_asks() -> None:
    learner = learner_of(plan=replace(PLAN, compare_local=True))
    theta, head = initial(SPEC, 0)
    personal = learner.personalise(theta, head)
    assert personal.local_only is not None
    assert personal.local_only > 0.8
    assert np.array_equal(personal.theta, theta)


def test_ditto_leaves_z_by_less_the_larger_its_lambda() -> None:
    theta, head = initial(SPEC, 0)
    gaps = [
        float(np.linalg.norm(learner_of(method=replace(ADMM, ditto=pull)).personalise(theta, head).theta - theta))
        for pull in (0.01, 5.0)
    ]
    assert gaps[0] > 2.0 * gaps[1] > 0.0


def test_a_device_without_a_test_part_has_no_accuracy() -> None:
    learner = learner_of(data=blobs(SPEC, tests=0))
    theta, head = initial(SPEC, 0)
    assert np.isnan(learner.train(first_task()).accuracy_consensus)
    assert np.isnan(learner.personalise(theta, head).accuracy_personal)


def test_a_loss_that_is_not_finite_ends_the_round_with_the_remedy() -> None:
    data = blobs(SPEC)
    broken = replaced(data, x_train=np.full_like(data.x_train, np.nan))
    with pytest.raises(SolverError, match=r"loss is nan.*lower learning_rate"):
        learner_of(data=broken).train(first_task())


def test_samples_of_another_shape_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape \(6,\).*\(1, 6, 6\)"):
        learner_of(RESIDUAL, data=blobs(SPEC))


def test_labels_beyond_the_model_are_refused() -> None:
    data = blobs(SPEC)
    with pytest.raises(ConfigError, match="label 7"):
        learner_of(data=replaced(data, y_train=np.full_like(data.y_train, 7)))


def test_a_device_without_training_samples_is_refused() -> None:
    data = blobs(SPEC)
    with pytest.raises(ConfigError, match="no training samples"):
        learner_of(data=replaced(data, x_train=data.x_train[:0], y_train=data.y_train[:0]))


def test_vectors_of_another_model_are_refused() -> None:
    task = first_task()
    with pytest.raises(ConfigError, match="shape"):
        learner_of().train(replace(task, z=task.z[:-1], nu=task.nu[:-1]))
    with pytest.raises(ConfigError, match="one consensus"):
        learner_of().train(replace(task, nu=task.nu[:-1]))


def test_two_devices_that_lack_a_class_each_learn_it_from_the_other() -> None:
    plan = replace(PLAN, rounds=6)
    learners = {
        str(classes): learner_of(plan=plan, method=SHARED, data=blobs(SPEC, classes=classes))
        for classes in ((0, 1), (1, 2))
    }
    consensus = Consensus(first_task(method=SHARED).z, method=SHARED, constraints=constraints(SPEC))
    duals = {name: np.zeros(consensus.z_hat.size, np.int64) for name in learners}
    for name, learner in learners.items():
        consensus.join(name, learner.samples)
    for completed in range(plan.rounds):
        z = consensus.z_hat
        for name, learner in learners.items():
            kappa = consensus.penalty(name)
            nu = dual_value(duals[name], np.float32)
            result = learner.train(first_task(method=SHARED, round=completed, z=z, nu=nu, kappa=kappa))
            duals[name] += dual_step(result.difference, kappa, 32)
            consensus.accept(name, result.difference, kappa)
        consensus.close_round()
    every = blobs(SPEC, seed=5)
    judge = learner_of(plan=plan, method=SHARED, data=every)
    final = judge.train(first_task(method=SHARED, z=consensus.z_hat)).accuracy_consensus
    assert final > 0.85

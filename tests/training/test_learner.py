"""A device's rounds, alike on every backend: what is learnt, what is refused, and how time bounds the work."""

from collections.abc import Callable
from dataclasses import replace as replaced
from functools import partial

import numpy as np
import pytest
from msgspec.structs import replace

from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.consensus.constraint import feasible
from fedeq_edge.consensus.fixed import dual_step, dual_value
from fedeq_edge.consensus.methods import METHODS
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.layout import constraints
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError, SolverError
from fedeq_edge.training.learner import Learner
from fedeq_edge.training.refit import cross_entropy
from tests.training.local_rounds import (
    ADMM,
    PLAN,
    RESIDUAL,
    SHARED,
    SPEC,
    backend_of,
    blobs,
    first_task,
    learner_on,
)

MakeLearner = Callable[..., Learner]


@pytest.fixture(params=["torch", "onnx"])
def learner_of(request: pytest.FixtureRequest) -> MakeLearner:
    """Makes learners on one of the backends."""
    return partial(learner_on, request.param)


@pytest.mark.parametrize("spec", [SPEC, RESIDUAL])
def test_a_round_lowers_the_training_loss(learner_of: MakeLearner, spec: ModelSpec) -> None:
    learner = learner_of(spec)
    first = learner.train(first_task(spec))
    task = first_task(spec, round=1, head=first.head)
    second = learner.train(replace(task, z=task.z + first.difference))
    assert second.loss < 0.8 * first.loss
    assert second.accuracy_consensus > first.accuracy_consensus


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(learner_of: MakeLearner) -> None:
    results = [learner_of().train(first_task(seed=seed)) for seed in (7, 7, 8)]
    assert np.array_equal(results[0].difference, results[1].difference)
    assert results[0].loss == results[1].loss
    assert not np.array_equal(results[0].difference, results[2].difference)


def test_a_round_does_not_depend_on_the_rounds_before_it(learner_of: MakeLearner) -> None:
    used = learner_of()
    used.train(first_task(seed=1))
    assert np.array_equal(used.train(first_task()).difference, learner_of().train(first_task()).difference)


def test_personal_heads_stay_out_of_the_difference(learner_of: MakeLearner) -> None:
    theta, head = initial(SPEC, 0)
    result = learner_of().train(first_task())
    assert result.difference.shape == theta.shape
    assert result.head.shape == head.shape
    assert not np.array_equal(result.head, head)


def test_shared_heads_follow_theta_in_the_difference(learner_of: MakeLearner) -> None:
    theta, head = initial(SPEC, 0)
    ignored = np.full_like(head, 5.0)
    result = learner_of(method=SHARED).train(first_task(method=SHARED, head=ignored))
    assert result.difference.shape == (theta.size + head.size,)
    assert result.difference.dtype == np.float32
    np.testing.assert_array_equal(result.difference[theta.size :], result.head - head)


def test_a_stiff_penalty_keeps_theta_at_the_consensus(learner_of: MakeLearner) -> None:
    loose = learner_of().train(first_task())
    stiff = learner_of().train(first_task(kappa=5.0))
    assert np.linalg.norm(stiff.difference) < 0.5 * np.linalg.norm(loose.difference)


def test_duals_and_penalty_are_ignored_where_the_plan_leaves_them_out(learner_of: MakeLearner) -> None:
    fedper = METHODS["fedper"]
    pulled = first_task(kappa=9.0)
    with_dual = replace(pulled, nu=np.ones_like(pulled.z))
    plain = learner_of(method=fedper).train(first_task())
    assert np.array_equal(learner_of(method=fedper).train(with_dual).difference, plain.difference)


def test_theta_stays_well_posed_under_a_wild_step_size(learner_of: MakeLearner) -> None:
    task = first_task()
    result = learner_of(plan=replace(PLAN, learning_rate=5.0)).train(task)
    assert feasible(task.z + result.difference, constraints(SPEC))


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedper", "ditto", "quality-average", "admm"])
def test_a_head_trained_together_with_the_body_moves_by_gradient_steps_alone(
    learner_of: MakeLearner, name: str
) -> None:
    method = METHODS[name]
    _, head = initial(SPEC, 0)
    plan = replace(PLAN, learning_rate=1e-6)
    result = learner_of(method=method, plan=plan).train(first_task(method=method, head=head))
    longest = plan.learning_rate * plan.clip * result.steps / (1 - plan.momentum)
    assert 0.0 < np.linalg.norm(result.head - head) <= longest + 1e-6


def test_a_refitted_head_stays_as_fitted_while_theta_moves(learner_of: MakeLearner) -> None:
    alternating = replace(ADMM, head_step="refit")
    once = learner_of(method=alternating).train(first_task())
    wild = learner_of(method=alternating, plan=replace(PLAN, learning_rate=0.5)).train(first_task())
    assert np.array_equal(once.head, wild.head)
    assert not np.array_equal(once.difference, wild.difference)


def test_a_clock_that_runs_fast_lowers_the_budget_and_the_round_still_ends_in_time(learner_of: MakeLearner) -> None:
    plan = replace(PLAN, epochs=8, compute_s=1.0)
    unhurried = learner_of(plan=plan).train(first_task())
    hurried = learner_of(plan=plan, tick_s=0.02).train(first_task())
    assert not unhurried.reduced
    assert unhurried.steps == 32
    assert hurried.reduced
    assert 1 <= hurried.steps < 32
    assert hurried.seconds <= plan.compute_s


def test_a_slow_round_makes_the_next_one_plan_less(learner_of: MakeLearner) -> None:
    learner = learner_of(plan=replace(PLAN, compute_s=0.02), tick_s=2e-3)
    learner.train(first_task())
    assert learner.drift > 1.2
    assert learner.train(first_task()).budget.forward < 8


def test_a_device_that_allows_itself_less_draws_smaller_budgets(learner_of: MakeLearner) -> None:
    plan = replace(PLAN, compute_s=0.0155)
    full, eased = (learner_of(plan=plan, speed=speed) for speed in (lambda: 1.0, lambda: 0.8))
    assert eased.train(first_task()).budget.forward < full.train(first_task()).budget.forward


def test_calibration_measures_and_leaves_the_start_as_it_was(learner_of: MakeLearner) -> None:
    learner = learner_of(calibration=None, tick_s=1e-3)
    calibration = learner.calibrate()
    assert calibration.batch == PLAN.batch
    assert calibration.fixed_s + calibration.evaluation_s > 0.0
    assert np.array_equal(learner.train(first_task()).difference, learner_of().train(first_task()).difference)


def test_a_personal_model_fits_the_training_data_better_than_the_consensus(learner_of: MakeLearner) -> None:
    learner, data = learner_of(), blobs(SPEC)
    theta, head = initial(SPEC, 0)
    personal = learner.personalise(theta, head)
    model = backend_of("torch")
    model.load(personal.theta, personal.head)
    features, _ = model.solve(data.x_train, personal.budget.forward)
    assert np.array_equal(personal.theta, theta)
    assert np.isfinite(personal.head).all()
    assert cross_entropy(features, data.y_train, personal.head) < 0.8 * cross_entropy(features, data.y_train, head)
    assert personal.budget.forward in PLAN.budgets
    assert personal.accuracy_personal > personal.accuracy_consensus
    assert personal.local_only is None


def test_training_alone_is_measured_when_the_plan_asks(learner_of: MakeLearner) -> None:
    learner = learner_of(plan=replace(PLAN, compare_local=True))
    theta, head = initial(SPEC, 0)
    personal = learner.personalise(theta, head)
    assert personal.local_only is not None
    assert personal.local_only > 0.8
    assert np.array_equal(personal.theta, theta)


def test_a_model_alone_makes_the_steps_of_its_own_rounds_and_their_course(learner_of: MakeLearner) -> None:
    alone = METHODS["local"]
    theta, head = initial(SPEC, 0)
    own, whole, other = (
        learner_of(method=alone, plan=plan).personalise(theta, head).theta
        for plan in (replace(PLAN, rounds=6, alone_rounds=2), replace(PLAN, rounds=2), replace(PLAN, rounds=6))
    )
    assert np.array_equal(own, whole)
    assert not np.array_equal(own, other)


def test_ditto_leaves_z_by_less_the_larger_its_lambda(learner_of: MakeLearner) -> None:
    theta, head = initial(SPEC, 0)
    gaps = [
        float(np.linalg.norm(learner_of(method=replace(ADMM, ditto=pull)).personalise(theta, head).theta - theta))
        for pull in (0.01, 5.0)
    ]
    assert gaps[0] > 2.0 * gaps[1] > 0.0


def test_fine_tuning_lowers_the_local_loss_with_body_and_head_and_follows_its_epochs(learner_of: MakeLearner) -> None:
    data, theta, head = blobs(SPEC), *initial(SPEC, 0)
    z = np.concatenate([theta, head])
    losses = []
    for epochs in (1, 8):
        method = replace(METHODS["fedavg-finetune"], finetune_epochs=epochs, finetune_rate=0.05)
        personal = learner_of(method=method).personalise(z, np.zeros(0, np.float32))
        model = backend_of("torch")
        model.load(personal.theta, personal.head)
        features, _ = model.solve(data.x_train, personal.budget.forward)
        losses.append(cross_entropy(features, data.y_train, personal.head))
        assert not np.array_equal(personal.theta, theta)
    model.load(theta, head)
    assert losses[1] < losses[0] < cross_entropy(model.solve(data.x_train, 4)[0], data.y_train, head)


def test_fine_tuning_steps_by_the_rate_at_which_the_plan_ends_if_none_is_given(learner_of: MakeLearner) -> None:
    z = np.concatenate(initial(SPEC, 0))
    last = PLAN.learning_rate * PLAN.final_rate
    tuned = [
        learner_of(method=replace(METHODS["fedavg-finetune"], finetune_rate=rate)).personalise(z, z[:0]).theta
        for rate in (None, last, 2.0 * last)
    ]
    np.testing.assert_allclose(tuned[0], tuned[1], rtol=1e-6)
    assert not np.allclose(tuned[0], tuned[2], rtol=1e-6)


def test_a_device_without_a_test_part_has_no_accuracy(learner_of: MakeLearner) -> None:
    learner = learner_of(data=blobs(SPEC, tests=0))
    theta, head = initial(SPEC, 0)
    assert np.isnan(learner.train(first_task()).accuracy_consensus)
    assert np.isnan(learner.personalise(theta, head).accuracy_personal)


def test_a_loss_that_is_not_finite_ends_the_round_with_the_remedy(learner_of: MakeLearner) -> None:
    data = blobs(SPEC)
    broken = replaced(data, x_train=np.full_like(data.x_train, np.nan))
    with pytest.raises(SolverError, match=r"loss is nan.*lower learning_rate"):
        learner_of(data=broken).train(first_task())


def test_samples_of_another_shape_are_refused(learner_of: MakeLearner) -> None:
    with pytest.raises(ConfigError, match=r"shape \(6,\).*\(1, 6, 6\)"):
        learner_of(RESIDUAL, data=blobs(SPEC))


def test_labels_beyond_the_model_are_refused(learner_of: MakeLearner) -> None:
    data = blobs(SPEC)
    for label in (-1, 3):
        with pytest.raises(ConfigError, match=f"label {label} is outside the model's 3 classes, 0 to 2"):
            learner_of(data=replaced(data, y_train=np.append(data.y_train[1:], label)))
        with pytest.raises(ConfigError, match=f"label {label} is outside"):
            learner_of(data=replaced(data, y_test=np.append(data.y_test[1:], label)))


def test_a_device_without_training_samples_is_refused(learner_of: MakeLearner) -> None:
    data = blobs(SPEC)
    with pytest.raises(ConfigError, match="no training samples"):
        learner_of(data=replaced(data, x_train=data.x_train[:0], y_train=data.y_train[:0]))


def test_vectors_of_another_model_are_refused(learner_of: MakeLearner) -> None:
    task = first_task()
    with pytest.raises(ConfigError, match="shape"):
        learner_of().train(replace(task, z=task.z[:-1], nu=task.nu[:-1]))
    with pytest.raises(ConfigError, match="one consensus"):
        learner_of().train(replace(task, nu=task.nu[:-1]))


def test_two_devices_that_lack_a_class_each_learn_it_from_the_other(learner_of: MakeLearner) -> None:
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

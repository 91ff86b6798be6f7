"""A plan that limits joules, or asks for a proven accuracy, changes how much a device works and nothing else."""

import numpy as np
import pytest
from msgspec.structs import replace

from fedeq_edge.consensus.methods import METHODS
from fedeq_edge.data.npz import ClientData
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.deq.wellposed import certificate
from fedeq_edge.errors import ConfigError
from fedeq_edge.training.learner import Learner
from fedeq_edge.training.step import Calibration, LocalResult, LocalTask, Plan
from fedeq_edge.training.torch_step import TorchBackend

CONTRACTIVE = ModelSpec(input_shape=(6,), classes=3, channels=8, radius=0.5)
RESIDUAL = ModelSpec(input_shape=(1, 6, 6), classes=3, cell="residual", channels=8, groups=4)
PLAN = Plan(rounds=2, epochs=2, batch=8, budgets=(2, 4, 8), compute_s=10.0, refit_steps=5)
# Two epochs of 32 samples are 8 steps; at K = 8 they cost 8 * 0.9 s of the 8 s that are planned.
DEAR = Calibration(batch=8, fixed_s=0.1, evaluation_s=0.1, adjoint_s=0.0)


def learner(spec: ModelSpec, plan: Plan, watts: float | None = None) -> Learner:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, *spec.input_shape)).astype(np.float32)
    y = np.resize(np.arange(3), 40)
    data = ClientData(x_train=x[:32], y_train=y[:32], x_test=x[32:], y_test=y[32:])
    return Learner(
        TorchBackend(spec, plan),
        data,
        plan,
        METHODS["admm"],
        start=initial(spec, 0),
        clock=lambda: 0.0,
        calibration=DEAR,
        watts=watts,
    )


def trained(spec: ModelSpec, plan: Plan, watts: float | None = None) -> LocalResult:
    theta, head = initial(spec, 0)
    task = LocalTask(round=0, z=theta, nu=np.zeros_like(theta), kappa=0.1, head=head, seed=1)
    return learner(spec, plan, watts).train(task)


def test_a_device_that_knows_its_watts_works_less_on_fewer_joules() -> None:
    free = trained(CONTRACTIVE, PLAN, watts=2.0)
    poor = trained(CONTRACTIVE, replace(PLAN, energy_j=6.0), watts=2.0)  # 3 s of 10: 8 steps at K = 2 already take 2.4

    assert (free.budget.forward, free.steps) == (8, 8)
    assert (poor.budget.forward, poor.steps) == (2, 8)


def test_a_device_that_does_not_know_its_watts_goes_by_time() -> None:
    limited, free = trained(CONTRACTIVE, replace(PLAN, energy_j=1e-3)), trained(CONTRACTIVE, PLAN)

    assert np.array_equal(limited.difference, free.difference)


def test_a_certified_device_draws_no_evaluation_beyond_the_proof() -> None:
    theta, _ = initial(CONTRACTIVE, 0)
    proof = certificate(theta, CONTRACTIVE, 3)
    assert proof is not None

    result = trained(CONTRACTIVE, replace(PLAN, accuracy=proof.bound * 1.001))

    assert result.budget.forward == 3


def test_a_device_without_a_proof_draws_what_it_affords() -> None:
    asked, free = trained(RESIDUAL, replace(PLAN, accuracy=0.5)), trained(RESIDUAL, PLAN)

    assert np.array_equal(asked.difference, free.difference)


def test_a_length_of_another_model_is_refused_before_anything_is_proven_of_it() -> None:
    theta, head = initial(CONTRACTIVE, 0)
    task = LocalTask(round=0, z=theta[:-1], nu=theta[:-1] * 0, kappa=0.1, head=head, seed=1)

    with pytest.raises(ConfigError, match="shape"):
        learner(CONTRACTIVE, replace(PLAN, accuracy=0.5)).train(task)


def test_a_personal_model_brings_the_certificate_of_its_own_weights_and_budget() -> None:
    theta, head = initial(CONTRACTIVE, 0)

    personal = learner(CONTRACTIVE, PLAN).personalise(theta, head)

    assert personal.certificate == certificate(personal.theta, CONTRACTIVE, personal.budget.forward)
    assert personal.certificate is not None
    assert personal.certificate.gamma <= 0.5


def test_a_personal_model_of_a_residual_cell_claims_nothing() -> None:
    theta, head = initial(RESIDUAL, 0)

    assert learner(RESIDUAL, PLAN).personalise(theta, head).certificate is None

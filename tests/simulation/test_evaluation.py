"""The numbers of a client are those of separate solves, refits and rounds, alike for every method."""

from dataclasses import replace as replaced

import numpy as np
import pytest
from msgspec.structs import replace

from fedeq_edge.consensus.methods import METHODS, Method
from fedeq_edge.data.npz import ClientData
from fedeq_edge.deq.initial import initial, start
from fedeq_edge.errors import ConfigError
from fedeq_edge.simulation.evaluation import evaluate, features_at, mean_head
from fedeq_edge.simulation.explicit import ExplicitBackend
from fedeq_edge.simulation.networks import ExplicitSpec
from fedeq_edge.training.learner import Learner
from fedeq_edge.training.refit import accuracy, cross_entropy, fit_head
from tests.training.local_rounds import (
    CHEAP,
    PLAN,
    RESIDUAL,
    SHARED,
    SPEC,
    TickingClock,
    backend_of,
    blobs,
    first_task,
    learner_on,
)

BUDGETS = (1, 2, 3, 5, 8, 13)


def doubled(data: ClientData) -> ClientData:
    """More test samples than are solved at once."""
    return replaced(data, x_test=np.tile(data.x_test, (9, 1)), y_test=np.tile(data.y_test, 9))


@pytest.mark.parametrize("name", ["torch", "onnx"])
@pytest.mark.parametrize("spec", [SPEC, RESIDUAL])
def test_one_walk_gives_what_separate_solves_give(name: str, spec: object) -> None:
    spec = SPEC if spec is SPEC else RESIDUAL
    backend = backend_of(name, spec)  # type: ignore[arg-type]  # parametrised names
    backend.load(*initial(spec, 1))
    x = blobs(spec).x_test
    for K, (features, residual) in zip(BUDGETS, features_at(backend, x, BUDGETS), strict=True):
        alone = backend.solve(x, K)
        np.testing.assert_array_equal(features, alone[0])
        np.testing.assert_allclose(residual, alone[1], rtol=1e-6)


def test_the_curve_of_a_client_is_that_of_its_parts() -> None:
    data = doubled(blobs(SPEC))
    learner, task = learner_on("torch", data=data), first_task()
    found = evaluate(learner, task, budgets=BUDGETS)
    assert [point.evaluations for point in found.curve] == sorted({*BUDGETS, 4})  # 4: the middle of the plan's budgets
    assert (found.own, found.training, found.test) == (4, 30, 270)
    backend = backend_of("torch")
    trained = learner_on("torch", data=data).train(task)
    for point in found.curve:
        backend.load(task.z, task.head)
        features, residual = backend.solve(data.x_test, point.evaluations)
        trained_on, _ = backend.solve(data.x_train, point.evaluations)
        fitted = fit_head(
            trained_on,
            data.y_train,
            task.head,
            steps=PLAN.refit_steps,
            rate=PLAN.refit_rate,
            pull=PLAN.refit_pull,
        )
        assert point.consensus == accuracy(features, data.y_test, task.head)
        assert point.loss == pytest.approx(cross_entropy(features, data.y_test, task.head), rel=1e-5)
        assert point.training_loss == pytest.approx(cross_entropy(trained_on, data.y_train, task.head), rel=1e-5)
        assert point.refit == accuracy(features, data.y_test, fitted)
        assert point.residual_most == pytest.approx(float(residual.max()), rel=1e-5)
        backend.load(task.z + trained.difference, trained.head)
        assert point.local == accuracy(backend.solve(data.x_test, point.evaluations)[0], data.y_test, trained.head)
    assert found.delivered == found.at(4).refit
    assert found.trained is not None
    assert found.trained.loss == trained.loss
    with pytest.raises(ConfigError, match="K = 7 was not measured; choose from 1, 2, 3, 4"):
        found.at(7)


@pytest.mark.parametrize("name", ["ditto", "local", "fedavg-finetune"])
def test_what_a_method_trains_at_delivery_is_what_its_learner_delivers(name: str) -> None:
    method = METHODS[name]
    task = first_task(method=method)
    found = evaluate(learner_on("torch", method=method), task, budgets=(1, 2), local=False)
    assert found.delivered == learner_on("torch", method=method).personalise(task.z, task.head).accuracy_personal
    assert found.trained is None
    assert found.curve[0].local is None or not method.exchange
    plain = evaluate(learner_on("torch", method=SHARED), first_task(method=SHARED), budgets=(1, 2), local=False)
    if method.heads == "consensus_refit":
        assert found.curve == plain.curve  # the same measure of the same consensus


def test_alone_and_local_are_the_same_where_nothing_is_exchanged() -> None:
    found = evaluate(learner_on("torch", method=METHODS["local"]), first_task(method=METHODS["local"]), budgets=(1,))
    assert found.at(found.own).local == found.delivered
    assert found.trained is None


def hard() -> ClientData:
    """Two far blobs per class: what a linear head does badly, and neighbours well."""
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], size=(200, 1))
    labels = rng.integers(0, 3, 200)
    axes = np.eye(3, 6)[labels]
    x = (2.0 * signs * axes + 0.1 * rng.normal(size=(200, 6))).astype(np.float32)
    return ClientData(x_train=x[:120], y_train=labels[:120], x_test=x[120:], y_test=labels[120:])


def knn_of(neighbours: int) -> Method:
    return replace(METHODS["knn-per"], neighbours=neighbours)


def test_neighbours_mend_a_model_that_knows_nothing_of_the_client() -> None:
    task = first_task(method=SHARED)
    found = evaluate(learner_on("torch", method=knn_of(5), data=hard()), task, local=False)
    assert found.neighbour_share is not None
    assert found.neighbour_share > 0.0
    assert found.delivered > found.at(found.own).consensus + 0.2


def test_an_explicit_network_is_alike_at_every_budget() -> None:
    spec = ExplicitSpec(network="mlp", input_shape=(6,), classes=3, widths=(16,))
    backend = ExplicitBackend(spec, PLAN)
    begin = start(backend.description, 0)
    learner = Learner(
        backend, blobs(SPEC), PLAN, METHODS["fedper"], start=begin, clock=TickingClock(0.0), calibration=CHEAP
    )
    task = replace(first_task(), z=begin[0], nu=np.zeros_like(begin[0]), head=begin[1])
    found = evaluate(learner, task, budgets=(1, 2, 8))
    assert [point.evaluations for point in found.curve] == [1, 2, 4, 8]
    assert {replace(point, evaluations=0) for point in found.curve} == {replace(found.curve[0], evaluations=0)}
    assert found.curve[0].residual == 0.0
    assert found.curve[0].local is not None


def test_the_head_of_an_unseen_client_is_the_mean_weighted_by_samples() -> None:
    heads = [(np.array([1.0, 0.0], np.float32), 1), (np.array([0.0, 4.0], np.float32), 3)]
    assert mean_head(heads) == pytest.approx(np.array([0.25, 3.0]))


def test_a_client_without_test_samples_is_named() -> None:
    with pytest.raises(ConfigError, match="no test samples"):
        evaluate(learner_on("torch", data=blobs(SPEC, tests=0)), first_task())

"""The training step as a graph is the training step of torch."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from fedeq_edge.consensus.constraint import feasible
from fedeq_edge.deq.adjoints import Implicit
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.layout import constraints, theta_layout
from fedeq_edge.deq.model import DEQ
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError, DataError, ExportError, SolverError
from fedeq_edge.onnx import graph
from fedeq_edge.onnx.autodiff import Linearised
from fedeq_edge.onnx.trainer import GraphDescent, TrainingGraph
from fedeq_edge.onnx.training import build_training
from fedeq_edge.training import torch_step
from fedeq_edge.training.backend import Pull
from fedeq_edge.training.recommend import recommend
from fedeq_edge.training.step import Budget, Plan

Vector = NDArray[np.float32]
Array = NDArray[np.float32]

SPECS = {
    "dense": ModelSpec(input_shape=(12,), classes=5, channels=16, shift=(0.5,), scale=(2.0,)),
    "dense, free": ModelSpec(input_shape=(7,), classes=3, channels=9, radius=None),
    "dense, spectral": ModelSpec(input_shape=(12,), classes=5, channels=16, norm="spectral"),
    "monotone": ModelSpec(input_shape=(12,), classes=5, cell="monotone", channels=16, radius=0.5),
    "sequence": ModelSpec(input_shape=(3, 33), classes=4, channels=8, stem_kernel=6, stem_stride=4, pool=3),
    "sequence, spectral": ModelSpec(
        input_shape=(3, 16), classes=4, channels=8, norm="spectral", shift=(1.0, 0.0, -1.0)
    ),
    "image": ModelSpec(input_shape=(2, 8, 8), classes=4, channels=8, pool=2, scale=(1.0, 3.0)),
    "image, spectral": ModelSpec(input_shape=(2, 7, 7), classes=4, channels=8, norm="spectral", pool=2, stem_stride=2),
    "residual sequence": ModelSpec(
        input_shape=(3, 64), classes=4, cell="residual", channels=16, groups=4, stem_kernel=12, stem_stride=4
    ),
    "residual sequence, damped": ModelSpec(
        input_shape=(3, 32),
        classes=4,
        cell="residual",
        damping=0.6,
        channels=16,
        groups=4,
        stem_kernel=12,
        stem_stride=4,
    ),
    "residual sequence, two-stage stem": ModelSpec(
        input_shape=(2, 40),
        classes=3,
        cell="residual",
        channels=8,
        groups=4,
        stem_width=4,
        stem_kernel=5,
        stem_stride=2,
    ),
    "residual image": ModelSpec(
        input_shape=(1, 13, 12),
        classes=4,
        cell="residual",
        channels=8,
        inner_channels=16,
        groups=4,
        stem_width=4,
        stem_kernel=5,
        stem_stride=2,
        pool=2,
    ),
    "published": ModelSpec(
        input_shape=(2, 9, 8),
        classes=3,
        cell="residual",
        activation="softplus",
        channels=8,
        inner_channels=16,
        groups=4,
    ),
}
DENSE, IMAGE, SEQUENCE = SPECS["dense"], SPECS["image"], SPECS["residual sequence"]
CELLS = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model away from its start, and numbers of a round, no two vectors alike."""

    spec: ModelSpec
    theta: Vector
    head: Vector
    z: Vector
    nu: Vector

    def batches(self, count: int, size: int = 6) -> Iterator[tuple[Array, NDArray[np.int64]]]:
        draw = np.random.default_rng(7)
        for _ in range(count):
            x = draw.standard_normal((size, *self.spec.input_shape)).astype(np.float32)
            yield x, draw.integers(0, self.spec.classes, size)


def problem(spec: ModelSpec, *, shares_head: bool = False) -> Problem:
    theta, head = initial(spec, 0)
    draw = np.random.default_rng(1)
    for slot in theta_layout(spec):
        if ".norm" in slot.name or slot.name.endswith("bias"):
            slot.view(theta)[:] += 0.1 * draw.standard_normal(slot.shape)
    head += 0.1 * draw.standard_normal(head.shape).astype(np.float32)
    shared = np.concatenate([theta, head]) if shares_head else theta
    noise = draw.standard_normal((2, shared.size)).astype(np.float32)
    return Problem(spec=spec, theta=theta, head=head, z=shared + 0.01 * noise[0], nu=0.01 * noise[1])


def pair(
    given: Problem, plan: Plan, *, rate: float, kappa: float = 0.3, frozen_head: bool = False
) -> tuple[GraphDescent, torch_step.Descent, DEQ]:
    """The same round by graph and by torch."""
    model = DEQ(given.spec)
    model.load(given.theta, given.head)
    reference = torch_step.Descent(
        model,
        plan,
        rate=rate,
        pull=Pull(z=given.z, nu=given.nu, kappa=kappa),
        frozen_head=frozen_head,
    )
    ours = TrainingGraph(build_training(given.spec)).descent(
        given.theta,
        given.head,
        rate=rate,
        momentum=plan.momentum,
        clip=plan.clip,
        weight_decay=plan.weight_decay,
        pull=Pull(z=given.z, nu=given.nu, kappa=kappa),
        frozen_head=frozen_head,
    )
    return ours, reference, model


def both(ours: GraphDescent, model: DEQ) -> tuple[Vector, Vector]:
    return np.concatenate([ours.theta, ours.head]), torch.cat([model.theta, model.head_vector]).numpy()


def gradient(given: Problem, x: Array, y: NDArray[np.int64], budget: Budget, tol: float = 0.0) -> Vector:
    """The graph's gradient of the loss: the velocity without momentum, clip and pull."""
    loaded = TrainingGraph(build_training(given.spec))
    w = np.concatenate([given.theta, given.head])
    numbers = {"rate": 0.0, "momentum": 0.0, "clip": 1e9, "train_head": 1.0, "tol": tol}
    feeds = {
        "x": x,
        "y": y,
        "w": w,
        **{name: np.zeros_like(w) for name in ("velocity", "curvature", "offset")},
        **{name: np.array(number, dtype=np.float32) for name, number in numbers.items()},
        "forward": np.array(budget.forward),
        "adjoint": np.array(budget.adjoint),
        **loaded.solver.step_size(w),
    }
    (found,) = loaded.session.run(["velocity_next"], feeds)
    return np.asarray(found, dtype=np.float32)


def torch_gradient(given: Problem, x: Array, y: NDArray[np.int64], budget: Budget, tol: float = 0.0) -> Vector:
    model = DEQ(given.spec)
    model.load(given.theta, given.head)
    adjoint = Implicit(budget=budget.adjoint, tol=tol) if tol else None
    output = model(torch.from_numpy(x), budget=budget, adjoint=adjoint)
    model.backward(torch.nn.functional.cross_entropy(output.logits, torch.from_numpy(y)))
    return torch.cat([model.theta_grad, model.head_grad]).numpy()


def apart(found: Vector, expected: Vector) -> float:
    """Largest difference, in units of the largest number expected, or of 1."""
    return float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))


@CELLS
@pytest.mark.parametrize("budget", [Budget(forward=1, adjoint=0), Budget(forward=5, adjoint=2)], ids=["JFB", "terms"])
def test_gradients_are_those_of_torch(spec: ModelSpec, budget: Budget) -> None:
    given = problem(spec)
    for x, y in given.batches(2):
        assert apart(gradient(given, x, y, budget), torch_gradient(given, x, y, budget)) < 1e-6


@pytest.mark.parametrize("name", ["dense", "monotone", "sequence", "image, spectral"])
def test_the_adjoint_is_solved_to_a_tolerance_where_one_is_given(name: str) -> None:
    given, budget = problem(SPECS[name]), Budget(forward=60, adjoint=200)
    ((x, y),) = given.batches(1)
    exact = torch_gradient(given, x, y, budget, tol=1e-6)

    assert apart(gradient(given, x, y, budget, tol=1e-6), exact) < 1e-5
    assert apart(gradient(given, x, y, budget, tol=1e-2), exact) > 1e-5


@pytest.mark.parametrize("name", ["dense", "monotone", "sequence", "image, spectral", "published"])
def test_two_hundred_steps_end_where_those_of_torch_do(name: str) -> None:
    given = problem(SPECS[name])
    plan = Plan(momentum=0.9, clip=0.5, weight_decay=1e-3)
    ours, reference, model = pair(given, plan, rate=0.02)
    budgets = [Budget(forward=forward, adjoint=adjoint) for forward, adjoint in ((4, 2), (1, 0), (7, 3))]
    for number, (x, y) in enumerate(given.batches(200)):
        budget = budgets[number % 3]
        expected = reference.step(x, y, budget)
        found = ours.step(x, y, forward=budget.forward, adjoint=budget.adjoint)
        assert found.loss == pytest.approx(expected.loss, abs=1e-4)
        assert found.residual == pytest.approx(expected.residual, rel=1e-2, abs=1e-6)
        assert found.backward_residual == pytest.approx(expected.backward_residual, rel=1e-2, abs=1e-6)

    assert apart(*both(ours, model)) < 1e-4


@CELLS
def test_every_cell_steps_as_in_torch(spec: ModelSpec) -> None:
    given = problem(spec)
    ours, reference, model = pair(given, Plan(momentum=0.5, clip=0.1), rate=0.1)
    for x, y in given.batches(3):
        reference.step(x, y, Budget(forward=4, adjoint=2))
        ours.step(x, y, forward=4, adjoint=2)

    assert apart(*both(ours, model)) < 1e-5
    assert feasible(ours.theta, constraints(spec))


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("shares_head", [False, True])
def test_what_is_shared_is_pulled_and_a_frozen_head_is_not_trained(frozen_head: bool, shares_head: bool) -> None:
    given = problem(DENSE, shares_head=shares_head)
    ours, reference, model = pair(given, Plan(clip=0.1), rate=0.1, frozen_head=frozen_head)
    for x, y in given.batches(3):
        reference.step(x, y, Budget(forward=3, adjoint=1))
        ours.step(x, y, forward=3, adjoint=1)

    assert apart(*both(ours, model)) < 1e-6
    assert np.array_equal(ours.head, given.head) == (frozen_head and not shares_head)


def test_adam_steps_as_torch_s_adam() -> None:
    given = problem(SPECS["dense, free"])
    model = DEQ(given.spec)
    model.load(given.theta, given.head)
    reference = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.8, 0.999))
    loaded = TrainingGraph(build_training(given.spec, optimizer="adam"))
    ours = loaded.descent(given.theta, given.head, rate=0.01, momentum=0.8, clip=1e9)
    for x, y in given.batches(20):
        model.zero_grad()
        output = model(torch.from_numpy(x), budget=Budget(forward=3, adjoint=1))
        model.backward(torch.nn.functional.cross_entropy(output.logits, torch.from_numpy(y)))
        reference.step()
        ours.step(x, y, forward=3, adjoint=1)

    assert apart(*both(ours, model)) < 1e-4


def test_batches_of_every_size_are_taken() -> None:
    given = problem(IMAGE)
    ours, reference, model = pair(given, Plan(), rate=0.1)
    for size in (1, 5, 2):
        ((x, y),) = given.batches(1, size)
        reference.step(x, y, Budget(forward=3, adjoint=1))
        ours.step(x, y, forward=3, adjoint=1)

    assert apart(*both(ours, model)) < 1e-5


@CELLS
def test_samples_of_zeros_leave_everything_finite(spec: ModelSpec) -> None:
    given = problem(spec)
    for optimizer in ("sgd", "adam"):
        loaded = TrainingGraph(build_training(spec, optimizer=optimizer))
        theta, head = np.zeros_like(given.theta), np.zeros_like(given.head)
        ours = loaded.descent(theta, head, rate=0.1, momentum=0.9, clip=1.0)
        zeros = np.zeros((2, *spec.input_shape), dtype=np.float32)
        ours.step(zeros, np.array([0, 1]), forward=3, adjoint=2)
        found = ours.step(zeros, np.array([0, 1]), forward=3, adjoint=2)
        assert np.isfinite([found.loss, found.residual, found.backward_residual]).all()
        assert np.isfinite(ours.theta).all()
        assert np.isfinite(ours.head).all()


def test_a_sample_with_nan_stops_the_step_before_anything_has_changed() -> None:
    given = problem(SEQUENCE)
    ours, _, _ = pair(given, Plan(), rate=0.1)
    first, second = given.batches(2)
    ours.step(*first, forward=3, adjoint=1)
    held = ours.theta, ours.head
    spoilt = second[0].copy()
    spoilt[1, 0, 0] = np.nan

    with pytest.raises(SolverError, match="the loss is nan at K = 3; lower learning_rate"):
        ours.step(spoilt, second[1], forward=3, adjoint=1)

    assert all(map(np.array_equal, held, (ours.theta, ours.head)))
    ours.step(*second, forward=3, adjoint=1)
    assert np.isfinite(ours.theta).all()


def test_samples_labels_and_vectors_that_do_not_fit_are_refused() -> None:
    given = problem(DENSE)
    loaded = TrainingGraph(build_training(DENSE))
    ours = loaded.descent(given.theta, given.head, rate=0.1, momentum=0.9, clip=1.0)
    x = np.zeros((2, 12), dtype=np.float32)

    with pytest.raises(DataError, match=r"samples have shape \(2, 11\)"):
        ours.step(x[:, 1:], np.array([0, 1]), forward=3, adjoint=1)
    with pytest.raises(DataError, match="2 samples with labels of shape"):
        ours.step(x, np.array([0]), forward=3, adjoint=1)
    with pytest.raises(ConfigError, match="was it made for another model"):
        loaded.descent(given.theta[1:], given.head, rate=0.1, momentum=0.9, clip=1.0)


@CELLS
def test_features_and_residuals_are_those_of_torch(spec: ModelSpec) -> None:
    given = problem(spec)
    ((x, _),) = given.batches(1)
    model = DEQ(spec)
    model.load(given.theta, given.head)
    expected = model.solve(torch.from_numpy(x), budget=4)

    features, residual = TrainingGraph(build_training(spec)).solver.solve(x, given.theta, forward=4)

    assert apart(features, model.features(expected.value).numpy()) < 2e-6
    assert np.allclose(residual, expected.residual.numpy(), rtol=1e-3, atol=1e-6)


@CELLS
def test_a_graph_is_the_same_bytes_every_time_and_an_onnx_file_for_old_runtimes(spec: ModelSpec) -> None:
    content = build_training(spec)
    model = onnx.load_model_from_string(content)
    onnx.checker.check_model(model, full_check=True)

    assert content == build_training(spec)
    assert model.ir_version == 8
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    assert len(content) < 2**18
    assert str(Path.home()).encode() not in content
    # Nobody's weights: what is constant is as small as a pooling matrix.
    assert max(np.prod(tensor.dims) for tensor in model.graph.initializer) < given_size(spec)


def given_size(spec: ModelSpec) -> int:
    return initial(spec, 0)[0].size


def test_nothing_in_the_adjoint_loop_could_be_computed_before_it() -> None:
    model = onnx.load_model_from_string(build_training(SEQUENCE))
    loops = {node.name: node.attribute[0].g for node in model.graph.node if node.op_type == "Loop"}
    body = loops["adjoint_terms"]
    moving = {value.name for value in body.input}
    for node in body.node:
        assert moving & set(node.input), f"{node.name} is computed anew by every product with J^T"
        moving |= set(node.output)


def test_an_operator_without_a_derivative_is_named() -> None:
    part = graph.Part("cell")
    part.apply("Erf", "z", name="f")

    with pytest.raises(ExportError, match=r"Erf \(f\) has no derivative here"):
        Linearised(part, {"z": (0, 3)}).pull({"f": "g"}, ["z"], graph.Part("back"))


def test_a_value_that_nothing_depends_on_is_named() -> None:
    part = graph.Part("cell")
    part.apply("Tanh", "z", name="f")

    with pytest.raises(ExportError, match="nothing leads from f to injection"):
        Linearised(part, {"z": (0, 3)}).pull({"f": "g"}, ["injection"], graph.Part("back"))


def test_a_device_trains_without_torch_and_without_onnx(tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(build_training(DENSE))
    code = (
        "import sys, numpy; from pathlib import Path; from fedeq_edge.deq.initial import start;"
        "from fedeq_edge.onnx.trainer import TrainingGraph;"
        f"graph = TrainingGraph(Path({str(tmp_path / 'graph.onnx')!r}).read_bytes());"
        "steps = graph.descent(*start(graph.description, 0), rate=0.1, momentum=0.9, clip=1.0);"
        "steps.step(numpy.ones((2, 12), 'f'), numpy.array([0, 1]), forward=2, adjoint=1);"
        "print(sorted({'torch', 'onnx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("shape", [(64,), (9, 128), (1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_every_model_that_we_recommend_has_a_graph(shape: tuple[int, ...]) -> None:
    spec, _, _ = recommend(shape, 10)
    loaded = TrainingGraph(build_training(spec))

    assert (loaded.theta_size, loaded.head_size) == tuple(vector.size for vector in initial(spec, 0))

"""The same rounds on both backends come to the same, and training by a graph needs no torch."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec import to_builtins
from msgspec.structs import replace

from fedeq_edge.backends import build_graph
from fedeq_edge.consensus.methods import METHODS
from fedeq_edge.data.npz import save_client
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError, SolverError
from fedeq_edge.training import exchange
from fedeq_edge.training.backend import micro_batches
from fedeq_edge.training.step import BackendName, Budget, LocalResult, Personal
from fedeq_edge.wire.chunks import digest
from tests.training.local_rounds import ADMM, PLAN, RESIDUAL, SHARED, SPEC, backend_of, blobs, first_task, learner_on

MONOTONE = replace(SPEC, cell="monotone")
SEQUENCE = ModelSpec(
    input_shape=(2, 24), classes=3, cell="residual", channels=8, groups=4, stem_kernel=6, stem_stride=2, stem_width=4
)
SPECTRAL = ModelSpec(input_shape=(1, 6, 6), classes=3, channels=6, norm="spectral", pool=2)
THREE_ROUNDS = replace(PLAN, rounds=3, weight_decay=1e-3, compare_local=True)


def rounds(backend: BackendName, spec: ModelSpec, method_name: str) -> tuple[list[LocalResult], Personal]:
    """Three rounds from the common start, each from where the last has led, and the personal model."""
    method = {"admm": ADMM, "shared": SHARED, "refit": replace(ADMM, head_step="refit"), **METHODS}[method_name]
    learner = learner_on(backend, spec, THREE_ROUNDS, method=method)
    task = first_task(spec, method)
    dual = np.random.default_rng(1).normal(size=task.z.shape).astype(np.float32) * 0.01
    results = []
    for number in range(3):
        result = learner.train(replace(task, round=number, nu=dual, seed=number))
        task = replace(task, z=task.z + result.difference, head=result.head)
        results.append(result)
    return results, learner.personalise(task.z, task.head)


@pytest.mark.parametrize(
    ("spec", "method"),
    [
        (SPEC, "admm"),
        (SPEC, "refit"),
        (MONOTONE, "shared"),
        (SEQUENCE, "admm"),
        (SPECTRAL, "shared"),
        (RESIDUAL, "shared"),
        (RESIDUAL, "ditto"),
    ],
    ids=["dense", "dense-refit", "monotone", "sequence", "spectral", "image", "image-ditto"],
)
def test_whole_rounds_come_to_the_same_on_both_backends(spec: ModelSpec, method: str) -> None:
    (torch_rounds, torch_personal), (onnx_rounds, onnx_personal) = (
        rounds(name, spec, method) for name in ("torch", "onnx")
    )
    for expected, found in zip(torch_rounds, onnx_rounds, strict=True):
        moved = float(np.linalg.norm(expected.difference))
        assert float(np.linalg.norm(found.difference - expected.difference)) < 1e-3 * moved
        assert found.loss == pytest.approx(expected.loss, rel=1e-3)
        assert found.residual == pytest.approx(expected.residual, rel=1e-2, abs=1e-6)
        assert found.backward_residual == pytest.approx(expected.backward_residual, rel=1e-2, abs=1e-6)
        assert (found.budget, found.steps) == (expected.budget, expected.steps)
        assert found.accuracy_consensus == pytest.approx(expected.accuracy_consensus, abs=0.034)  # one of 30 samples
    np.testing.assert_allclose(onnx_personal.theta, torch_personal.theta, rtol=0, atol=2e-3)
    assert onnx_personal.accuracy_personal == pytest.approx(torch_personal.accuracy_personal, abs=0.034)
    assert onnx_personal.local_only == pytest.approx(torch_personal.local_only, abs=0.034)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize("spec", [SPEC, MONOTONE, RESIDUAL], ids=["dense", "monotone", "image"])
def test_a_round_in_micro_batches_is_that_of_whole_batches_to_rounding(backend: BackendName, spec: ModelSpec) -> None:
    whole, parts, again = (
        learner_on(backend, spec, replace(THREE_ROUNDS, microbatch=most)).train(first_task(spec, ADMM))
        for most in (0, 3, 3)
    )
    moved = float(np.linalg.norm(whole.difference))
    assert 0.0 < float(np.linalg.norm(parts.difference - whole.difference)) < 1e-4 * moved
    np.testing.assert_allclose(parts.head, whole.head, rtol=1e-4, atol=1e-5)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-4)
    assert parts.residual == pytest.approx(whole.residual, rel=1e-3, abs=1e-7)
    assert parts.backward_residual == pytest.approx(whole.backward_residual, rel=1e-3, abs=1e-7)
    np.testing.assert_array_equal(again.difference, parts.difference)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_a_step_that_diverges_in_its_second_micro_batch_changes_nothing(backend: BackendName) -> None:
    model = backend_of(backend, SPEC, replace(PLAN, microbatch=2))
    model.load(*initial(SPEC, 0))
    before, steps = model.parameters(), model.descent(rate=0.1)
    x = np.random.default_rng(0).normal(size=(4, *SPEC.input_shape)).astype(np.float32)
    x[3] = np.nan
    with pytest.raises(SolverError):
        steps.step(x, np.zeros(4, np.int64), Budget(forward=3, adjoint=1))
    for found, expected in zip(model.parameters(), before, strict=True):
        np.testing.assert_array_equal(found, expected)
    x[3] = 0.0
    assert np.isfinite(steps.step(x, np.zeros(4, np.int64), Budget(forward=3, adjoint=1)).loss)
    assert all(np.isfinite(vector).all() for vector in model.parameters())


@pytest.mark.parametrize(
    ("batch", "most", "sizes"), [(32, 0, [32]), (32, 8, [8] * 4), (32, 12, [10, 11, 11]), (3, 8, [3])]
)
def test_micro_batches_are_even_and_none_is_larger_than_allowed(batch: int, most: int, sizes: list[int]) -> None:
    assert [part.stop - part.start for part in micro_batches(batch, most)] == sizes


def test_a_training_step_of_torch_imports_no_symbolic_algebra() -> None:
    code = """
import sys
import numpy as np
from fedeq_edge.training.torch_step import TorchBackend
from fedeq_edge.training.step import Budget, Plan
from tests.training.local_rounds import RESIDUAL
backend = TorchBackend(RESIDUAL, Plan())
steps = backend.descent(rate=0.1)
steps.step(np.ones((2, *RESIDUAL.input_shape), np.float32), np.zeros(2, np.int64), Budget(forward=2, adjoint=2))
assert "sympy" not in sys.modules, "35 MB that nothing here uses"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_penalty_that_graphs_do_not_know_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"jacobian_penalty is 0\.5.*backend = \"torch\""):
        backend_of("onnx", RESIDUAL, replace(PLAN, jacobian_penalty=0.5))


def test_unrolling_that_graphs_do_not_know_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"unrolled is 1.*backend = \"torch\""):
        backend_of("onnx", SPEC, replace(PLAN, unrolled=1))


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_parameters_that_are_not_finite_are_refused_by_name(backend: BackendName) -> None:
    theta, head = initial(SPEC, 0)
    theta[-1] = np.nan
    with pytest.raises(ConfigError, match=r"cell\.weight holds nan"):
        backend_of(backend).load(theta, head)


# What a board without torch looks like to the program.
_WITHOUT_TORCH = """\
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, NoTorch())
from fedeq_edge.trainer import main
main()
"""


class Trainer:
    """A trainer process of a device without torch and without the onnx package."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WITHOUT_TORCH], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def setup(self, **changes: object) -> exchange.Setup:
        """For dense data in the folder, and its graph there."""
        save_client(self._folder / "data.npz", blobs(SPEC))
        graph = build_graph(SPEC)
        (self._folder / "training.onnx").write_bytes(graph)
        chosen = exchange.Setup(
            model=to_builtins(SPEC),
            plan=PLAN,
            method=ADMM,
            backend="onnx",
            graph=str(self._folder / "training.onnx"),
            graph_sha256=digest(graph),
            data=str(self._folder / "data.npz"),
            cache=str(self._folder / "calibration"),
            profile="",
            slowdown=1.0,
            shared=True,
            seed=0,
        )
        return replace(chosen, **changes)

    def ask(self, request: exchange.Request) -> exchange.Reply:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        exchange.write(self._process.stdin, request)  # type: ignore[arg-type]  # a pipe of bytes
        reply = exchange.read_reply(self._process.stdout)  # type: ignore[arg-type]  # a pipe of bytes
        assert reply is not None
        return reply

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._process.stdin, self._process.stdout:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    process = Trainer(tmp_path)
    yield process
    process.close()


def test_a_trainer_without_torch_trains_and_makes_its_personal_model(trainer: Trainer) -> None:
    assert isinstance(trainer.ask(trainer.setup()), exchange.Ready)
    task = first_task()
    done = trainer.ask(exchange.Work(task=task))
    assert isinstance(done, exchange.Done)
    assert done.result.steps == 8
    fitted = trainer.ask(exchange.Fit(z=task.z + done.result.difference, head=done.result.head))
    assert isinstance(fitted, exchange.Fitted)
    assert fitted.personal.accuracy_personal > 0.8


def test_a_trainer_refuses_a_graph_that_is_not_what_was_announced_before_it_parses_it(trainer: Trainer) -> None:
    setup = trainer.setup(graph_sha256=digest(b"another"))
    Path(setup.graph).write_bytes(b"\xff" * 1000)
    reply = trainer.ask(setup)
    assert isinstance(reply, exchange.Failed)
    assert "another sha256" in reply.reason
    assert "fetched anew" in reply.reason


UNKNOWN = {"cell": "gated", "input_shape": [6], "classes": 3, "width": 8}


def test_a_trainer_trains_a_kind_of_model_that_it_does_not_know_by_the_graph_alone(trainer: Trainer) -> None:
    assert isinstance(trainer.ask(trainer.setup(model=UNKNOWN)), exchange.Ready)
    assert isinstance(trainer.ask(exchange.Work(task=first_task())), exchange.Done)


def test_torch_names_the_kind_of_model_that_it_does_not_know_and_both_remedies(trainer: Trainer) -> None:
    reply = trainer.ask(trainer.setup(backend="torch", model=UNKNOWN))
    assert isinstance(reply, exchange.Failed)
    assert "'gated'" in reply.reason
    assert "update fedeq-edge" in reply.reason
    assert 'backend = "onnx"' in reply.reason
    assert "\n" not in reply.reason


def test_a_trainer_that_lacks_the_chosen_library_names_it_and_the_other_one(trainer: Trainer) -> None:
    reply = trainer.ask(trainer.setup(backend="torch"))
    assert isinstance(reply, exchange.Failed)
    assert "pip install 'fedeq-edge[torch]'" in reply.reason
    assert 'backend = "onnx"' in reply.reason

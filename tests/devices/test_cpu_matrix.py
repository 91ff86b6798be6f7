"""Wheels under the processors of boards: what imports and computes there, and what dies of an unknown instruction."""

import json

import numpy as np
import pytest

from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.onnx.export import export
from fedeq_edge.onnx.runtime import Predictor
from tests.devices import wheels
from tests.devices.board import Board
from tests.devices.conftest import MakeBoard
from tests.devices.cpus import PI_3, PI_4, PI_5, Cpu

pytestmark = pytest.mark.devices

SIGILL = 132  # of a shell: 128 + signal 4
EVERY_PI = pytest.mark.parametrize("cpu", [PI_3, PI_4, PI_5], ids=lambda cpu: cpu.qemu)
PINS = ("numpy==2.4.6", "onnxruntime==1.31.1")
WHEELS = "/wheels"
SPEC = ModelSpec(input_shape=(16,), classes=4, channels=32)

INFER = """
    import json, os
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import numpy as np, onnxruntime
    session = onnxruntime.InferenceSession("/root/model.onnx")
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    feeds = {"x": x, "tol": np.array(1e-4, np.float32), "max_iter": np.array(60, np.int64)}
    print(json.dumps(session.run(["logits"], feeds)[0].tolist()))
"""
TRAIN = """
    import torch
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 16)
    layer(torch.ones(4, 16)).tanh().square().mean().backward()
    assert layer.weight.grad.isfinite().all()
    print(torch.__version__)
"""


def tree(*pins: str) -> str:
    """The path on the board of these wheels."""
    try:
        return f"{WHEELS}/{wheels.tree(*pins).name}"
    except wheels.WheelsError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def pi(make_board: MakeBoard) -> Board:
    """A Pi that sees the cache of wheels and holds an exported model."""
    wheels.cache().mkdir(parents=True, exist_ok=True)
    made = make_board("pi-02", cpu=PI_4, shown={WHEELS: wheels.cache()})
    export(SPEC, *initial(SPEC, 0), made.root / "root" / "model.onnx", budget=60)
    made.boot()
    return made


@EVERY_PI
def test_an_exported_model_answers_on_every_pi_as_it_does_here(pi: Board, cpu: Cpu) -> None:
    done = pi.on_cpu(cpu, INFER, python_path=tree(*PINS))
    assert done.returncode == 0, done.stderr

    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    here = Predictor(pi.root / "root" / "model.onnx").infer(x, budget=60, tol=1e-4)
    np.testing.assert_allclose(json.loads(done.stdout), here.logits, atol=1e-4)


@EVERY_PI
def test_the_pinned_torch_trains_on_every_pi(pi: Board, cpu: Cpu) -> None:
    done = pi.on_cpu(cpu, TRAIN, python_path=tree("torch==2.9.1", "numpy==2.4.6"))
    assert (done.returncode, done.stdout.strip()) == (0, "2.9.1+cpu"), done.stderr


@EVERY_PI
def test_torch_2_10_dies_on_boards_before_the_pi_5(pi: Board, cpu: Cpu) -> None:
    """The negative control: if this passes on a Pi 4, the emulation proves nothing and the pins may be lifted."""
    done = pi.on_cpu(cpu, TRAIN, python_path=tree("torch==2.10.0", "numpy==2.4.6"))
    assert done.returncode == (0 if cpu is PI_5 else SIGILL), done.stderr


@pytest.mark.parametrize("cpu", [PI_3, PI_4], ids=lambda cpu: cpu.qemu)
def test_onnxruntime_1_21_dies_on_boards_before_the_pi_5(pi: Board, cpu: Cpu) -> None:
    done = pi.on_cpu(cpu, INFER, python_path=tree("numpy==2.4.6", "onnxruntime==1.21.0"))
    assert done.returncode == SIGILL, done.stderr

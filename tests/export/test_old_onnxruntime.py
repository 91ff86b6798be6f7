"""The oldest onnxruntime that there is for this Python loads what we write, and answers alike: make test-runners.

Its wheel (30 MB with a numpy of its time) comes once into build/runners; without a package index the tests are skipped
and say so. The rest of the program is the one that is tested, in a process that finds the old packages first.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import pytest

from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.onnx.export import export
from fedeq_edge.onnx.runtime import Predictor
from fedeq_edge.onnx.training import build_training
from fedeq_edge.training.curve import noise

pytestmark = [pytest.mark.runners, pytest.mark.timeout(900)]

ROOT: Final = Path(__file__).parents[2]
EXAMPLE: Final = ROOT / "export" / "example"
# The first wheels for each Python; 1.15 is the oldest that knows opset 18 with IR 8.
OLDEST: Final = {(3, 11): ("1.15.1", "1.26.4"), (3, 12): ("1.17.0", "1.26.4"), (3, 13): ("1.20.0", "2.1.0")}
SPEC: Final = ModelSpec(input_shape=(3, 32), classes=3, channels=16, pool=4)
INSTALL_S, RUN_S = 600.0, 120.0

TRAIN = """
import sys; from pathlib import Path; import numpy as np
from fedeq_edge.onnx.trainer import TrainingGraph
graph = TrainingGraph(Path(sys.argv[1]).read_bytes())
draw = np.random.default_rng(0)
theta, head = (draw.standard_normal(size).astype(np.float32) / 9 for size in (graph.theta_size, graph.head_size))
descent = graph.descent(theta, head, rate=0.1, momentum=0.9, clip=1.0)
model = graph.description
x, y = draw.standard_normal((8, *model.input_shape), np.float32), np.arange(8) % model.classes
print([descent.step(x, y, forward=6, adjoint=2).loss for _ in range(5)])
"""


@pytest.fixture(scope="module")
def old() -> Path:
    """A folder for sys.path with the oldest onnxruntime, or the tests are skipped."""
    pins = OLDEST.get(sys.version_info[:2])
    if pins is None:
        pytest.skip(f"no oldest onnxruntime is named for Python {sys.version_info[0]}.{sys.version_info[1]}")
    folder = ROOT / "build" / "runners" / f"python-onnxruntime-{pins[0]}"
    if not folder.exists():
        part = folder.with_name(f".{os.getpid()}-{folder.name}")
        _install(part, f"onnxruntime=={pins[0]}", f"numpy=={pins[1]}")
        part.rename(folder)
    return folder


def _install(folder: Path, *pins: str) -> None:
    only = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--target", str(folder)]
    command = [sys.executable, "-m", "pip", "install", *only, *pins]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"pip did not come to an end in {INSTALL_S:.0f} s")
    if done.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"pip install {' '.join(pins)}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def python(path: Path | None, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """A process that finds the packages in `path` first."""
    search = [str(part) for part in (path, ROOT) if part is not None]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search)}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=RUN_S, env=environment
    )


def test_the_packages_are_the_old_ones(old: Path) -> None:
    done = python(old, "-c", "import onnxruntime; print(onnxruntime.__version__, onnxruntime.__file__)")
    version, where = done.stdout.split()
    assert old.name.endswith(version)
    assert Path(where).is_relative_to(old)


@pytest.mark.parametrize("recipe", ["float16", "int8", "onnxruntime", "unrolled"])
def test_every_recipes_file_answers_alike(recipe: str, old: Path, tmp_path: Path) -> None:
    path, x = tmp_path / "model.onnx", noise(SPEC, np.random.default_rng(3), 20)
    theta, head = initial(SPEC, 0)
    export(SPEC, theta, 2 * head, path, budget=12, recipe=recipe, samples=noise(SPEC, np.random.default_rng(7), 64))
    np.savez(tmp_path / "data.npz", x=np.concatenate([x[:1], x]), y=np.arange(21) % 3, split=["train"] + 20 * ["test"])

    done = python(old, "-m", "fedeq_edge", "model", "infer", path, tmp_path / "data.npz", "--json")

    assert done.returncode == 0, done.stderr
    told, expected = json.loads(done.stdout), Predictor(path).infer(x)
    assert told["labels"] == list(expected.labels)
    assert told["iterations_mean"] == pytest.approx(expected.iterations.mean(), abs=0.2 if recipe == "int8" else 0.0)


def test_a_training_graph_trains_alike(old: Path, tmp_path: Path) -> None:
    (tmp_path / "graph.onnx").write_bytes(build_training(SPEC))

    before, now = (python(path, "-c", TRAIN, tmp_path / "graph.onnx") for path in (old, None))

    assert (before.returncode, now.returncode) == (0, 0), before.stderr + now.stderr
    np.testing.assert_allclose(json.loads(before.stdout), json.loads(now.stdout), rtol=1e-5)


def test_the_runner_gives_the_stored_answers_and_says_nothing_else(old: Path) -> None:
    files = [EXAMPLE / name for name in ("model.onnx", "samples.npy")]

    done = python(old, ROOT / "export" / "onnxruntime" / "run.py", *files, "--check", EXAMPLE / "logits.npy")

    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["label"] for line in done.stdout.splitlines()] == list("0123456789")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("largest difference from the stored logits: ")


def test_a_file_that_only_a_newer_one_reads_says_so(old: Path, tmp_path: Path) -> None:
    model = onnx.load(EXAMPLE / "model.onnx")
    for opset, ir_version in ((26, 8), (18, 14)):
        model.opset_import[0].version, model.ir_version = opset, ir_version
        onnx.save(model, tmp_path / "newer.onnx")
        done = python(old, "-m", "fedeq_edge", "model", "inspect", tmp_path / "newer.onnx")
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert f"in opset {opset} and IR version {ir_version}, newer than onnxruntime {old.name[19:]}" in done.stderr

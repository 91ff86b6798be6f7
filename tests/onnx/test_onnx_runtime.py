"""The runtime answers with onnxruntime and numpy alone, keeps samples apart and refuses what does not fit."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError, DataError, ExportError, FedEqError
from fedeq_edge.kit import folder
from fedeq_edge.onnx.export import export
from fedeq_edge.onnx.runtime import Predictor, describe
from fedeq_edge.onnx.training import build_training

ROOT = Path(__file__).parents[2]
SPEC = ModelSpec(input_shape=(3, 16), classes=3, channels=8, pool=2)
LABELS = ["walk", "sit", "stand"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    export(SPEC, *initial(SPEC, 0), path, budget=20, tol=1e-4, labels=LABELS)
    return path


@pytest.fixture
def predictor(model: Path) -> Predictor:
    return Predictor(model)


def samples(count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(3).standard_normal((count, *SPEC.input_shape), dtype=np.float32)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=inherited | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_prediction_names_its_labels(predictor: Predictor) -> None:
    found = predictor.infer(samples(5))

    assert found.logits.shape == (5, 3)
    assert found.labels == tuple(LABELS[row.argmax()] for row in found.logits)
    assert (found.residual <= 1e-4).all()


def test_one_sample_needs_no_batch_axis(predictor: Predictor) -> None:
    x = samples(1)

    np.testing.assert_array_equal(predictor.infer(x[0]).logits, predictor.infer(x).logits)


def test_a_larger_tolerance_needs_fewer_iterations_and_zero_needs_all(predictor: Predictor) -> None:
    x = samples(4)

    loose, default, never = (predictor.infer(x, tol=tol).iterations for tol in (1e-1, None, 0.0))

    assert (loose < default).all()
    assert (never == 20).all()


def test_an_all_zero_sample_stops_at_a_zero_state_and_zero_tolerance_still_spends_all(predictor: Predictor) -> None:
    x = np.zeros((1, *SPEC.input_shape), dtype=np.float32)

    assert predictor.infer(x).iterations.tolist() == [1]
    assert predictor.infer(x, tol=0.0, budget=7).iterations.tolist() == [7]


def test_a_spoilt_sample_does_not_disturb_its_batch_mates(predictor: Predictor) -> None:
    clean = samples(5)
    spoilt = clean.copy()
    spoilt[2, 1, 4] = np.nan
    good = [0, 1, 3, 4]

    before, after = predictor.infer(clean), predictor.infer(spoilt)

    np.testing.assert_array_equal(before.logits[good], after.logits[good])
    np.testing.assert_array_equal(before.iterations[good], after.iterations[good])
    assert after.iterations[2] == 20
    assert after.residual[2] == np.inf
    assert after.labels[2] == "?"


def test_answers_do_not_depend_on_the_batch(predictor: Predictor) -> None:
    x = samples(8)

    together, alone = predictor.infer(x), [predictor.infer(row) for row in x]

    np.testing.assert_allclose(together.logits, np.concatenate([one.logits for one in alone]), atol=1e-6)
    assert together.iterations.tolist() == [int(one.iterations[0]) for one in alone]


def test_a_trip_count_below_one_counts_as_one(model: Path) -> None:
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])

    for most in (0, -3):
        feeds = {"x": samples(2), "tol": np.array(1e-9, np.float32), "max_iter": np.array(most)}
        (iterations,) = session.run(["iterations"], feeds)
        np.testing.assert_array_equal(iterations, [1, 1])


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda p: p.infer(np.zeros((2, 3, 17))), DataError, r"x has shape \(2, 3, 17\), expected .*\(batch, 3, 16\)"),
        (lambda p: p.infer(np.zeros((0, 3, 16))), DataError, r"x has shape \(0, 3, 16\)"),
        (lambda p: p.infer(np.zeros(())), DataError, "expected float32 of shape"),
        (lambda p: p.infer([["a"]]), DataError, "cannot be read as numbers"),
        (lambda p: p.infer(samples(1), budget=0), ConfigError, "budget 0 must be at least 1"),
        (lambda p: p.infer(samples(1), budget=1 << 70), ConfigError, "at most 10000"),
        (lambda p: p.infer(samples(1), tol=float("nan")), ConfigError, "tol nan"),
        (lambda p: p.infer(samples(1), tol=float("inf")), ConfigError, "tol inf at least 0 and at most"),
    ],
)
def test_input_that_does_not_fit_is_named_in_one_line(
    predictor: Predictor, ask: Callable[[Predictor], object], error: type[FedEqError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        ask(predictor)

    assert "\n" not in str(caught.value)


def test_files_that_are_no_models_of_ours_are_refused(tmp_path: Path, model: Path) -> None:
    damaged, foreign, newer = tmp_path / "damaged.onnx", tmp_path / "foreign.onnx", tmp_path / "newer.onnx"
    damaged.write_bytes(model.read_bytes()[:100])
    proto = onnx.load(model)
    onnx.helper.set_model_props(proto, {"fedeq.schema_version": "2.3"})
    newer.write_bytes(proto.SerializeToString())
    del proto.metadata_props[:]
    foreign.write_bytes(proto.SerializeToString())

    for path, message in (
        (tmp_path / "none.onnx", "no such file"),
        (damaged, "cannot load it"),
        (foreign, "not written by fedeq-edge"),
        (newer, "schema version 2.3, this program reads 1; update"),
    ):
        with pytest.raises(ExportError, match=message) as caught:
            Predictor(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_operator_that_onnxruntime_lacks_is_named_and_not_called_damage(tmp_path: Path, model: Path) -> None:
    proto = onnx.load(model)
    proto.opset_import.append(onnx.helper.make_opsetid("vendor", 1))
    proto.graph.node[0].domain = "vendor"
    path = tmp_path / "vendor.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match=r"vendor:.*; export it with fedeq model export") as caught:
        Predictor(path)
    assert "truncated" not in str(caught.value)


def test_a_file_of_ours_that_gives_no_answers_is_refused_before_it_is_asked(tmp_path: Path, model: Path) -> None:
    proto = onnx.load(model)
    del proto.graph.output[1]
    path = tmp_path / "silent.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match=r"silent\.onnx: has inputs .* and outputs \['logits', 'residual'\]"):
        Predictor(path)


@pytest.mark.parametrize("ask", [Predictor, describe], ids=["Predictor", "describe"])
@pytest.mark.parametrize(
    ("opset", "ir_version", "schema", "message"),
    [
        (
            99,
            8,
            "1",
            "in opset 99 and IR version 8, newer than onnxruntime .* reads; update it, or export with opset 18",
        ),
        (18, 99, "1", "in opset 18 and IR version 99, newer than onnxruntime .* reads; update it"),
        (99, 99, "2.0", "schema version 2.0, this program reads 1; update fedeq-edge"),
    ],
)
def test_a_file_in_a_newer_format_says_what_to_update(
    opset: int,
    ir_version: int,
    schema: str,
    message: str,
    ask: Callable[[Path], object],
    model: Path,
    tmp_path: Path,
) -> None:
    proto = onnx.load(model)
    proto.opset_import[0].version, proto.ir_version = opset, ir_version
    told = {entry.key: entry.value for entry in proto.metadata_props}
    onnx.helper.set_model_props(proto, told | {"fedeq.schema_version": schema})
    (tmp_path / "newer.onnx").write_bytes(proto.SerializeToString())

    with pytest.raises(ExportError, match=message) as caught:
        ask(tmp_path / "newer.onnx")

    assert str(caught.value).startswith(str(tmp_path / "newer.onnx"))
    assert "\n" not in str(caught.value)


WATCH_THE_IMPORT = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print(os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.meta_path.insert(0, Watch())
import fedeq_edge.onnx.runtime
"""


@pytest.mark.parametrize(("chosen", "seen"), [({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")])
def test_telemetry_is_off_before_onnxruntime_loads_unless_the_user_decided(chosen: dict[str, str], seen: str) -> None:
    assert python("-c", WATCH_THE_IMPORT, **chosen).stdout.split() == [seen]


WATCH_THE_PROCESS = """
import os, sys
from pathlib import Path
import numpy
from fedeq_edge.onnx.runtime import Predictor
Predictor(Path(sys.argv[1])).infer(numpy.zeros((1, 3, 16)))
fds = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
print(sum(os.readlink(path).startswith("socket:") for path in fds))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="sockets are counted in /proc")
def test_answering_opens_no_socket_and_leaves_no_device_id(model: Path, tmp_path: Path) -> None:
    """onnxruntime 1.31 left alone writes .cache/Microsoft/DeveloperTools/.onnxruntime/deviceid on its import."""
    done = python("-c", WATCH_THE_PROCESS, str(model), HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache"))

    assert done.stdout.split() == ["0"], done.stderr
    assert list(tmp_path.iterdir()) == []


def test_one_module_of_the_package_imports_onnxruntime() -> None:
    importers = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "fedeq_edge").rglob("*.py")
        if re.search(r"^\s*(import|from) onnxruntime", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]

    assert importers == ["fedeq_edge/onnx/session.py"]


def test_predicting_loads_neither_torch_nor_onnx_nor_msgspec(model: Path) -> None:
    code = (
        "import sys, numpy; from pathlib import Path; from fedeq_edge.onnx.runtime import Predictor;"
        f"print(Predictor(Path({str(model)!r})).infer(numpy.zeros((1, 3, 16))).labels);"
        "print(sorted({'torch', 'onnx', 'msgspec'} & set(sys.modules)))"
    )

    assert python("-c", code).stdout.splitlines()[-1] == "[]"


def test_the_runner_that_travels_without_us_answers_alike(model: Path, predictor: Predictor, tmp_path: Path) -> None:
    x = samples(3)
    x[1, 0, 0] = np.inf
    x[1, 0, 1] = -np.inf
    np.save(tmp_path / "x.npy", x)
    runner = folder("export") / "onnxruntime" / "run.py"

    done = python(str(runner), str(model), str(tmp_path / "x.npy"), "--max-iter", "9")

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    expected = predictor.infer(x, budget=9)
    assert [line["iterations"] for line in lines] == expected.iterations.tolist()
    assert [line["label"] for line in lines] == [None if name == "?" else name for name in expected.labels]
    assert done.returncode == 0


def test_the_runner_takes_an_unrolled_file(tmp_path: Path) -> None:
    export(SPEC, *initial(SPEC, 0), tmp_path / "flat.onnx", budget=4, recipe="unrolled")
    np.save(tmp_path / "x.npy", samples(2))

    words = str(folder("export") / "onnxruntime" / "run.py"), str(tmp_path / "flat.onnx"), str(tmp_path / "x.npy")

    done, refused = python(*words, "--max-iter", "4"), python(*words, "--max-iter", "3")

    assert [json.loads(line)["iterations"] for line in done.stdout.splitlines()] == [4, 4]
    assert refused.returncode == 1
    assert refused.stderr == "run.py: unrolled for 4 iterations; leave out --max-iter and --tol\n"


def test_the_runner_names_what_does_not_fit(model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 4)))
    runner = folder("export") / "onnxruntime" / "run.py"

    done = python(str(runner), str(model), str(tmp_path / "x.npy"))

    assert done.returncode == 1
    assert done.stderr.splitlines() == ["run.py: samples have shape (4, 4), expected (batch, 3, 16)"]


def test_the_runner_says_that_a_training_graph_does_not_answer(tmp_path: Path) -> None:
    (tmp_path / "training.onnx").write_bytes(build_training(SPEC))
    np.save(tmp_path / "x.npy", samples(2))

    done = python(
        str(folder("export") / "onnxruntime" / "run.py"), str(tmp_path / "training.onnx"), str(tmp_path / "x.npy")
    )

    assert done.returncode == 1
    assert done.stderr.startswith("run.py: a training graph, which does not answer; ")
    assert done.stderr.count("\n") == 1

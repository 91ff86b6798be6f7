"""What a user gets wrong is one line on stderr that names it and the remedy; nothing is half-written."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from msgspec import to_builtins

from fedeq_edge import modelfile
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.storage import locked
from fedeq_edge.training.step import Budget

if TYPE_CHECKING:
    from tests.cli.conftest import Fedeq, Outcome


def _everything(place: Path) -> dict[str, bytes]:
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def _process(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Python with these arguments, as a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _one_line(told: "Outcome", status: int, pattern: str) -> None:
    assert told.status == status, told.err
    assert told.out == ""
    assert told.err.startswith("fedeq: ")
    assert told.err.count("\n") == 1, told.err
    assert re.search(pattern, told.err), told.err


def _write_agent(text: str) -> Callable[[Path], None]:
    def write(place: Path) -> None:
        (place / "agent.toml").write_text(text)

    return write


def _change(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Settings in which `old` reads `new`."""

    def change(place: Path) -> None:
        before = (place / name).read_text()
        assert old in before
        (place / name).write_text(before.replace(old, new))

    return change


def _data(name: str = "data.npz", **arrays: np.ndarray) -> Callable[[Path], None]:
    return lambda place: np.savez(place / name, **arrays)  # type: ignore[arg-type]  # numpy's own keyword comes first


X, Y = np.zeros((10, 6), np.float32), np.arange(10) % 2
WITH_NAN = X.copy()
WITH_NAN[3, 2] = np.nan
OBJECTS = np.array([[1, 2], None], dtype=object)
CLIENTS = np.arange(10) // 5
AGENT, AGGREGATOR = ("agent", "run"), ("aggregator", "run")
INSPECT, INSPECT_FLEET = ("data", "inspect", "data.npz"), ("data", "inspect", "fleet.npz", "--client", "client")
BENCH = ("model", "bench", "no.fedeq")
DEMO = ("demo", "--data", "fleet.npz", "--out", "out")


def _nothing(_place: Path) -> None:
    return None


@pytest.mark.parametrize(
    ("command", "spoil", "status", "pattern"),
    [
        ((*AGENT, "--config", "no.toml"), _nothing, 2, r"no\.toml does not exist.*--config"),
        (AGENT, _write_agent("device = \n"), 2, r"agent\.toml is not TOML.*line 1"),
        (AGENT, _change("agent.toml", "device =", "devcie ="), 2, "unknown key 'devcie'; did you mean 'device'"),
        (AGENT, _change("agent.toml", "url =", "ulr ="), 2, r"\[broker\]: unknown key 'ulr'; did you mean 'url'"),
        (AGENT, _change("agent.toml", 'device = "a"', 'device = "A/b"'), 2, "device 'A/b' cannot stand in a topic"),
        (AGENT, _change("agent.toml", 'device = "a"', "device = 1"), 2, r"agent\.toml.*[eE]xpected `str`"),
        (AGENT, _change("agent.toml", "mqtt://", "http://"), 2, "no broker address"),
        (AGENT, lambda place: (place / "data.npz").unlink(), 1, r"data\.npz: no such file"),
        (AGENT, _data(x=WITH_NAN, y=Y), 1, "NaN or infinity in 1 of 10 rows, first in row 3"),
        (AGENT, _data(x=OBJECTS, y=Y[:2]), 1, "Python objects, which could run code"),
        (AGENT, _data(x=X[:0], y=Y[:0]), 1, "no training rows"),
        (AGENT, lambda place: (place / "data.npz").write_bytes(b"PK\x03\x04 torn"), 1, "not a readable .npz"),
        ((*AGGREGATOR, "--config", "no.toml"), _nothing, 2, r"no\.toml does not exist"),
        (AGGREGATOR, _change("aggregator.toml", "rounds =", "ronds ="), 2, r"\[train\]: unknown key 'ronds'.*'rounds'"),
        (
            AGGREGATOR,
            _change("aggregator.toml", "[method]", '[method]\npreset = "amdm"'),
            2,
            "no method 'amdm'.*'admm'",
        ),
        (AGGREGATOR, _change("aggregator.toml", "[method]", "[method]\nroh = 1.0"), 2, "unknown key 'roh'.*'rho'"),
        (AGGREGATOR, _change("aggregator.toml", "fraction = 1.0", "fraction = 2.0"), 2, r"schedule\.fraction is 2\.0"),
        (AGGREGATOR, _change("aggregator.toml", "classes = 2", "classes = 1"), 2, "needs at least 2"),
        (AGGREGATOR, _change("aggregator.toml", "mqtt://", "mqtt:/"), 2, "no broker address"),
        (("aggregator", "status"), _nothing, 2, "holds no status"),
        (INSPECT, _data(x=OBJECTS, y=Y[:2]), 1, "Python objects"),
        (INSPECT, _data(x=X, y=Y[:4]), 1, "differ in length"),
        (INSPECT, _data(x=X, labels=Y), 1, "no array 'y'"),
        (INSPECT_FLEET, _data("fleet.npz", x=X, y=Y, client=np.arange(10)), 1, "client 0 has no test rows|mark some"),
        ((*INSPECT_FLEET, "--classes", "0-9"), _nothing, 1, "no sample has class 2"),
        (("data", "inspect", "no.npz"), _nothing, 1, "no such file"),
        (("broker", "run", "--kind", "rabbitmq"), _nothing, 2, "broker 'rabbitmq' is unknown; use auto"),
        (("broker", "run", "--kind", "mqtt://host"), _nothing, 2, "somebody else's broker"),
        ((*DEMO, "--broker", "rabbitmq"), _nothing, 2, "broker 'rabbitmq' is unknown; use auto"),
        ((*DEMO, "--broker", "mqtt://host:x"), _nothing, 2, "no broker address"),
        ((*DEMO, "--method", "amdm"), _nothing, 2, "no method 'amdm'.*'admm'"),
        ((*DEMO, "--clients", "9"), _nothing, 1, "9 clients asked for, it has 2"),
        ((*DEMO, "--x", "X"), _nothing, 1, "no array 'X', nearest is 'x'"),
        (DEMO, _data("fleet.npz", x=WITH_NAN, y=Y, client=CLIENTS), 1, "NaN or infinity"),
        (("device", "probe", "--model", "no.fedeq"), _nothing, 2, r"no\.fedeq does not exist"),
        (("model", "export", "no.fedeq"), _nothing, 2, r"no\.fedeq does not exist"),
        (("model", "inspect", "data.npz"), _nothing, 2, r"data\.npz is an \.npz or another archive, no model; name"),
        (("model", "inspect", "no.onnx"), _nothing, 1, r"no\.onnx"),
        (("model", "infer", "no.onnx", "data.npz"), _nothing, 1, r"no\.onnx"),
        (("model", "infer", "data.npz", "data.npz"), _nothing, 2, r"data\.npz is an \.npz"),
        (("model", "export", "agent.toml"), _nothing, 2, r"agent\.toml is no model; name a device's personal\.fedeq"),
        (("model", "bench", "."), _nothing, 2, r"\. is a folder; name"),
        (("model", "inspect", "nowhere"), _nothing, 2, r"nowhere does not exist; name"),
        (("model", "infer", "no.fedeq", "data.npz"), _nothing, 2, r"no\.fedeq does not exist"),
        ((*BENCH, "--budgets", "4..1"), _nothing, 2, r"'4\.\.1' is neither .* write for example 1\.\.32"),
        ((*BENCH, "--budgets", "0..3"), _nothing, 2, r"within 1 to 1000"),
        ((*BENCH, "--budgets", "1..1001"), _nothing, 2, r"within 1 to 1000"),
        ((*BENCH, "--budgets", "1,,2"), _nothing, 2, r"'' is neither"),
        ((*BENCH, "--budgets", "1-4"), _nothing, 2, r"'1-4' is neither"),
        ((*BENCH, "--budgets", "many"), _nothing, 2, r"'many' is neither"),
        ((*BENCH, "--out", "curve.png"), _nothing, 2, r"curve\.png: the curve is drawn as \.html or \.svg"),
        ((*BENCH, "--out", "nowhere/curve.svg"), _nothing, 2, "folder nowhere does not exist"),
        (BENCH, _nothing, 2, r"no\.fedeq does not exist"),
        (("model", "bench", "no.onnx"), _nothing, 1, r"no\.onnx: no such file; export a model"),
        (("device", "probe", "--accuracy", "0.1"), _nothing, 2, "name the model with --model"),
        (("device", "probe", "--energy-j", "5"), _nothing, 2, "name the model with --model"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(
    fedeq: "Fedeq",
    place: Path,
    command: tuple[str, ...],
    spoil: Callable[[Path], None],
    status: int,
    pattern: str,
) -> None:
    spoil(place)
    before, entries = _everything(place), sorted(place.iterdir())
    _one_line(fedeq(*command), status, pattern)
    assert _everything(place) == before
    assert sorted(place.iterdir()) == entries


def test_an_output_folder_of_an_earlier_run_is_left_alone(fedeq: "Fedeq", place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "summary.json").write_text("{}")
    _one_line(fedeq(*DEMO), 2, r"output folder out is not empty.*--out")
    assert [path.name for path in (place / "out").iterdir()] == ["summary.json"]


def test_an_output_folder_that_is_a_file_is_named(fedeq: "Fedeq", place: Path) -> None:
    _one_line(fedeq("demo", "--data", "fleet.npz", "--out", "data.npz"), 2, "output folder data.npz cannot be made")


@pytest.mark.broker
@pytest.mark.usefixtures("_mosquitto_installed")
def test_a_port_in_use_is_named(fedeq: "Fedeq", place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        _one_line(fedeq("broker", "run", "--port", str(port)), 2, f"port {port} on 127.0.0.1 is in use.*--port")


def test_an_aggregators_state_folder_in_use_is_named(fedeq: "Fedeq", place: Path) -> None:
    with locked(place / "state"):
        _one_line(fedeq(*AGGREGATOR), 1, "state folder .* is in use by another process")


@pytest.mark.parametrize(
    ("changes", "status", "pattern"),
    [
        ("", 1, "state folder .* is in use by another process"),
        ('profile = "raspberry-pi-44"', 2, "did you mean 'raspberry-pi-4'"),
        ("emulate = true", 2, "needs a profile"),
    ],
)
def test_what_the_link_process_finds_is_one_line_too(place: Path, changes: str, status: int, pattern: str) -> None:
    config = place / "agent.toml"
    name = changes.partition(" =")[0] or "#"
    kept = [line for line in config.read_text().splitlines() if not line.startswith(name)]
    config.write_text("\n".join([changes, *kept]))
    with locked(place / "state"):
        told = _process("-m", "fedeq_edge", "agent", "run")
    assert told.returncode == status, told.stderr
    assert re.fullmatch(f"fedeq: .*{pattern}.*\n", told.stderr), told.stderr


@pytest.mark.parametrize(
    ("package", "extra", "arguments"),
    [
        ("torch", "torch", ["model", "export", "no.fedeq"]),
        ("onnxruntime", "device", ["model", "infer", "no.onnx", "data.npz"]),
    ],
)
def test_an_optional_package_that_is_missing_is_named_with_its_extra(
    place: Path, package: str, extra: str, arguments: list[str]
) -> None:
    program = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv[0] = 'fedeq'; from fedeq_edge.cli import main; main()"
    )
    told = _process("-c", program, *arguments)
    assert told.returncode == 1
    assert told.stderr == f"fedeq: {package} is not installed; run pip install 'fedeq-edge[{extra}]'\n"


@pytest.mark.parametrize(
    ("package", "options", "status", "remedy"),
    [
        ("torch", [], 2, "run pip install 'fedeq-edge[torch]', or set backend = \"onnx\""),
        ("onnx", ["--backend", "onnx"], 1, "run pip install 'fedeq-edge[onnx]'"),
        ("onnxruntime", ["--backend", "onnx"], 1, "run pip install 'fedeq-edge[device]'"),
    ],
)
def test_a_probe_without_its_backend_names_the_package_and_the_way_out(
    place: Path, package: str, options: list[str], status: int, remedy: str
) -> None:
    spec = ModelSpec(input_shape=(6,), classes=2, channels=8)
    theta, head = initial(spec, 0)
    model = modelfile.ModelFile(model=to_builtins(spec), theta=theta, head=head, budget=Budget(forward=4, adjoint=2))
    modelfile.write(place / "a.fedeq", model)
    program = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv[0] = 'fedeq'; from fedeq_edge.cli import main; main()"
    )
    told = _process("-c", program, "device", "probe", "--model", "a.fedeq", *options)
    assert told.returncode == status, told.stderr
    assert re.fullmatch(f"fedeq: .*not installed; {re.escape(remedy)}\n", told.stderr), told.stderr


def test_a_broken_environment_variable_is_refused_like_the_file(
    fedeq: "Fedeq", place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDEQ_BROKER__ULR", json.dumps("mqtt://host"))
    _one_line(fedeq(*AGGREGATOR), 2, "unknown key 'ulr'; did you mean 'url'")

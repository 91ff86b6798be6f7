"""The example that `python -m fedeq_edge.flower DIR` copies: on our in-process engine, and on Flower's own."""

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import psutil
import pytest

pytest.importorskip(
    "flwr", reason="Flower needs an environment of its own, as it wants an older protobuf than constraints.txt has"
)
pytest.importorskip("sklearn", reason="the example's digits come with fedeq-edge[demo]")

from flwr.app import Context, RecordDict

from fedeq_edge.flower.__main__ import main as copy_example
from fedeq_edge.transport.broker import free_port
from tests.flower.in_process import RUN_ID, InProcessGrid, partitions

# pyright: reportMissingImports=false
# Flower is not in the environment in which types are checked (pyproject.toml, flower).

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def app(tmp_path: Path) -> Path:
    assert copy_example([str(tmp_path / "app")]) == 0
    return tmp_path / "app"


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_devices_learn_digits(app: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digits = loaded(app / "digits.py")
    context = Context(run_id=RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config={})
    digits.server(InProcessGrid(digits.client, partitions(4)), context)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("client-")]
    assert len(lines) == 4
    accuracies = [float(line.split("personal model ")[1].split("%")[0]) for line in lines]
    assert sum(accuracies) / 4 > 90.0


def test_the_command_that_it_names_runs_on_flowers_engine(app: Path, tmp_path: Path) -> None:
    flwr = Path(sys.executable).with_name("flwr")
    environment = {
        **os.environ,
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{flwr.parent}:{os.environ['PATH']}",
    }
    with nothing_left(environment):
        done = subprocess.run(
            [flwr, "run", app, "--federation-config", "num-supernodes=3", "--stream"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=True,
        )
    assert done.stdout.count("personal model") == 3, done.stdout + done.stderr


@contextlib.contextmanager
def nothing_left(environment: Mapping[str, str]) -> Iterator[None]:
    """`flwr run` leaves a SuperLink behind, and that its helpers: those with this home are ended."""
    try:
        yield
    finally:
        found = list(_at_home(environment["FLWR_HOME"]))
        for process in found:
            process.kill()
        psutil.wait_procs(found, timeout=10.0)


def _at_home(home: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FLWR_HOME") == home:
                yield process

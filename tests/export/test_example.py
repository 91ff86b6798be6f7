"""The stored example, the Python runner, and what must never be in the files that run in a browser."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedeq_edge.onnx.runtime import Predictor
from tests.export.others import newer_model

EXPORT = Path(__file__).parents[2] / "export"
EXAMPLE = EXPORT / "example"
WEB = sorted(path for path in (EXPORT / "web").iterdir() if path.suffix in {".html", ".css", ".mjs"})


def test_the_stored_model_gives_the_stored_answers() -> None:
    found = Predictor(EXAMPLE / "model.onnx").infer(np.load(EXAMPLE / "samples.npy"))
    np.testing.assert_allclose(found.logits, np.load(EXAMPLE / "logits.npy"), rtol=0.0, atol=1e-5)
    assert found.iterations.tolist() == np.load(EXAMPLE / "iterations.npy").tolist()
    assert found.labels == tuple("0123456789")


def test_the_example_is_small() -> None:
    assert sum(path.stat().st_size for path in EXAMPLE.glob("*.[no]*")) < 20_000


def run_python(home: Path, *words: str, model: str = "model.onnx") -> subprocess.CompletedProcess[str]:
    """The Python runner over the example, with the user's folders in `home`."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    command = [sys.executable, str(EXPORT / "onnxruntime" / "run.py"), model, "samples.npy", *words]
    return subprocess.run(
        command, cwd=EXAMPLE, capture_output=True, text=True, check=False, env={**environment, "HOME": str(home)}
    )


def test_the_python_runner_agrees_with_the_stored_answers_and_reports_to_nobody(tmp_path: Path) -> None:
    done = run_python(tmp_path, "--check", "logits.npy")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["label"] for answer in answers] == list("0123456789")
    assert [answer["iterations"] for answer in answers] == np.load(EXAMPLE / "iterations.npy").tolist()
    assert list(tmp_path.iterdir()) == []  # onnxruntime with telemetry leaves a device id


def test_the_python_runner_says_when_answers_are_others(tmp_path: Path) -> None:
    done = run_python(tmp_path, "--max-iter", "1", "--tol", "0", "--check", "logits.npy")
    assert done.returncode == 1
    assert done.stderr.startswith("largest difference from the stored logits: ")
    assert run_python(tmp_path, "--check", "iterations.npy").stderr.count("\n") == 1


def test_the_python_runner_answers_with_no_newer_file(tmp_path: Path) -> None:
    done = run_python(tmp_path, model=newer_model(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "run.py: the model has schema version 2.0, this runner reads 1; take a newer one\n"


@pytest.mark.parametrize("path", WEB, ids=lambda path: path.name)
def test_a_file_of_the_page_asks_no_other_host_and_makes_no_markup_of_texts(path: Path) -> None:
    text = path.read_text()
    hosts = set(re.findall(r"\bhttps?://([^/\"'`\s:$]+)", text))
    assert hosts <= {"127.0.0.1", "localhost", "www.w3.org"}  # the last one names SVG, and is not asked
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)


def test_the_page_allows_itself_nothing_from_elsewhere() -> None:
    page = (EXPORT / "web" / "index.html").read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == "'self' 'wasm-unsafe-eval'"
    assert rules["connect-src"] == "'self'"


@pytest.mark.parametrize("folder", ["node", "web"])
def test_packages_are_pinned_and_no_registry_is_named(folder: str) -> None:
    versions = json.loads((EXPORT / folder / "package.json").read_text())["dependencies"].values()
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in versions)
    assert "package-lock=false" in (EXPORT / folder / ".npmrc").read_text()

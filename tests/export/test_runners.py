"""Every runner of export/ started as its README says and compared with the stored answers: make test-runners.

Packages come once into build/runners (for the browser 140 MB, node 290 MB, C++ 150 MB); where npm, a browser
or a compiler is missing, or the registry cannot be reached, its test is skipped and says so.
"""

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.export.others import newer_model, other_model, unrolled_model

pytestmark = [pytest.mark.runners, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "runners"
EXAMPLE = BUILD / "export" / "example"
CHECK = ["../example/model.onnx", "../example/samples.npy", "--check", "../example/logits.npy"]
# Headers of onnxruntime's C++ API together with a library; the registries that tests may use hold no other.
CPP_PACKAGE = "com.github.asus4.onnxruntime@0.4.9"
CPP_HEADERS = "Plugins/iOS~/onnxruntime.xcframework/ios-arm64/onnxruntime.framework/Headers"
INSTALL_S, RUN_S = 600.0, 300.0
NO_MARKUP = "<img src=x onerror=alert(1)>"


def needed(*names: str) -> str:
    """The path of the first of these programs, or the test is skipped."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"{names[0]} is not installed")
    return found


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command in a home of its own, without anything that would silence onnxruntime."""
    home = BUILD / "home"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    environment = {**kept, "HOME": str(home)}
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False, timeout=RUN_S, env=environment)


def silent() -> bool:
    """Whether the last run left no device id behind."""
    return not any((BUILD / "home").rglob("deviceid"))


@pytest.fixture(scope="module", autouse=True)
def _copied() -> None:
    """The folder as it is now, beside what was installed for it before."""
    for name in ("cpp", "example", "node", "web"):
        ours = shutil.ignore_patterns("node_modules")
        shutil.copytree(ROOT / "export" / name, BUILD / "export" / name, ignore=ours, dirs_exist_ok=True)


def npm(*words: str, cwd: Path) -> None:
    """An npm command has succeeded, or the test is skipped."""
    command = [needed("npm"), *words, "--no-audit", "--no-fund"]
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=INSTALL_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm {words[0]} did not come to an end in {INSTALL_S:.0f} s")
    if done.returncode:
        pytest.skip(f"npm {' '.join(words)} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def installed(folder: str) -> Path:
    """The runner's folder with its packages, at the version that it names."""
    here = BUILD / "export" / folder
    for name, version in json.loads((here / "package.json").read_text())["dependencies"].items():
        manifest = here / "node_modules" / name / "package.json"
        if not manifest.exists() or json.loads(manifest.read_text())["version"] != version:
            npm("install", cwd=here)
    return here


def check_answers(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["label"] for answer in answers] == list("0123456789")
    assert [answer["iterations"] for answer in answers] == np.load(EXAMPLE / "iterations.npy").tolist()
    assert done.stderr.startswith("largest difference from the stored logits: ")
    assert silent()


def check_refusals(*command: str, cwd: Path) -> None:
    """Wrong use ends with status 1 and one line."""
    for words in (CHECK[:1], [CHECK[0], CHECK[0]], [CHECK[1], CHECK[1]], [*CHECK[:2], "--tol", "low"]):
        done = run(*command, *words, cwd=cwd)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    done = run(*command, newer_model(BUILD), CHECK[1], cwd=cwd)
    assert (done.returncode, done.stdout) == (1, "")
    assert "the model has schema version 2.0, this runner reads 1" in done.stderr
    for model, options, reason in (
        (other_model(BUILD, {"fedeq.kind": "training"}), (), "a training graph, which does not answer"),
        (unrolled_model(BUILD), ("--max-iter", "3"), "unrolled for 4 iterations; leave out "),
    ):
        done = run(*command, model, CHECK[1], *options, cwd=cwd)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
        assert reason in done.stderr
    assert run(*command, unrolled_model(BUILD), CHECK[1], cwd=cwd).stdout.count('"iterations":') == 10
    assert run(*command, *CHECK, "--max-iter", "1", cwd=cwd).returncode == 1  # other answers than the stored ones


def test_the_example_can_be_made_again(tmp_path: Path) -> None:
    done = run(sys.executable, str(ROOT / "export" / "example" / "make.py"), str(tmp_path), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    told = re.search(r"test images: (0\.\d+)", done.stdout)
    assert told is not None
    assert float(told[1]) > 0.96
    assert np.array_equal(np.load(tmp_path / "samples.npy"), np.load(EXAMPLE / "samples.npy"))


def test_node_gives_the_stored_answers() -> None:
    node = needed("node")
    here = installed("node")
    check_answers(run(node, "run.mjs", *CHECK, cwd=here))
    check_refusals(node, "run.mjs", cwd=here)


def onnxruntime_for_cpp() -> tuple[Path, Path]:
    """Folders of the headers and of the library."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("the C++ library that npm offers is for Linux on x86-64")
    folder = BUILD / "onnxruntime"
    if not (folder / "package" / "package.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        npm("pack", CPP_PACKAGE, cwd=folder)
        (archive,) = folder.glob("*.tgz")
        with tarfile.open(archive) as package:
            wanted = [one for one in package if "/Linux/x64/" in one.name or "/ios-arm64/" in one.name]
            package.extractall(folder, [*wanted, package.getmember("package/package.json")], filter="data")
        archive.unlink()
    library = folder / "package" / "Plugins" / "Linux" / "x64"
    with contextlib.suppress(FileExistsError):  # the name under which a release has it, and the linker looks for it
        (library / "libonnxruntime.so.1").symlink_to("libonnxruntime.so")
    return folder / "package" / CPP_HEADERS, library


def test_cpp_gives_the_stored_answers() -> None:
    compiler = needed("g++", "clang++")
    headers, library = onnxruntime_for_cpp()
    here = BUILD / "export" / "cpp"
    linked = [f"-L{library}", f"-Wl,-rpath,{library}", "-lonnxruntime", "-o", "run"]
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror"]
    built = run(compiler, *flags, "run.cpp", f"-isystem{headers}", *linked, cwd=here)
    assert built.returncode == 0, built.stderr
    check_answers(run("./run", *CHECK, cwd=here))
    check_refusals("./run", cwd=here)


@contextlib.contextmanager
def served(export: Path) -> Iterator[str]:
    """The address of the page, served by its own server."""
    with subprocess.Popen(
        [needed("node"), "serve.mjs", "0"], cwd=export / "web", stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.terminate()


def opened(address: str) -> str:
    """The page after its scripts have come to rest, in a browser that reaches no other host than this one."""
    browser = needed("chromium", "chromium-browser", "google-chrome")
    flags = ["--headless", "--disable-gpu", "--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    profile = f"--user-data-dir={BUILD / 'home' / 'browser'}"
    done = run(browser, *flags, profile, "--virtual-time-budget=60000", "--dump-dom", address, cwd=BUILD)
    assert done.returncode == 0, done.stderr
    return done.stdout


def text_of(page: str, element: str) -> str:
    found = re.search(rf'id="{element}"[^>]*>([^<]*)<', page)
    assert found is not None, page
    return found[1]


def test_the_page_gives_the_stored_answers_and_shows_the_solve() -> None:
    installed("web")
    with served(BUILD / "export") as address:
        page = opened(address)
    assert 'data-state="agrees"' in page, text_of(page, "told") + text_of(page, "check")
    assert "This browser gives the stored answers" in text_of(page, "check")
    assert text_of(page, "told").startswith("After 1 evaluation: “2” with ")
    assert page.count('class="dot') == 30
    assert page.count("<meter") == 10


def test_labels_of_a_hostile_model_stay_text(tmp_path: Path) -> None:
    web = installed("web")
    shutil.copytree(BUILD / "export" / "example", tmp_path / "example")
    shutil.copytree(web, tmp_path / "web", symlinks=True, ignore=shutil.ignore_patterns("node_modules"))
    (tmp_path / "web" / "node_modules").symlink_to(web / "node_modules")
    model = onnx.load(tmp_path / "example" / "model.onnx")
    entries = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**entries, "fedeq.labels": json.dumps([NO_MARKUP] * 10)})
    onnx.save(model, tmp_path / "example" / "model.onnx")
    with served(tmp_path) as address:
        page = opened(address)
    assert 'data-state="agrees"' in page
    assert "<img" not in page
    assert "&lt;img src=x" in page


def test_the_pages_server_gives_nothing_but_the_folder() -> None:
    with served(BUILD / "export") as address:
        assert address.startswith("http://127.0.0.1:")
        host = address.removesuffix("/web/")
        curl = [needed("curl"), "--silent", "--path-as-is", "--output", "-", "--write-out", "%{http_code}"]
        for path in ("/../../../../etc/passwd", "/%2e%2e/%2e%2e/pyproject.toml", "/..%2f..%2fpyproject.toml", "/web"):
            assert run(*curl, f"{host}{path}", cwd=BUILD).stdout == "not here\n404"
        assert run(*curl, f"{host}/", cwd=BUILD).stdout == "302"
        assert run(*curl, "-X", "POST", f"{host}/web/", cwd=BUILD).stdout == "not here\n404"

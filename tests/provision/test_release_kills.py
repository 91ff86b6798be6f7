"""Power cuts: release.py ends at every one of its steps, and by SIGKILL at random moments."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fedeq_edge.provision import release
from tests.provision import kill_everywhere
from tests.provision.release_board import FakeBoard, bundle, digest

Prepared = tuple[str, list[str]]


def _installing(health: str) -> Callable[[FakeBoard, Path], Prepared]:
    def prepare(board: FakeBoard, folder: Path) -> Prepared:
        board.install(bundle(folder, "v1"))
        path = bundle(folder, "v2", health)
        return "v1,v2", ["install", str(path), "--sha256", digest(path), "--trial-s", "0"]

    return prepare


def _first(board: FakeBoard, folder: Path) -> Prepared:
    path = bundle(folder, "v1")
    return ",v1", ["install", str(path), "--sha256", digest(path), "--trial-s", "0"]


def _fourth(board: FakeBoard, folder: Path) -> Prepared:
    for version in ("v1", "v2", "v3"):
        board.install(bundle(folder, version))
    path = bundle(folder, "v4")
    return "v3,v4", ["install", str(path), "--sha256", digest(path), "--trial-s", "0"]


def _mending(board: FakeBoard, folder: Path) -> Prepared:
    """What is damaged is not the current release, which would be damaged still when the mending is cut."""
    for version in ("v1", "v2"):
        board.install(bundle(folder, version))
    board.call("rollback", "--trial-s", "0")
    path = bundle(folder, "v3")
    board.install(path, "--no-start")
    board.call("rollback", "--no-start")
    board.wound("v3", "bin/fedeq")
    return "v1,v3", ["install", str(path), "--sha256", digest(path), "--trial-s", "0"]


def _rolling_back(board: FakeBoard, folder: Path) -> Prepared:
    for version in ("v1", "v2", "v3"):
        board.install(bundle(folder, version))
    return "v1,v2,v3", ["rollback", "--trial-s", "0"]


def _starting_the_third_time(board: FakeBoard, folder: Path) -> Prepared:
    board.install(bundle(folder, "v1"))
    board.install(bundle(folder, "v2"), "--no-start")
    for _ in range(2):
        board.call("boot")
    return "v1,v2", ["boot"]


@pytest.mark.parametrize(
    ("prepare", "least"),
    [
        (_first, 25),
        (_installing("ok"), 25),
        (_installing("broken"), 30),
        (_fourth, 30),
        (_mending, 30),
        (_rolling_back, 8),
        (_starting_the_third_time, 8),
    ],
    ids=["first", "update", "broken update", "fourth", "mending", "rollback", "third start"],
)
def test_a_cut_at_any_step_leaves_a_complete_release(
    prepare: Callable[[FakeBoard, Path], Prepared], least: int, tmp_path: Path, memory: Path
) -> None:
    board = FakeBoard(tmp_path)
    versions, command = prepare(board, tmp_path)
    with tempfile.TemporaryDirectory(dir=memory) as work:
        ended = subprocess.run(
            [sys.executable, kill_everywhere.__file__, board.root, work, versions, *command],
            env={**os.environ, **board.environment, "PYTHONPATH": str(Path(release.__file__).parents[2])},
            stdout=subprocess.PIPE,
            check=True,
            timeout=200,
        )
    found = json.loads(ended.stdout)
    assert len(found) >= least
    assert {f"{number} {step}": complaints for number, (step, complaints) in enumerate(found) if complaints} == {}


def test_twenty_kills_at_random_moments_leave_twenty_running_releases(tmp_path: Path) -> None:
    board = FakeBoard(tmp_path)
    rng = random.Random(5)
    blocks = [rng.randbytes(1 << 19) for _ in range(4)]
    old = bundle(tmp_path, "v1")
    new = bundle(tmp_path, "v2", ballast=[block[number:] for number in range(4) for block in blocks])
    board.install(old)
    template = tmp_path / "template"
    shutil.copytree(board.root, template, symlinks=True)
    install = board.command("install", new, "--sha256", digest(new), "--trial-s", "0")

    started = time.monotonic()
    subprocess.run(install, env=board.environment, check=True, stdout=subprocess.DEVNULL)
    whole_s = time.monotonic() - started
    seen = set()
    for _ in range(20):
        shutil.rmtree(board.root)
        shutil.copytree(template, board.root, symlinks=True)
        process = subprocess.Popen(install, env=board.environment, stdout=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(0.0, whole_s))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert board.call("boot")[0] == 0
        assert board.runs() in ("v1", "v2")
        assert kill_everywhere.wrong(board.root, {"v1", "v2"}, swept=False) == []
        seen.add(tuple(sorted(name.split("-")[0] for name in board.releases())))
    assert len(seen) > 1  # some came in the midst of it
    assert board.install(new)[0] == 0
    assert (board.runs(), board.releases()) == ("v2", {"v1", "v2"})

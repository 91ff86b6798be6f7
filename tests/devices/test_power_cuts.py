"""Power that goes at any moment of an installation leaves a board that comes up with a whole release and runs it."""

import contextlib
import hashlib
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from fedeq_edge.provision.archive import read_manifest
from tests.conftest import until
from tests.devices.board import Board
from tests.devices.conftest import MakeBoard
from tests.devices.gateway import Gateway, some_data
from tests.devices.releases import LATER, RELEASE, connected, state, variant
from tests.devices.sites import Site

pytestmark = pytest.mark.devices

_random = random.Random(5)
MOMENTS = [_random.random() for _ in range(20)]  # as parts of the time that an installation takes
START_S = 120.0


@pytest.fixture(scope="module")
def pair(gateway: Gateway) -> dict[str, Path]:
    """Two good bundles by their versions."""
    first = gateway.bundle("x86-64")
    bundles = (first, variant(first, gateway.fleet, LATER))
    return {read_manifest(bundle).version: bundle for bundle in bundles}


@pytest.fixture(scope="module")
def enrolled(
    gateway: Gateway, make_board: MakeBoard, pair: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Board:
    """A board that runs the first, has the second's file, and is part of the fleet."""
    board = make_board("box-03")
    board.boot()
    gateway.add(board.name, "x86-64")
    data = some_data(tmp_path_factory.mktemp("data") / "data.npz")
    done = gateway.flash(board, next(iter(pair.values())), "--data", str(data))
    assert done.returncode == 0, done.stderr
    for version, bundle in pair.items():
        shutil.copy(bundle, board.root / "root" / version)
    return board


def installing(board: Board, site: Site, pair: dict[str, Path]) -> subprocess.Popen[bytes]:
    """An installation, just begun, of the release that is not current; nothing of it is there before."""
    current = state(board)["current"]
    board.ssh(f"cd /opt/fedeq-edge/releases && find . -mindepth 1 -maxdepth 1 ! -name '{current}' -exec rm -rf {{}} +")
    (other,) = set(pair) - {current}
    digest = hashlib.sha256(pair[other].read_bytes()).hexdigest()
    command = f"{RELEASE} install /root/{other} --sha256 {digest} --key /opt/fedeq-edge/bundle.pub"
    return site.start(["ssh", "-F", str(board.ssh_config), board.name, command], board.home / "install.log")


def whole(board: Board) -> bool:
    """Whether `current` shows a release of which every byte is what its manifest says."""
    check = (
        "import hashlib, json, pathlib; top = pathlib.Path('/opt/fedeq-edge/current');"
        "files = json.loads((top / 'manifest.json').read_bytes())['files'].items();"
        "print(all(hashlib.sha256((top / name).read_bytes()).hexdigest() == entry['sha256'] for name, entry in files))"
    )
    return board.says(f'python3 -c "{check}"') == "True"


@pytest.fixture(scope="module")
def lasts_s(enrolled: Board, site: Site, pair: dict[str, Path]) -> float:
    """How long an installation takes here."""
    began = time.monotonic()
    assert installing(enrolled, site, pair).wait(START_S) == 0, (enrolled.home / "install.log").read_text()
    return time.monotonic() - began


@pytest.mark.parametrize("moment", MOMENTS, ids="{:.3f}".format)
def test_a_whole_release_runs_after_a_power_cut(
    moment: float, lasts_s: float, enrolled: Board, site: Site, pair: dict[str, Path]
) -> None:
    installer = installing(enrolled, site, pair)
    with contextlib.suppress(subprocess.TimeoutExpired):
        installer.wait(moment * lasts_s)
    enrolled.cut_power()
    installer.wait(START_S)
    enrolled.boot()
    until(lambda: connected(enrolled), "the agent answers after the power cut", START_S)
    assert state(enrolled)["current"] in pair
    assert whole(enrolled)

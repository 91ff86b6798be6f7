"""A board whose clock stands in 1970 joins and is updated; what would have to judge dates refuses it, and it runs on.

It is flashed as a mounted root. The tests share it and come in the order of its life.
"""

import json
from pathlib import Path

import pytest

from fedeq_edge.errors import Exit
from tests.conftest import until
from tests.devices import clocks
from tests.devices.board import Board
from tests.devices.conftest import MakeBoard
from tests.devices.gateway import IDENTITY, Gateway, some_data
from tests.devices.releases import LATER, runs, variant
from tests.devices.updates import UPDATER, ask_often, update, wait_for_report

pytestmark = pytest.mark.devices

WAIT_S = 120.0
A_DAY_S = 86_400


@pytest.fixture(scope="module")
def first(gateway: Gateway) -> Path:
    """A bundle for x86-64 boards."""
    return gateway.bundle("x86-64")


@pytest.fixture(scope="module")
def off(make_board: MakeBoard, gateway: Gateway, first: Path, tmp_path_factory: pytest.TempPathFactory) -> Board:
    """A board without a clock that was flashed and has not booted."""
    if why := clocks.missing():
        pytest.skip(why)
    made = make_board("box-07")
    clocks.stand_in_1970(made)
    gateway.add(made.name, "x86-64")
    data = some_data(tmp_path_factory.mktemp("data") / "data.npz")
    done = gateway.flash_root(made, first, "--data", str(data))
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="module")
def clockless(off: Board) -> Board:
    """The same, booted."""
    off.boot()
    return off


def test_it_enrols_at_its_first_boot_and_is_heard(clockless: Board, gateway: Gateway, first: Path) -> None:
    until(lambda: runs(clockless, first), "the agent is connected to its broker", WAIT_S)
    wait_for_report(gateway, clockless, WAIT_S)
    assert clockless.says("date +%Y; python3 -c 'import time; print(time.gmtime().tm_year)'").split() == ["1970"] * 2
    said = json.loads(clockless.says("journalctl --unit fedeq-agent --output cat | grep -m 1 '\"at\"'"))
    assert said["at"] < A_DAY_S


def test_it_is_not_flashed_over_ssh_before_its_clock_is_set(clockless: Board, gateway: Gateway, first: Path) -> None:
    later = variant(first, gateway.fleet, LATER)
    before = clockless.says(f"sha256sum {IDENTITY}/*; systemctl show --property=MainPID fedeq-agent")
    done = gateway.flash(clockless, later)
    assert done.returncode == Exit.CLOCK, done.stderr
    (said,) = done.stderr.strip().splitlines()
    assert "its clock says 1970-01-01" in said
    assert "timedatectl set-ntp true" in said
    assert clockless.says(f"sha256sum {IDENTITY}/*; systemctl show --property=MainPID fedeq-agent") == before
    assert runs(clockless, first)


def test_it_is_updated_over_the_air(clockless: Board, gateway: Gateway, first: Path) -> None:
    ask_often(clockless)
    clockless.ssh(f"systemctl restart {UPDATER}")
    later = variant(first, gateway.fleet, LATER)
    status, said = update(gateway, later, WAIT_S)
    assert (status, said["state"]) == (0, "done"), said
    until(lambda: runs(clockless, later), "the new release is connected")


def test_its_root_is_not_flashed_a_second_time_and_it_runs_what_it_ran(
    clockless: Board, gateway: Gateway, first: Path
) -> None:
    later = variant(first, gateway.fleet, LATER)
    before = clockless.says(f"sha256sum {IDENTITY}/*")
    clockless.cut_power()
    done = gateway.flash_root(clockless, first)
    assert done.returncode == Exit.BOOTED_CARD, done.stderr
    (said,) = done.stderr.strip().splitlines()
    assert "fedeq flash ssh://USER@HOST" in said
    clockless.boot()
    until(lambda: runs(clockless, later), "the agent is connected again", WAIT_S)
    assert clockless.says(f"sha256sum {IDENTITY}/*") == before

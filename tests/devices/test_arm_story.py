"""The same story on a Raspberry Pi 4 under qemu-user, with the wheels that such a board gets."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedeq_edge.errors import Exit
from tests.conftest import until
from tests.devices.board import Board
from tests.devices.gateway import Gateway, some_data
from tests.devices.releases import LATER, LATEST, broken, runs, variant
from tests.devices.updates import UPDATER, ask_often, update, wait_for_report

pytestmark = pytest.mark.devices

START_S = 180.0
WAVE_S = 600.0


@pytest.fixture(scope="module")
def first(gateway: Gateway) -> Path:
    """A bundle for a Pi 4."""
    return gateway.bundle("raspberry-pi-4")


@pytest.fixture(scope="module")
def flashed(
    gateway: Gateway, arm_board: Board, first: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The report of the Pi's first flash."""
    gateway.add(arm_board.name, "raspberry-pi-4")
    data = some_data(tmp_path_factory.mktemp("data") / "data.npz")
    done = gateway.flash(arm_board, first, "--data", str(data))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_one_command_brings_a_bare_pi_to_its_first_heartbeat(
    flashed: dict[str, Any], arm_board: Board, first: Path
) -> None:
    assert flashed["changed"]
    assert runs(arm_board, first)


def test_a_pi_goes_back_from_a_broken_release_and_on_to_a_good_one(
    flashed: dict[str, Any], gateway: Gateway, arm_board: Board, first: Path
) -> None:
    done = gateway.flash(arm_board, broken(first, gateway.fleet))
    assert done.returncode == Exit.ROLLED_BACK, done.stderr
    until(lambda: runs(arm_board, first), "the old release answers", START_S)

    later = variant(first, gateway.fleet, LATER)
    done = gateway.flash(arm_board, later)
    assert done.returncode == 0, done.stderr
    assert runs(arm_board, later)


def test_a_pi_updates_itself_and_goes_back_by_itself(
    flashed: dict[str, Any], gateway: Gateway, arm_board: Board, first: Path
) -> None:
    ask_often(arm_board)
    arm_board.ssh(f"systemctl restart {UPDATER}")
    wait_for_report(gateway, arm_board, START_S)
    latest = variant(first, gateway.fleet, LATEST)
    status, said = update(gateway, latest, WAVE_S)
    assert (status, said["state"]) == (0, "done"), said
    until(lambda: runs(arm_board, latest), "the new release is connected", START_S)

    status, said = update(gateway, broken(first, gateway.fleet), WAVE_S)
    assert (status, said["state"]) == (Exit.ROLLED_BACK, "rolled_back"), said
    assert "broken on purpose" in said["detail"]
    until(lambda: runs(arm_board, latest), "the release before it answers", START_S)

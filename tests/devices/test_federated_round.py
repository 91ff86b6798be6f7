"""A flashed board takes part in a federation: a real training step on an emulated Pi, through a real broker."""

from pathlib import Path

import pytest

from tests.conftest import until
from tests.devices.board import Board
from tests.devices.gateway import Gateway, some_data

pytestmark = pytest.mark.devices

ROUND_S = 400.0  # an emulated processor is ten times slower than the machine under it


@pytest.fixture(scope="module")
def trainer(gateway: Gateway, arm_board: Board, tmp_path_factory: pytest.TempPathFactory) -> Board:
    """A Pi 4 without torch, enrolled and connected."""
    gateway.add(arm_board.name, "raspberry-pi-4")
    data: Path = some_data(tmp_path_factory.mktemp("data") / "data.npz")
    done = gateway.flash(arm_board, gateway.bundle("raspberry-pi-4"), "--data", str(data))
    assert done.returncode == 0, done.stderr
    return arm_board


def test_a_flashed_pi_trains_one_round(gateway: Gateway, trainer: Board) -> None:
    gateway.start_aggregator(devices=1, rounds=1)
    until(lambda: bool(gateway.rounds()), "the round closes", ROUND_S)
    assert gateway.rounds()[0]["round"] == 1
    assert trainer.says("systemctl is-active fedeq-agent") == "active"

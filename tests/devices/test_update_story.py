"""Updates over the air on a board that runs systemd: the updater in its own unit, confined as it is shipped.

The tests of this module share one board and come in the order of its life.
"""

import json
from pathlib import Path

import pytest

from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import Exit
from fedeq_edge.onnx.export import export
from fedeq_edge.provision.archive import read_manifest
from tests.conftest import until
from tests.devices.board import Board
from tests.devices.gateway import Gateway, some_data
from tests.devices.releases import LATER, LATEST, broken, runs, state, variant
from tests.devices.updates import UPDATER, ask_often, update, wait_for_report

pytestmark = pytest.mark.devices

WAVE_S = 120.0
SPEC = ModelSpec(input_shape=(16,), classes=3, channels=8)


@pytest.fixture(scope="module")
def first(gateway: Gateway) -> Path:
    """A bundle for x86-64 boards."""
    return gateway.bundle("x86-64")


@pytest.fixture(scope="module")
def flashed(gateway: Gateway, board: Board, first: Path, tmp_path_factory: pytest.TempPathFactory) -> Board:
    """A board that asks the fleet often."""
    gateway.add(board.name, "x86-64")
    data = some_data(tmp_path_factory.mktemp("data") / "data.npz")
    done = gateway.flash(board, first, "--data", str(data))
    assert done.returncode == 0, done.stderr
    ask_often(board)
    board.ssh(f"systemctl restart {UPDATER}")
    wait_for_report(gateway, board, WAVE_S)
    return board


def test_a_board_updates_itself_and_its_new_updater_goes_on(flashed: Board, gateway: Gateway, first: Path) -> None:
    second = variant(first, gateway.fleet, LATER)
    status, said = update(gateway, second, WAVE_S)
    assert (status, said["state"]) == (0, "done"), said
    until(lambda: runs(flashed, second), "the new release is connected")
    third = variant(first, gateway.fleet, LATEST)
    status, said = update(gateway, third, WAVE_S)
    assert (status, said["state"]) == (0, "done"), said


def test_a_broken_release_goes_back_by_itself_and_tells_the_fleet_why(
    flashed: Board, gateway: Gateway, first: Path
) -> None:
    before = state(flashed)["current"]
    bad = broken(first, gateway.fleet)
    status, said = update(gateway, bad, WAVE_S)
    assert (status, said["state"]) == (Exit.ROLLED_BACK, "rolled_back"), said
    assert "broken on purpose" in said["detail"]
    assert state(flashed)["current"] == before
    assert state(flashed)["failed"]["version"] == read_manifest(bad).version


def test_a_model_reaches_the_agents_folder_and_the_agent_stays_up(
    flashed: Board, gateway: Gateway, tmp_path: Path
) -> None:
    pid = flashed.says("systemctl show --property=MainPID --value fedeq-agent")
    model = tmp_path / "personal.onnx"
    export(SPEC, *initial(SPEC, 0), model, budget=60)
    status, said = update(gateway, model, WAVE_S)
    assert (status, said["state"]) == (0, "done"), said
    assert flashed.says("wc -c < /var/lib/fedeq-edge/models/personal.onnx") == str(model.stat().st_size)
    assert flashed.says("stat -c %a /var/lib/fedeq-edge/models/personal.onnx") == "644"
    assert flashed.says("systemctl show --property=MainPID --value fedeq-agent") == pid


def _diagnosis(gateway: Gateway, board: Board) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit status of `fedeq doctor ID`, and its checks by their names."""
    done = gateway.fedeq("doctor", board.name, "--fleet", str(gateway.fleet), "--json", home=board.home)
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)}


def test_the_doctor_asks_the_board_itself(flashed: Board, gateway: Gateway) -> None:
    status, checks = _diagnosis(gateway, flashed)
    seen = {name: check["verdict"] for name, check in checks.items() if name.startswith("there: ")}
    wanted = (
        "extras (device)",
        "broker",
        "service",
        "release",
        "unit fedeq-agent.service",
        "unit fedeq-updater.service",
    )
    assert {name: seen.get(f"there: {name}") for name in wanted} == dict.fromkeys(wanted, "ok"), checks
    assert status == 0


def test_what_the_doctor_finds_is_mended_by_the_command_that_it_names(flashed: Board, gateway: Gateway) -> None:
    name = "there: unit fedeq-agent.service"
    flashed.ssh("systemctl stop fedeq-agent")
    status, checks = _diagnosis(gateway, flashed)
    assert (status, checks[name]["verdict"]) == (1, "fail")
    flashed.ssh(checks[name]["remedy"])
    assert _diagnosis(gateway, flashed)[1][name]["verdict"] == "ok"
    until(lambda: _diagnosis(gateway, flashed)[0] == 0, "the next report says that the agent is well", WAVE_S)

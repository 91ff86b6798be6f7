"""Updates over the air on a board that runs systemd: the updater in its own unit, confined as it is shipped.

The tests of this module share one board and come in the order of its life.
"""

import json
from pathlib import Path

import pytest

from fedeq_edge.errors import Exit
from fedeq_edge.provision.archive import read_manifest
from tests.conftest import until
from tests.devices.board import Board
from tests.devices.gateway import Gateway, some_data
from tests.devices.releases import broken, runs, state, variant

pytestmark = [pytest.mark.devices, pytest.mark.timeout(600)]

# Once a minute is for fleets; the unit is otherwise as it is shipped.
_OFTEN = """[Service]
ExecStart=
ExecStart=/opt/fedeq-edge/current/bin/fedeq device update-loop --every 1
"""


@pytest.fixture(scope="module")
def first(gateway: Gateway) -> Path:
    """A bundle for x86-64 boards."""
    return gateway.bundle("x86-64")


@pytest.fixture(scope="module")
def flashed(gateway: Gateway, board: Board, first: Path, tmp_path_factory: pytest.TempPathFactory) -> Board:
    """A board that asks the fleet often."""
    board.ssh("mkdir -p /etc/systemd/system/fedeq-updater.service.d")
    board.ssh("cat > /etc/systemd/system/fedeq-updater.service.d/often.conf", data=_OFTEN)
    gateway.add(board.name, "x86-64")
    data = some_data(tmp_path_factory.mktemp("data") / "data.npz")
    done = gateway.flash(board, first, "--data", str(data))
    assert done.returncode == 0, done.stderr
    reported = gateway.fleet / "reports" / f"{board.name}.json"
    until(
        reported.exists, f"the updater reports; it says: {board.ssh('journalctl -u fedeq-updater', check=False).stdout}"
    )
    return board


def _update(gateway: Gateway, bundle: Path) -> tuple[int, dict[str, str]]:
    """Exit status of `fedeq update --all`, and what it says of the one board."""
    words = ["--all", "--bundle", str(bundle), "--timeout", "120", "--fleet", str(gateway.fleet), "--json"]
    done = gateway.fedeq("update", *words)
    (said,) = json.loads(done.stdout)["devices"].values()
    return done.returncode, said


def test_a_board_updates_itself_and_its_new_updater_goes_on(flashed: Board, gateway: Gateway, first: Path) -> None:
    second = variant(first, gateway.fleet, "second", "# a later release")
    status, said = _update(gateway, second)
    assert (status, said["state"]) == (0, "done"), said
    until(lambda: runs(flashed, second), "the new release is connected")
    third = variant(first, gateway.fleet, "third", "# and one more")
    status, said = _update(gateway, third)
    assert (status, said["state"]) == (0, "done"), said


def test_a_broken_release_goes_back_by_itself_and_tells_the_fleet_why(
    flashed: Board, gateway: Gateway, first: Path
) -> None:
    before = state(flashed)["current"]
    bad = broken(first, gateway.fleet, "bad")
    status, said = _update(gateway, bad)
    assert (status, said["state"]) == (Exit.ROLLED_BACK, "rolled_back"), said
    assert "broken on purpose" in said["detail"]
    assert state(flashed)["current"] == before
    assert state(flashed)["failed"]["version"] == read_manifest(bad).version


def test_a_model_reaches_the_agents_folder_and_the_agent_stays_up(
    flashed: Board, gateway: Gateway, tmp_path: Path
) -> None:
    pid = flashed.says("systemctl show --property=MainPID --value fedeq-agent")
    model = tmp_path / "personal.onnx"
    model.write_bytes(b"graph" * 1000)
    status, said = _update(gateway, model)
    assert (status, said["state"]) == (0, "done"), said
    assert flashed.says("wc -c < /var/lib/fedeq-edge/models/personal.onnx") == "5000"
    assert flashed.says("stat -c %a /var/lib/fedeq-edge/models/personal.onnx") == "644"
    assert flashed.says("systemctl show --property=MainPID --value fedeq-agent") == pid


def test_the_doctor_asks_the_board_itself(flashed: Board, gateway: Gateway) -> None:
    done = gateway.fedeq("doctor", flashed.name, "--fleet", str(gateway.fleet), "--json", home=flashed.home)
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    seen = {name: checks[name]["verdict"] for name in checks if name.startswith("there: ")}
    wanted = (
        "extras (device)",
        "broker",
        "service",
        "release",
        "unit fedeq-agent.service",
        "unit fedeq-updater.service",
    )
    assert {name: seen.get(f"there: {name}") for name in wanted} == dict.fromkeys(wanted, "ok"), checks

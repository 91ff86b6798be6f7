"""A gateway as broker/README.md makes one: Debian with its own mosquitto and our units; and a board shut out of it."""

import shutil
import time

import pytest

from fedeq_edge import kit
from fedeq_edge.provision.brokerlist import MARK, TAKEN, WATCHER
from fedeq_edge.provision.fleet import Fleet
from tests.conftest import until
from tests.devices.board import Board
from tests.devices.conftest import MakeBoard
from tests.devices.depot import Depot
from tests.devices.gateway import Gateway, some_data
from tests.devices.releases import connected
from tests.devices.sites import GATEWAY, Site

pytestmark = pytest.mark.devices

FOLDER = "/var/lib/fedeq-fleet"
OPERATOR = 1000  # the folder is not root's
SETTINGS = """
install -d -m 750 -g mosquitto /etc/mosquitto/fedeq-edge
cd /var/lib/fedeq-fleet/fleet/gateway
install -m 640 -g mosquitto ca.crt server.crt server.key crl.pem /root/acl /etc/mosquitto/fedeq-edge
install -m 644 /root/mosquitto.conf /etc/mosquitto/mosquitto.conf
systemctl restart mosquitto
systemctl enable --now fedeq-revoked.path
"""
SAME = f"cmp {FOLDER}/fleet/gateway/crl.pem /etc/mosquitto/fedeq-edge/crl.pem"
NO_MARK = " && ".join(f"! test -e {FOLDER}/fleet/gateway/{mark}" for mark in (MARK, TAKEN))
RUNS = f"systemctl is-active --quiet mosquitto && {NO_MARK}"


@pytest.fixture(scope="module")
def machine(make_board: MakeBoard) -> Board:
    """The gateway's machine, with what is shipped for it at hand."""
    made = make_board("gateway", packages=["mosquitto"])
    for name in ("acl", "mosquitto.conf"):
        shutil.copy(kit.folder("broker") / name, made.root / "root" / name)
    for unit in (WATCHER, "fedeq-revoked.service"):
        shutil.copy(kit.folder("broker") / unit, made.root / "etc/systemd/system" / unit)
    made.boot()
    return made


@pytest.fixture(scope="module")
def fleet(machine: Board, site: Site, depot: Depot) -> Gateway:
    """A fleet on that machine, whose broker is shipped mosquitto in Debian's unit."""
    folder = machine.root / FOLDER.lstrip("/")
    folder.mkdir(mode=0o700)
    made = Gateway(folder, site, depot)
    settings = made.fleet / "fleet.toml"
    settings.write_text(settings.read_text().replace(f"mqtts://{GATEWAY}", f"mqtts://{machine.address}"))
    made.must("fleet", "gateway", "--host", machine.address, "--fleet", str(made.fleet))
    for path in (folder, *folder.rglob("*")):
        shutil.chown(path, OPERATOR)
    machine.ssh("sh -ex", data=SETTINGS)
    return made


@pytest.fixture(scope="module")
def flashed(fleet: Gateway, make_board: MakeBoard, tmp_path_factory: pytest.TempPathFactory) -> Board:
    """A board that is connected to that broker."""
    made = make_board("box-08")
    made.boot()
    fleet.add(made.name, "x86-64")
    data = some_data(tmp_path_factory.mktemp("data") / "data.npz")
    done = fleet.flash(made, fleet.bundle("x86-64"), "--data", str(data))
    assert done.returncode == 0, done.stderr
    return made


def test_a_board_that_is_connected_is_out_as_soon_as_it_is_revoked(
    flashed: Board, fleet: Gateway, machine: Board, measured: list[str]
) -> None:
    assert connected(flashed)
    assert f"{FOLDER}/fleet/gateway/{MARK}" in machine.says(f"systemctl show {WATCHER} --property=Paths")
    fleet.must("fleet", "revoke", flashed.name, "--fleet", str(fleet.fleet))
    began = time.monotonic()
    until(lambda: not connected(flashed), "the broker ends the connection of a revoked board")
    measured.append(f"a revoked board is off its broker: {time.monotonic() - began:.1f} s after `fedeq fleet revoke`")
    refused = "journalctl --unit mosquitto --output cat | grep -c 'certificate verify failed'"
    until(lambda: machine.ssh(refused, check=False).stdout.strip() not in ("", "0"), "the broker refuses it again")
    assert not connected(flashed)
    machine.ssh(SAME)
    assert machine.says("stat -c '%a %U %G' /etc/mosquitto/fedeq-edge/crl.pem") == "640 root mosquitto"


def test_a_dozen_boards_revoked_at_once_leave_a_broker_that_runs_and_knows_of_all(
    fleet: Gateway, machine: Board
) -> None:
    opened = Fleet.open(fleet.fleet)
    for number in range(12):
        opened.add(f"box-{number + 20}", "x86-64")
        opened.revoke(f"box-{number + 20}")
    until(lambda: machine.ssh(SAME, check=False).returncode == 0, "mosquitto has the last list")
    until(lambda: machine.ssh(RUNS, check=False).returncode == 0, "mosquitto runs")
    assert machine.says("systemctl is-active fedeq-revoked.path") == "active"


def test_a_list_that_could_not_be_given_to_the_broker_is_given_once_that_can_be(fleet: Gateway, machine: Board) -> None:
    machine.ssh("mv /etc/mosquitto/fedeq-edge /root/aside")
    opened = Fleet.open(fleet.fleet)
    opened.add("box-40", "x86-64")
    opened.revoke("box-40")
    failed = "journalctl --unit fedeq-revoked.service --output cat | grep -q \"Failed with result 'exit-code'\""
    begun = f"test -e {FOLDER}/fleet/gateway/{TAKEN} && ! test -e {FOLDER}/fleet/gateway/{MARK}"
    until(lambda: machine.ssh(begun, check=False).returncode == 0, "the list is being given")
    until(lambda: machine.ssh(failed, check=False).returncode == 0, "that fails")
    machine.ssh("mv /root/aside /etc/mosquitto/fedeq-edge")
    until(lambda: machine.ssh(f"{SAME} && {RUNS}", check=False).returncode == 0, "mosquitto has the list")

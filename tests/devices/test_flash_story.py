"""From a bare board to a heartbeat, on to a broken release and back, through the programs that an operator uses.

The tests of this module share one board and come in the order of its life.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from fedeq_edge.errors import Exit
from fedeq_edge.provision.archive import read_manifest
from tests.conftest import until
from tests.devices.board import Board
from tests.devices.conftest import MakeBoard
from tests.devices.gateway import IDENTITY, Gateway, some_data
from tests.devices.releases import LATER, LATEST, broken, connected, runs, state, variant
from tests.devices.sites import Site

pytestmark = pytest.mark.devices

RESIDENT_KIB = 45_000


@pytest.fixture(scope="module")
def first(gateway: Gateway) -> Path:
    """A bundle for x86-64 boards."""
    return gateway.bundle("x86-64")


@pytest.fixture(scope="module")
def second(gateway: Gateway, first: Path) -> Path:
    """Another that is as good."""
    return variant(first, gateway.fleet, LATER)


@pytest.fixture(scope="module")
def bad(gateway: Gateway, first: Path) -> Path:
    """One whose agent does not get well."""
    return broken(first, gateway.fleet)


@pytest.fixture(scope="module")
def flashed(
    gateway: Gateway, board: Board, first: Path, tmp_path_factory: pytest.TempPathFactory, measured: list[str]
) -> dict[str, Any]:
    """The report of the board's first flash."""
    gateway.add(board.name, "x86-64")
    data = some_data(tmp_path_factory.mktemp("data") / "data.npz")
    done = gateway.flash(board, first, "--data", str(data))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    measured.append(f"flash of a booted x86-64 board to its first heartbeat: {found['heartbeat_s']} s {found['steps']}")
    return found


def test_one_command_brings_a_bare_board_to_its_first_heartbeat(
    flashed: dict[str, Any], board: Board, first: Path
) -> None:
    assert flashed["changed"]
    assert runs(board, first)


def test_the_agent_runs_confined_and_small(flashed: dict[str, Any], board: Board) -> None:
    pid = board.says("systemctl show --property=MainPID --value fedeq-agent")
    process = dict(line.split(":", 1) for line in board.says(f"cat /proc/{pid}/status").splitlines())
    assert int(process["Uid"].split()[0]) >= 61184  # a user that exists while the unit runs: systemd's DynamicUser
    assert (process["CapEff"].strip(), process["NoNewPrivs"].strip()) == ("0000000000000000", "1")
    assert int(process["VmRSS"].split()[0]) <= RESIDENT_KIB
    assert board.says("stat -c '%a %U' /etc/fedeq-edge /etc/fedeq-edge/device.key") == "700 root\n600 root"


def test_a_second_flash_of_the_same_bundle_changes_nothing(
    flashed: dict[str, Any], gateway: Gateway, board: Board, first: Path
) -> None:
    pid = board.says("systemctl show --property=MainPID --value fedeq-agent")
    done = gateway.flash(board, first)
    assert (done.returncode, json.loads(done.stdout)["changed"]) == (0, False)
    assert board.says("systemctl show --property=MainPID --value fedeq-agent") == pid


def test_a_broken_release_goes_back_and_says_why(
    flashed: dict[str, Any], gateway: Gateway, board: Board, first: Path, bad: Path
) -> None:
    done = gateway.flash(board, bad)
    assert done.returncode == Exit.ROLLED_BACK, done.stderr
    assert "broken on purpose" in done.stderr
    until(lambda: runs(board, first), "the old release answers")
    assert state(board)["failed"]["version"] == read_manifest(bad).version


def test_a_good_release_follows_and_can_be_taken_back(
    flashed: dict[str, Any], gateway: Gateway, board: Board, first: Path, second: Path
) -> None:
    done = gateway.flash(board, second)
    assert done.returncode == 0, done.stderr
    assert runs(board, second)
    gateway.must("rollback", board.name, "--fleet", str(gateway.fleet), home=board.home)
    assert runs(board, first)


def test_a_board_of_another_kind_and_a_tampered_bundle_change_nothing(
    flashed: dict[str, Any], gateway: Gateway, board: Board, first: Path, tmp_path: Path
) -> None:
    tampered = tmp_path / "tampered.tar.gz"
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    tampered.write_bytes(content)
    assert gateway.flash(board, tampered).returncode == Exit.VERIFICATION
    assert gateway.flash(board, gateway.bundle("raspberry-pi-4")).returncode == Exit.WRONG_PLATFORM
    assert runs(board, first)


def test_a_host_that_is_not_known_is_refused_with_its_fingerprint(
    flashed: dict[str, Any], gateway: Gateway, board: Board, first: Path
) -> None:
    (board.ssh_config.with_name("known_hosts")).rename(board.home / "forgotten")
    done = gateway.flash(board, first)
    (board.home / "forgotten").rename(board.ssh_config.with_name("known_hosts"))
    assert done.returncode == Exit.HOST_KEY
    assert "SHA256:" in done.stderr


def test_an_installation_goes_on_when_the_connection_is_lost(
    flashed: dict[str, Any], gateway: Gateway, board: Board, site: Site, first: Path
) -> None:
    third = variant(first, gateway.fleet, LATEST)
    flash = gateway.start_flash(board, third)
    until(lambda: bool(list(board.releases.glob(".part-*"))), "the installer unpacks")
    site.unplug(board.address)
    assert flash.wait(120) == Exit.LOST, gateway.log("flash")
    site.plug_in_again(board.address)
    until(lambda: runs(board, third), "the new release answers")


def test_a_full_disk_is_refused_before_anything_is_written(
    flashed: dict[str, Any], gateway: Gateway, make_board: MakeBoard, first: Path, tmp_path: Path
) -> None:
    small = make_board("box-02")
    small.boot()
    small.ssh("mkdir /opt/fedeq-edge && mount -t tmpfs -o size=60m tmpfs /opt/fedeq-edge")
    gateway.add(small.name, "x86-64")
    done = gateway.flash(small, first, "--data", str(some_data(tmp_path / "data.npz")))
    assert done.returncode == Exit.NO_SPACE, done.stderr
    assert small.says("ls -A /opt/fedeq-edge") == ""


def test_a_token_that_has_expired_is_refused_in_one_line_and_changes_nothing(
    flashed: dict[str, Any], gateway: Gateway, board: Board
) -> None:
    before = board.says(f"sha256sum {IDENTITY}/*")
    late = gateway.enrol(board, gateway.expired_token(board.name))
    assert late.returncode == Exit.TOKEN_EXPIRED
    (said,) = late.stderr.strip().splitlines()
    assert f"fedeq fleet token {board.name}" in said
    assert board.says(f"sha256sum {IDENTITY}/*") == before
    assert connected(board)


def test_a_revoked_board_is_out_at_once_and_a_token_lets_it_in_again(
    flashed: dict[str, Any], gateway: Gateway, board: Board
) -> None:
    gateway.must("fleet", "revoke", board.name, "--fleet", str(gateway.fleet))
    gateway.read_revoked()
    board.ssh("systemctl restart fedeq-agent")
    until(lambda: "certificate verify failed" in gateway.log("broker"), "the broker refuses the certificate")
    assert not connected(board)

    board.ssh(f"rm {IDENTITY}/device.crt {IDENTITY}/device.key")
    gateway.add(board.name, "x86-64")
    token = gateway.token(board.name)
    joined = gateway.enrol(board, token)
    assert joined.returncode == 0, joined.stderr
    board.ssh("systemctl restart fedeq-agent")
    until(lambda: connected(board), "the board is in again")

    again = gateway.enrol(board, token, folder="/tmp/thief")  # with the key that it was used with, it could ask again
    assert again.returncode == Exit.TOKEN_USED
    assert len(again.stderr.strip().splitlines()) == 1

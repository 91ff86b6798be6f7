"""The harness itself: what a board is before fedeq-edge comes to it."""

import socket

import pytest

from tests.devices.board import Board
from tests.devices.sites import GATEWAY, Site

pytestmark = pytest.mark.devices


def test_a_board_runs_systemd_as_its_first_process_and_reaches_the_gateway_alone(board: Board, site: Site) -> None:
    assert board.says("cat /proc/1/comm") == "systemd"
    assert board.says("systemctl is-system-running --wait") == "running"
    assert board.says("ip route") == f"10.77.0.0/24 dev eth0 proto kernel scope link src {board.address}"
    with site.entered(), socket.create_server((GATEWAY, 0)) as server:
        port = server.getsockname()[1]
        board.ssh(f"bash -c 'echo hello > /dev/tcp/{GATEWAY}/{port}'")
        with server.accept()[0] as connection:
            assert connection.recv(6) == b"hello\n"


def test_a_pi_is_seen_as_one(arm_board: Board) -> None:
    assert arm_board.says("uname -m; python3 -c 'import platform; print(platform.machine())'") == "aarch64\naarch64"
    assert "Raspberry Pi 4" in arm_board.says("cat /proc/cpuinfo")
    assert arm_board.says("echo $QEMU_CPU") == "cortex-a72"
    unit = "systemd-run --quiet --wait --pipe"
    assert arm_board.says(f"{unit} sh -c 'echo $QEMU_CPU'") == "cortex-a72"


def test_files_outlive_a_power_cut_and_processes_do_not(board: Board) -> None:
    board.ssh("systemd-run --quiet --unit=victim sleep infinity; echo kept > /var/lib/kept")
    board.cut_power()
    board.boot()
    assert board.says("cat /var/lib/kept") == "kept"
    assert board.ssh("systemctl is-active victim", check=False).stdout.strip() == "inactive"


def test_an_unplugged_board_is_silent_until_it_is_plugged_in_again(board: Board, site: Site) -> None:
    site.unplug(board.address)
    anew = ["-o", "ControlPath=none", "-o", "ConnectTimeout=1"]
    lost = site.run(["ssh", "-F", str(board.ssh_config), *anew, board.name, "true"])
    assert lost.returncode == 255
    site.plug_in_again(board.address)
    board.ssh("true")

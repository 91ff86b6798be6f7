"""Updates over the air as an operator gives them, and boards that hear of them at once."""

import json
from pathlib import Path
from typing import Final

from fedeq_edge import kit
from tests.conftest import until
from tests.devices.board import Board
from tests.devices.gateway import Gateway

UPDATER: Final = "fedeq-updater.service"


def ask_often(board: Board) -> None:
    """The board's updater asks every second, which is what a fleet does once a minute; it is otherwise as shipped."""
    shipped = (kit.folder("devices") / UPDATER).read_text().splitlines()
    start = next(line for line in shipped if line.startswith("ExecStart="))
    board.ssh(f"mkdir -p /etc/systemd/system/{UPDATER}.d")
    often = f"/etc/systemd/system/{UPDATER}.d/often.conf"
    board.ssh(f"cat > {often}; systemctl daemon-reload", data=f"[Service]\nExecStart=\n{start} --every 1\n")


def wait_for_report(gateway: Gateway, board: Board, timeout_s: float) -> None:
    """The fleet has heard of the board's updater."""

    def heard() -> bool:
        return gateway.reported(board.name) is not None

    said = board.ssh(f"journalctl --unit {UPDATER}", check=False)
    until(heard, f"the updater of {board.name} reports; it says: {said.stdout}", timeout_s)


def update(gateway: Gateway, bundle: Path, timeout_s: float) -> tuple[int, dict[str, str]]:
    """Exit status of `fedeq update --all`, and what it says of the one board."""
    words = ["--all", "--bundle", str(bundle), "--timeout", str(timeout_s), "--fleet", str(gateway.fleet), "--json"]
    done = gateway.fedeq("update", *words)
    (said,) = json.loads(done.stdout)["devices"].values()
    return done.returncode, said

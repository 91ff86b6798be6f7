"""The updater that is there all the time: a light process that starts another one where there is something to do."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedeq_edge.atomic import locked
from fedeq_edge.errors import FedEqError
from fedeq_edge.provision.reporting import Board, follow, service_of
from fedeq_edge.provision.update import publish
from fedeq_edge.updater import Loop
from tests.conftest import until
from tests.provision.update_fleet import Member, Plant

OWN = "pi-01"
HEAVY = {"numpy", "cryptography", "tuf", "urllib3", "typer", "rich", "psutil", "torch", "onnxruntime"}


@contextlib.contextmanager
def running(member: Member) -> Iterator[subprocess.Popen[str]]:
    """`python -m fedeq_edge.updater`, as the unit starts it."""
    command = [sys.executable, "-m", "fedeq_edge.updater", "--every", "0.2", "--root", str(member.fake.root)]
    environment = {**os.environ, **member.fake.environment}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)


def resident_mb(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def test_it_loads_none_of_the_heavy_libraries() -> None:
    code = f"import sys, fedeq_edge.updater; print({HEAVY} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_board_is_updated_and_the_updater_is_as_light_as_before(plant: Plant, member: Member) -> None:
    plant.clock.now = member.clock.now
    with running(member) as process:
        until(lambda: plant.fleet.heard(OWN) is not None, "it reports")
        found = publish(plant.fleet, plant.bundle("1.1+b"))
        plant.fleet.give_action(OWN, "update", found.meant.version, 1e9, target=found.path)
        until(lambda: plant.fleet.action_for(OWN) is None, "the update has ended")
        heard = plant.fleet.heard(OWN)
        assert heard is not None
        assert (member.runs, heard.report.version) == ("1.1+b", "1.1+b")
        assert resident_mb(process.pid) < 30  # 23 MB; with what an update loads, 50


def test_what_the_work_failed_of_is_in_the_next_report(plant: Plant, member: Member) -> None:
    (member.board.identity / "root.json").write_text("{")
    found = publish(plant.fleet, plant.bundle("1.1+b"))
    with member.environment():
        loop = Loop(member.board)
        loop.turn()
        (member.board.folder / "seen.json").write_text("{")
        plant.fleet.give_action(OWN, "update", found.meant.version, 1e9, target=found.path)
        with pytest.raises(FedEqError, match=r"seen\.json is damaged"):
            loop.turn()
        with pytest.raises(FedEqError):
            loop.turn()
    heard = plant.fleet.heard(OWN)
    assert heard is not None
    assert "seen.json is damaged" in heard.report.last_error


def test_the_work_of_an_updater_from_before_is_waited_for_and_is_no_trouble(plant: Plant, member: Member) -> None:
    with member.environment():
        loop = Loop(member.board)
        loop.turn()
        found = publish(plant.fleet, plant.bundle("1.1+b"))
        plant.fleet.give_action(OWN, "update", found.meant.version, 1e9, target=found.path)
        with locked(member.board.folder):
            loop.turn()
        assert (member.runs, plant.fleet.action_for(OWN) is None) == ("1.0+a", False)
        loop.turn()
    heard = plant.fleet.heard(OWN)
    assert heard is not None
    assert (member.runs, heard.report.last_error) == ("1.1+b", "")


def test_a_turn_in_which_nothing_is_wanted_starts_nothing(plant: Plant, member: Member) -> None:
    with member.environment():
        loop = Loop(member.board)
        loop.turn()  # the first one renews
        before = (member.board.folder / "lock").stat().st_mtime_ns
        loop.turn()
    assert (member.board.folder / "lock").stat().st_mtime_ns == before


def test_a_board_follows_its_service_to_where_that_answers_and_nowhere_else(plant: Plant, member: Member) -> None:
    follow(member.board, "https://127.0.0.1:1")
    assert service_of(member.board) == plant.url
    moved = plant.url.replace("127.0.0.1", "localhost")  # its certificate does not name that
    follow(member.board, moved)
    assert service_of(member.board) == plant.url
    text = (plant.fleet.folder / "fleet.toml").read_text()
    (plant.fleet.folder / "fleet.toml").write_text(text.replace('"https://g"', f'"{plant.url}/"'))
    member.turn()
    assert service_of(member.board) == f"{plant.url}/"
    assert service_of(Board(member.fake.root)) == f"{plant.url}/"

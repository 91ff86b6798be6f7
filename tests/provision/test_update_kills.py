"""Updaters that die: at every one of their steps, by SIGKILL, and with an installer that is killed."""

import contextlib
import fcntl
import signal
import subprocess
import sys

import pytest

from fedeq_edge.errors import Exit, ProvisionError
from tests.provision.update_fleet import HOUR_S, NOW, Killed, Member, Plant, said, tell

OWN = "pi-01"


def finish(member: Member) -> None:
    """The board comes back and takes turns until it has nothing to do."""
    for _ in range(3):
        with contextlib.suppress(ProvisionError):
            member.turn()


@pytest.mark.parametrize("health", ["ok", "broken"])
def test_an_updater_that_dies_at_any_step_ends_in_the_same(plant: Plant, member: Member, health: str) -> None:
    deaths = 0
    while True:
        version = f"2.{deaths}+{health}"
        before = member.runs
        tell(plant, OWN, plant.bundle(version, health))
        try:
            member.turn(die_at=deaths)
        except Killed:
            deaths += 1
            finish(member)
            done = True
        else:
            done = False
        expected = (version, "done") if health == "ok" else (before, "rolled_back")
        assert (member.runs, said(plant, OWN).state) == expected, f"died at step {deaths - 1}: {member.steps}"
        if not done:
            break
    assert deaths >= 10


def test_a_rollback_that_dies_at_any_step_goes_back_once(plant: Plant, member: Member) -> None:
    deaths = 0
    while True:
        with member.environment():
            for version in (f"3.{deaths}+a", f"3.{deaths}+b"):
                assert member.fake.install(plant.bundle(version))[0] == 0
        plant.fleet.give_action(OWN, "rollback", "", HOUR_S)
        died = False
        try:
            member.turn(die_at=deaths)
        except Killed:
            died = True
            deaths += 1
            finish(member)
        assert (member.runs, said(plant, OWN).state) == (f"3.{deaths - died}+a", "done")
        if not died:
            break
    assert deaths >= 4


def test_a_rollback_whose_installer_was_killed_between_link_and_restart_is_finished(
    plant: Plant, member: Member
) -> None:
    tell(plant, OWN, plant.bundle("1.1+b"))
    member.turn()
    plant.fleet.give_action(OWN, "rollback", "", HOUR_S)

    def killed(step: str) -> None:
        if step == "act":
            with member.environment():
                member.fake.call("rollback", "--no-start")
            raise Killed

    with pytest.raises(Killed):
        member.turn(meanwhile=killed)
    member.fake.calls()
    member.turn()
    assert (member.runs, said(plant, OWN).detail) == ("1.0+a", "runs 1.0+a")
    assert "restart fedeq-agent.service" in member.fake.calls()


def test_an_installer_that_is_at_work_already_is_waited_for(plant: Plant, member: Member) -> None:
    tell(plant, OWN, plant.bundle("1.1+b"))
    with (member.fake.base / "lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for _ in range(5):
            with pytest.raises(ProvisionError) as busy:
                member.turn()
            assert busy.value.exit is Exit.BUSY
    member.turn()
    assert (member.runs, said(plant, OWN).state) == ("1.1+b", "done")


def test_an_updater_that_is_killed_for_real_leaves_a_board_that_goes_on(plant: Plant, member: Member) -> None:
    tell(plant, OWN, plant.bundle("1.1+b"))
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom fedeq_edge.provision.reporting import Board\n"
        "from fedeq_edge.provision.updater import Updater\n"
        "def told(step):\n    if step == 'act': os.kill(os.getpid(), signal.SIGKILL)\n"
        f"Updater(Board(Path(sys.argv[1])), lambda: {NOW}, told).once()\n"
    )
    with member.environment():
        done = subprocess.run([sys.executable, "-c", code, str(member.fake.root)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    member.turn()
    assert (member.runs, said(plant, OWN).state) == ("1.1+b", "done")


def test_an_installer_that_is_killed_again_and_again_is_given_up(plant: Plant, member: Member) -> None:
    tell(plant, OWN, plant.bundle("1.1+b"))
    good = (member.fake.base / "release.py").read_text()
    deadly = "import os, sys\nif 'install' in sys.argv: os.kill(os.getpid(), 9)\n"
    (member.fake.base / "release.py").write_text(good.replace("import argparse\n", f"{deadly}import argparse\n"))
    finish(member)
    assert (member.runs, said(plant, OWN).state) == ("1.0+a", "failed")
    assert "release.py ended with -9" in said(plant, OWN).detail

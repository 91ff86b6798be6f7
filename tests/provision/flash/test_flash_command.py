"""`fedeq flash`, `logs` and `rollback` as typed: exit codes, JSON, and what is asked before."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from fedeq_edge.cli import main
from fedeq_edge.errors import Exit
from fedeq_edge.provision.actions import Report
from fedeq_edge.provision.agentfile import agent_toml
from fedeq_edge.provision.fleet import Fleet
from tests.provision.flash.board import Board, BundleMaker, CardMaker, Server

REPORTED = Report(version="1.0+a", confirmed=True, healthy=True, previous="0.9+a")


@dataclass
class Ended:
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def go(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["fedeq", *arguments, "--fleet", str(fleet.folder)])
        with pytest.raises(SystemExit) as ended:
            main()
        told = capsys.readouterr()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else int(code is not None), told.out, told.err)

    return go


@pytest.fixture
def card(make_card: CardMaker, arm: Path) -> str:
    return str(make_card().path)


def test_a_card_is_flashed_with_the_newest_bundle_and_said_in_json(run: Run, card: str, fleet: Fleet) -> None:
    done = run("flash", card, "--device", "pi-01", "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert (said["device"], said["version"], said["changed"]) == ("pi-01", "1.0", True)
    assert "enrols and starts at its next boot" in done.err
    assert fleet.device("pi-01").target == card


def test_looking_writes_nothing_and_gives_the_plan(run: Run, card: str, fleet: Fleet) -> None:
    before = Path(card).read_bytes()
    done = run("flash", card, "--device", "pi-01", "--check", "--json")
    said = json.loads(done.out)
    assert done.code == 0
    assert said["facts"]["architecture"] == "aarch64"
    assert "join token" in said["intended"][0]
    assert Path(card).read_bytes() == before
    assert not fleet.device("pi-01").target


def test_a_device_that_lives_elsewhere_is_asked_for_before_there_are_two(run: Run, card: str, fleet: Fleet) -> None:
    fleet.flashed("pi-01", "ssh://pi@10.0.0.5")
    done = run("flash", card, "--device", "pi-01")
    assert done.code == Exit.MISUSED
    assert "add --yes" in done.err
    assert run("flash", card, "--device", "pi-01", "--yes").code == 0


def test_a_card_that_is_ready_for_another_device_is_asked_for(run: Run, card: str, fleet: Fleet) -> None:
    assert run("flash", card, "--device", "pi-01").code == 0
    fleet.add("pi-02", "raspberry-pi-4")
    before = Path(card).read_bytes()
    done = run("flash", card, "--device", "pi-02")
    assert done.code == Exit.MISUSED
    assert "take it from pi-01, for which it was prepared" in done.err
    assert Path(card).read_bytes() == before
    assert run("flash", card, "--device", "pi-02", "--yes").code == 0


def test_a_revoked_device_is_not_flashed_and_gets_no_token(run: Run, card: str, fleet: Fleet) -> None:
    fleet.revoke("pi-01")
    done = run("flash", card, "--device", "pi-01")
    assert (done.code, done.err.count("\n")) == (Exit.MISUSED, 1)
    assert "fedeq fleet add pi-01 --profile raspberry-pi-4" in done.err
    assert not fleet.tokens.waiting("pi-01", now=0)


@pytest.mark.parametrize("left", [100, -100])
def test_a_bundle_that_is_cut_off_is_named_and_the_one_before_it_is_taken(
    left: int, run: Run, card: str, arm: Path, make_bundle: BundleMaker
) -> None:
    newer = make_bundle("2.0", profile="raspberry-pi-4", architecture="aarch64", python="3.11")
    newer.write_bytes(newer.read_bytes()[:left])
    os.utime(arm, (0, 0))
    done = run("flash", card, "--device", "pi-01", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["version"] == "1.0"
    assert f"left out: bundle {newer} is refused" in done.err


def test_a_bundle_that_was_built_for_another_device_is_named_and_one_for_this_or_any_is_taken(
    run: Run, card: str, arm: Path, fleet: Fleet, make_bundle: BundleMaker
) -> None:
    fleet.add("pi-02", "raspberry-pi-4")
    made = {"profile": "raspberry-pi-4", "architecture": "aarch64", "python": "3.11"}
    its, theirs = (make_bundle(f"of-{one}", config=config_of(fleet, one), **made) for one in ("pi-01", "pi-02"))
    for age, bundle in enumerate((theirs, its, arm)):
        os.utime(bundle, (-age, -age))
    done = run("flash", card, "--device", "pi-01", "--check", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["bundle"] == str(its)
    assert f"left out: bundle {theirs} was built for another device" in done.err
    its.unlink()
    assert json.loads(run("flash", card, "--device", "pi-01", "--check", "--json").out)["bundle"] == str(arm)


def config_of(fleet: Fleet, device: str) -> bytes:
    """What `fedeq bundle build --device` puts into a bundle."""
    return agent_toml(fleet.settings, device, fleet.device(device), torch=False)


def test_a_bundle_that_was_named_and_is_cut_off_is_not_made_up_for(
    run: Run, card: str, arm: Path, make_bundle: BundleMaker
) -> None:
    named = make_bundle("2.0", profile="raspberry-pi-4", architecture="aarch64", python="3.11")
    named.write_bytes(named.read_bytes()[:-100])
    assert run("flash", card, "--device", "pi-01", "--bundle", str(named)).code == Exit.VERIFICATION


def test_a_board_whose_name_nobody_knows_is_told_from_one_that_is_off(
    run: Run, home: Path, make_bundle: BundleMaker
) -> None:
    make_bundle("1.0")
    done = run("flash", "ssh://pi@board.invalid", "--device", "box-01")
    assert (done.code, done.err.count("\n")) == (Exit.LOST, 1)
    assert "no address is known for board.invalid" in done.err


def test_a_booted_card_ends_with_12(run: Run, make_card: CardMaker, arm: Path) -> None:
    booted = make_card(mark="var/lib/systemd/random-seed")
    assert run("flash", str(booted.path), "--device", "pi-01").code == Exit.BOOTED_CARD


def test_data_on_which_no_agent_would_train_are_refused_before_the_card_is_touched(
    run: Run, card: str, tmp_path: Path
) -> None:
    before = Path(card).read_bytes()
    np.savez(tmp_path / "junk.npz", a=1)
    done = run("flash", card, "--device", "pi-01", "--data", str(tmp_path / "junk.npz"))
    assert done.code == Exit.FAILED
    assert "no array 'x'" in done.err
    assert Path(card).read_bytes() == before


def test_a_fleet_without_a_bundle_for_the_board_says_how_to_build_it(run: Run, make_card: CardMaker) -> None:
    done = run("flash", str(make_card().path), "--device", "box-01")
    assert done.code == Exit.MISUSED
    assert "fedeq bundle build --device box-01" in done.err


def test_an_unknown_host_key_ends_with_7_in_one_line(
    run: Run, server: Server, make_bundle: BundleMaker, board: Board
) -> None:
    make_bundle("1.0")
    done = run("flash", f"ssh://pi@127.0.0.1:{server.port}", "--device", "box-01")
    assert done.code == Exit.HOST_KEY
    assert done.err.count("\n") == 1
    assert f"--accept-host-key {server.fingerprint}" in done.err
    assert board.commands == []


def test_a_board_that_is_off_ends_with_8(run: Run, home: Path, make_bundle: BundleMaker) -> None:
    make_bundle("1.0")
    assert run("flash", "ssh://pi@127.0.0.1:1", "--device", "box-01").code == Exit.LOST


def test_logs_are_those_of_the_board_that_the_fleet_remembers(
    run: Run, server: Server, board: Board, fleet: Fleet
) -> None:
    fleet.flashed("box-01", f"ssh://pi@127.0.0.1:{server.port}")
    (board.home / "journal").write_text("agent is up\n\x1b[31mround 1\n")
    done = run("logs", "box-01", "-n", "5", "--accept-host-key", server.fingerprint)
    assert done.code == 0
    assert done.out == "agent is up\n?[31mround 1\n"
    assert "--lines 5" in board.commands[-1]


def test_a_device_that_is_not_reached_from_here_cannot_be_followed(run: Run, fleet: Fleet) -> None:
    fleet.flashed("box-01", "card.img")
    done = run("logs", "box-01", "-f")
    assert done.code == Exit.MISUSED
    assert "card.img" in done.err


@pytest.mark.parametrize("command", ["logs", "rollback"])
def test_a_device_that_is_not_reached_from_here_is_asked_by_its_updater(
    command: str, run: Run, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedeq_edge.cli.flash._REPORT_S", 0.01)
    monkeypatch.setattr("fedeq_edge.provision.update._LOOK_S", 0.01)
    fleet.flashed("box-01", "card.img")
    fleet.take_report("box-01", REPORTED)
    done = run(command, "box-01")
    assert done.code == Exit.ACTION_EXPIRED
    assert "by way of the service" in done.err
    assert "last heard" in done.err


@pytest.mark.parametrize("command", ["logs", "rollback"])
def test_a_device_that_was_never_heard_from_is_not_waited_for(command: str, run: Run, fleet: Fleet) -> None:
    fleet.flashed("box-01", "card.img")
    done = run(command, "box-01")
    assert (done.code, done.err.count("\n")) == (Exit.LOST, 1)
    assert "was never heard from" in done.err
    assert "fedeq doctor box-01" in done.err
    assert fleet.given_action("box-01") is None


@pytest.mark.parametrize("target", ["card.img", "ssh://pi@127.0.0.1:1"])
def test_a_rollback_during_an_update_says_so_and_leaves_the_update_alone(target: str, run: Run, fleet: Fleet) -> None:
    fleet.flashed("box-01", target)
    fleet.take_report("box-01", REPORTED)
    action = fleet.give_action("box-01", "update", "1.1+b", 60)
    done = run("rollback", "box-01")
    assert (done.code, done.err.count("\n")) == (Exit.BUSY, 1)
    assert "is being updated to 1.1+b" in done.err
    assert fleet.action_for("box-01") == action

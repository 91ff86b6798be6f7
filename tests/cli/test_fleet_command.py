"""fedeq fleet and fedeq device enrol: what an operator types, and what comes of it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedeq_edge.errors import Exit
from fedeq_edge.provision.actions import Report
from fedeq_edge.provision.brokerlist import BrokerHere
from fedeq_edge.provision.fleet import Fleet
from fedeq_edge.transport.broker import free_port
from tests.conftest import listens, until

if TYPE_CHECKING:
    from tests.cli.conftest import Fedeq


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDEQ_CA_PASSPHRASE", raising=False)
    return tmp_path


@pytest.fixture
def fleet(here: Path, fedeq: "Fedeq") -> Fleet:
    """plant, with two devices, in ./fleet."""
    assert fedeq("fleet", "init", "plant", "--host", "127.0.0.1").status == 0
    for device in ("pi-01", "pi-02"):
        assert fedeq("fleet", "add", device, "--profile", "raspberry-pi-4").status == 0
    return Fleet.open(here / "fleet")


@pytest.fixture
def service(fleet: Fleet) -> Iterator[str]:
    """Address of `fedeq fleet serve`, a process."""
    port = free_port()
    command = [sys.executable, "-m", "fedeq_edge", "fleet", "serve", "--listen", f"127.0.0.1:{port}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        until(lambda: listens(port) or process.poll() is not None, "the service listens")
        yield f"https://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        told = process.stderr.read().decode()
        assert process.wait(30) == 0, told
    assert "fleet plant is served" in told


def test_adding_a_device_says_what_to_type_next(fleet: Fleet, fedeq: "Fedeq") -> None:
    told = fedeq("fleet", "add", "pi-03", "--profile", "raspberry-pi-5")
    assert told.out == ""
    assert "fedeq flash ssh://USER@HOST --device pi-03" in told.err
    assert "fedeq fleet token pi-03" in told.err


def test_a_second_init_changes_nothing_and_fails(fleet: Fleet, fedeq: "Fedeq") -> None:
    before = (fleet.folder / "ca" / "ca.crt").read_bytes()
    told = fedeq("fleet", "init", "plant")
    assert told.status == 1
    assert "nothing makes a fleet's CA anew" in told.err
    assert told.err.count("\n") == 1
    assert (fleet.folder / "ca" / "ca.crt").read_bytes() == before


def test_no_command_makes_the_authority_anew(fleet: Fleet, fedeq: "Fedeq") -> None:
    before = [(fleet.folder / "ca" / name).read_bytes() for name in ("ca.key", "ca.crt")]
    for typed in (
        "init plant --host g",
        "gateway --host g",
        "add pi-03 --profile x86-64",
        "token pi-03",
        "revoke pi-03",
        "list",
        "status",
    ):
        fedeq("fleet", *typed.split())
    assert [(fleet.folder / "ca" / name).read_bytes() for name in ("ca.key", "ca.crt")] == before


def test_a_board_enrols_at_the_service_and_a_second_one_with_its_token_does_not(
    here: Path, service: str, fedeq: "Fedeq"
) -> None:
    printed = fedeq("fleet", "token", "pi-01")
    token = printed.out.strip()
    assert token.startswith("fedeq1.pi-01.")
    assert "on the board: sudo fedeq device enrol --service https://127.0.0.1:8443 --token" in printed.err
    told = fedeq("device", "enrol", "--service", service, "--token", token, "--folder", "board")
    assert (told.status, told.out) == (0, "")
    made = {"ca.crt", "device.crt", "device.key", "root.json", "updater.toml"}
    assert {path.name for path in Path("board").iterdir()} == made
    again = fedeq("device", "enrol", "--service", service, "--token", token, "--folder", "thief")
    assert again.status == Exit.TOKEN_USED
    assert again.err.count("\n") == 1


def test_a_request_is_printed_and_the_key_stays(here: Path, fedeq: "Fedeq") -> None:
    told = fedeq("device", "csr", "--device", "pi-01", "--folder", here / "etc")
    assert told.out.startswith("-----BEGIN CERTIFICATE REQUEST-----\n")
    assert fedeq("device", "csr", "--device", "pi-01", "--folder", here / "etc").err == ""
    assert [path.name for path in (here / "etc").iterdir()] == ["device.key"]


def test_enrolment_without_a_token_says_what_is_missing(fedeq: "Fedeq", here: Path) -> None:
    told = fedeq("device", "enrol", "--service", "https://g")
    assert told.status == 2
    assert "--join" in told.err


def test_status_shows_what_was_reported_and_who_never_did(fleet: Fleet, fedeq: "Fedeq") -> None:
    nasty = "Traceback\n\x1b[2J[red]boom"
    fleet.take_report("pi-01", Report(version="1.0+aa", confirmed=True, healthy=False, last_error=nasty))
    shown = fedeq("fleet", "status").err
    assert "1.0+aa" in shown
    assert "never" in shown
    assert "?[2J[red]boom" in shown
    assert "\x1b[2J" not in shown
    found = json.loads(fedeq("fleet", "status", "--json").out)
    assert found["pi-01"]["report"]["healthy"] is False
    assert found["pi-02"] is None


def test_what_a_device_said_before_it_was_revoked_is_not_shown_as_its_state(fleet: Fleet, fedeq: "Fedeq") -> None:
    fleet.take_report("pi-01", Report(version="1.0+aa", confirmed=True, healthy=True))
    fedeq("fleet", "revoke", "pi-01")
    shown = fedeq("fleet", "status").err
    assert "1.0+aa" not in shown
    assert "yes" not in shown
    assert "report" not in json.loads(fedeq("fleet", "status", "--json").out)["pi-01"]


SYSTEMCTL = """\
#!/bin/sh
# A systemd with fedeq-revoked.path, whose mosquitto is another one with every list.
gateway=@HERE@/fleet/gateway
case "$*" in
    *fedeq-revoked.path*) echo "Paths=$gateway/crl.new (PathExists)"; echo ActiveState=active ;;
    *mosquitto.service*) rm -f $gateway/crl.new; sha256sum <$gateway/crl.pem; echo ActiveState=@STATE@ ;;
esac
"""


@pytest.fixture
def systemd(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A gateway whose broker takes new lists by itself, and is in this state then."""
    (programs := here / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def put(state: str) -> None:
        (programs / "systemctl").write_text(SYSTEMCTL.replace("@HERE@", str(here)).replace("@STATE@", state))
        (programs / "systemctl").chmod(0o755)

    return put


def test_revoking_beside_a_broker_that_watches_the_list_says_that_it_is_shut_out(
    systemd: Callable[[str], None], fleet: Fleet, fedeq: "Fedeq"
) -> None:
    systemd("active")
    told = fedeq("fleet", "revoke", "pi-01", "--json")
    assert (told.status, json.loads(told.out)["broker"]) == (0, True)
    assert "the broker has ended its connection" in told.err
    assert "fedeq aggregator deny" not in told.err


def test_a_broker_that_does_not_come_back_with_the_list_is_not_said_to_have_it(
    systemd: Callable[[str], None], fleet: Fleet
) -> None:
    systemd("failed")
    broker = BrokerHere(fleet.folder)
    fleet.revoke("pi-01")
    assert not broker.took_list(seconds=0.3)


def test_a_revoked_device_is_told_from_the_others_until_it_is_added_again(fleet: Fleet, fedeq: "Fedeq") -> None:
    fedeq("fleet", "revoke", "pi-01")
    on = fleet.device("pi-01").revoked
    assert on in fedeq("fleet", "list").err
    assert f"revoked on {on}" in fedeq("fleet", "status").err
    assert json.loads(fedeq("fleet", "status", "--json").out) == {"pi-01": {"revoked": on}, "pi-02": None}
    listed = json.loads(fedeq("fleet", "list", "--json").out)
    assert [known["revoked"] for known in listed.values()] == [on, ""]
    told = fedeq("fleet", "token", "pi-01")
    assert (told.status, told.out) == (Exit.MISUSED, "")
    assert "fedeq fleet add pi-01 --profile raspberry-pi-4" in told.err
    before = (fleet.folder / "fleet.toml").read_text()
    assert fedeq("fleet", "add", "pi-01", "--profile", "raspberry-pi-4").status == 0
    after = (fleet.folder / "fleet.toml").read_text()
    assert [line for line in before.splitlines() if not line.startswith("revoked")] == after.splitlines()
    assert fedeq("fleet", "token", "pi-01").status == 0


def test_the_list_has_every_device(fleet: Fleet, fedeq: "Fedeq") -> None:
    fleet.flashed("pi-02", "ssh://pi@10.0.0.5")
    assert "ssh://pi@10.0.0.5" in fedeq("fleet", "list").err
    assert set(json.loads(fedeq("fleet", "list", "--json").out)) == {"pi-01", "pi-02"}


def test_revoking_says_what_is_done_and_what_is_left_to_do(fleet: Fleet, fedeq: "Fedeq") -> None:
    fedeq("fleet", "token", "pi-01")
    told = fedeq("fleet", "revoke", "pi-01", "--json")
    assert told.status == 0
    untold = {"denied": False, "trouble": "", "broker": False}
    assert json.loads(told.out) == {"device": "pi-01", "certificates": 0, "tokens": 1, **untold}
    assert "fedeq aggregator deny pi-01" in told.err
    assert "fleet/gateway/crl.pem /etc/mosquitto/fedeq-edge && sudo systemctl restart mosquitto" in told.err


def test_revoking_fails_loudly_where_the_aggregator_could_not_be_told(here: Path, fedeq: "Fedeq") -> None:
    fedeq("fleet", "init", "plant", "--aggregator", "nowhere", "--host", "g")
    fedeq("fleet", "add", "pi-01", "--profile", "x86-64")
    told = fedeq("fleet", "revoke", "pi-01")
    assert told.status == 1
    assert "the aggregator was not told" in told.err


def test_an_unknown_device_has_no_token(fleet: Fleet, fedeq: "Fedeq") -> None:
    told = fedeq("fleet", "token", "pi-1")
    assert (told.status, told.out) == (2, "")
    assert "did you mean pi-01" in told.err


def test_a_passphrase_comes_from_the_environment_or_is_asked_for_by_name(
    here: Path, fedeq: "Fedeq", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDEQ_CA_PASSPHRASE", "correct horse battery staple")
    assert fedeq("fleet", "init", "plant", "--host", "g").status == 0
    fedeq("fleet", "add", "pi-01", "--profile", "x86-64")
    assert fedeq("fleet", "gateway", "--host", "h").status == 0
    monkeypatch.delenv("FEDEQ_CA_PASSPHRASE")
    told = fedeq("fleet", "revoke", "pi-01")
    assert told.status == 2
    assert "FEDEQ_CA_PASSPHRASE" in told.err


@pytest.mark.parametrize("listen", ["8443", "g:x", "127.0.0.1:70000"])
def test_an_address_that_is_none_is_refused(listen: str, fleet: Fleet, fedeq: "Fedeq") -> None:
    told = fedeq("fleet", "serve", "--listen", listen)
    assert told.status == 2
    assert "HOST:PORT" in told.err

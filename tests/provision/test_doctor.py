"""fedeq doctor: what it sees on host, gateway and device, and what never gets into a support bundle."""

import json
import os
import re
import shlex
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from cryptography import x509

from fedeq_edge.provision.actions import ActionState, Report
from fedeq_edge.provision.doctor import Here, find, look
from fedeq_edge.provision.doctor_host import of_device
from fedeq_edge.provision.findings import Check
from fedeq_edge.provision.fleet import Fleet
from fedeq_edge.provision.founding import new_gateway
from fedeq_edge.provision.redact import without
from fedeq_edge.provision.support import pack
from tests.conftest import RealMosquitto
from tests.provision.update_fleet import DAY_S, NOW, Member, Plant

OWN = "pi-01"


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    with Plant(tmp_path_factory.mktemp("plant")).serving() as made:
        text = (made.fleet.folder / "fleet.toml").read_text()
        (made.fleet.folder / "fleet.toml").write_text(text.replace("https://g", made.url))
        yield made


@pytest.fixture(scope="module")
def member(plant: Plant) -> Member:
    return plant.board(OWN)


@pytest.fixture
def folder(plant: Plant, tmp_path: Path) -> Path:
    """A copy of the fleet, to be maltreated."""
    return shutil.copytree(plant.fleet.folder, tmp_path / "fleet")


@pytest.fixture
def board(plant: Plant, member: Member, tmp_path: Path) -> Path:
    """A copy of the board's root."""
    return shutil.copytree(member.fake.root, tmp_path / "root", symlinks=True)


def verdicts(checks: list[Check], name: str) -> set[str]:
    return {check.verdict for check in checks if check.name == name}


def one(checks: list[Check], name: str) -> Check:
    (found,) = [check for check in checks if check.name == name]
    return found


def clock() -> float:
    return NOW


def test_a_machine_without_anything_of_ours_is_still_looked_at(tmp_path: Path) -> None:
    here = find(tmp_path / "fleet", None, tmp_path)
    assert here == Here()
    names = [check.name for check in look(here, clock)]
    assert names == ["python", "clock", "disk", "memory", "telemetry"]


def test_every_finding_that_is_not_well_has_a_remedy(folder: Path, board: Path, member: Member) -> None:
    (folder / "ca/ca.key").chmod(0o644)
    (board / "opt/fedeq-edge/state.json").write_text("{")
    for checks in (look(Here(fleet=folder), clock), look(Here(root=board), clock), of_device(Fleet.open(folder), OWN)):
        assert [check for check in checks if check.verdict != "ok"]
        for check in checks:
            assert bool(check.remedy) == (check.verdict != "ok"), check
            assert "\n" not in check.saw + check.remedy


def test_the_host_sees_its_service_and_a_key_that_others_may_read(folder: Path) -> None:
    checks = look(Here(fleet=folder), clock)
    assert verdicts(checks, "service") == {"ok"}
    assert not verdicts(checks, "keys")
    (folder / "tuf/keys/targets").chmod(0o640)
    check = one(look(Here(fleet=folder), clock), "keys")
    assert (check.verdict, check.remedy) == ("fail", f"chmod 600 {folder}/tuf/keys/targets")


def test_a_service_that_is_not_there_or_not_ours_is_told_apart(folder: Path, tmp_path: Path) -> None:
    text = (folder / "fleet.toml").read_text()
    (folder / "fleet.toml").write_text(re.sub(r'service = "[^"]*"', 'service = "https://127.0.0.1:1"', text))
    assert one(look(Here(fleet=folder), clock), "service").remedy == "on the host: fedeq fleet serve"
    (folder / "fleet.toml").write_text(text)
    (tmp_path / "other").mkdir()
    other = Plant(tmp_path / "other")
    shutil.copyfile(other.fleet.folder / "gateway/ca.crt", folder / "gateway/ca.crt")
    check = one(look(Here(fleet=folder), clock), "service")
    assert check.verdict == "fail"
    assert "not of this fleet" in check.saw
    assert f"{folder}/fleet.toml" in check.remedy


def test_certificates_that_end_soon_or_have_ended_are_named_with_their_date(board: Path) -> None:
    ends = x509.load_pem_x509_certificate((board / "etc/fedeq-edge/device.crt").read_bytes()).not_valid_after_utc
    for days_left, verdict in ((40, "ok"), (20, "warn"), (-1, "fail")):
        now = ends.timestamp() - days_left * DAY_S
        check = one(look(Here(root=board), lambda now=now: now), "certificate")  # type: ignore[misc]
        assert check.verdict == verdict
        assert f"{ends:%Y-%m-%d}" in check.saw


def test_a_gateway_whose_certificate_does_not_name_where_boards_ask_is_named(folder: Path) -> None:
    assert verdicts(look(Here(fleet=folder), clock), "gateway's names") == {"fail"}  # its broker is mqtts://g
    new_gateway(folder, ["127.0.0.1", "G"], clock=clock)
    assert verdicts(look(Here(fleet=folder), clock), "gateway's names") == {"ok"}
    text = (folder / "fleet.toml").read_text()
    (folder / "fleet.toml").write_text(text.replace('"mqtts://g"', '"mqtts://broker.local:8883"'))
    check = one(look(Here(fleet=folder), clock), "gateway's names")
    assert check.verdict == "fail"
    assert check.saw.endswith("names 127.0.0.1, G, and not broker.local")
    assert check.remedy == "fedeq fleet gateway --host broker.local --host 127.0.0.1 --host G"


def test_the_gateways_certificate_is_missed_half_a_year_before_its_end(folder: Path) -> None:
    server = folder / "gateway/server.crt"
    ends = x509.load_pem_x509_certificate(server.read_bytes()).not_valid_after_utc.timestamp()
    for days_left, verdict in ((200, "ok"), (100, "warn"), (-1, "fail")):
        now = ends - days_left * DAY_S
        checks = look(Here(fleet=folder), lambda now=now: now)  # type: ignore[misc]
        (check,) = [check for check in checks if str(server) in check.saw and check.name == "certificate"]
        assert check.verdict == verdict


def test_a_name_that_nobody_knows_is_told_from_a_gateway_that_is_off(folder: Path) -> None:
    text = (folder / "fleet.toml").read_text().replace("mqtts://g", "mqtts://gateway.invalid:8883")
    (folder / "fleet.toml").write_text(re.sub(r'service = "[^"]*"', 'service = "https://gateway.invalid:1"', text))
    checks = look(Here(fleet=folder), clock)
    for name in ("service", "broker"):
        check = one(checks, name)
        assert check.verdict == "fail"
        assert "no address is known" in check.saw
        assert "avahi-daemon" in check.remedy


def test_a_clock_in_1970_fails(tmp_path: Path) -> None:
    check = one(look(find(tmp_path / "fleet", None, tmp_path), lambda: 0.0), "clock")
    assert (check.verdict, check.remedy) == ("fail", "sudo timedatectl set-ntp true")
    assert check.saw.startswith("1970-01-01")


def test_a_device_tells_its_release_and_why_the_last_update_failed(board: Path) -> None:
    assert find(board / "none", None, board).root == board
    checks = look(Here(root=board), clock)
    assert one(checks, "release").saw == "1.0+a, confirmed; before it: None"
    state = json.loads((board / "opt/fedeq-edge/state.json").read_text())
    state["failed"] = {"version": "1.1+b", "log": ["solving", "Illegal instruction"]}
    (board / "opt/fedeq-edge/state.json").write_text(json.dumps(state))
    check = one(look(Here(root=board), clock), "last update")
    assert (check.verdict, check.saw) == ("warn", "release 1.1+b was left again: Illegal instruction")


def test_a_board_that_is_not_enrolled_is_told_to_enrol_and_not_to_restart_what_stays_off(board: Path) -> None:
    (board / "etc/fedeq-edge/device.crt").unlink()
    checks = look(Here(root=board), clock)
    check = one(checks, "identity")
    assert check.verdict == "fail"
    assert "device.crt is missing" in check.saw
    assert "fedeq device enrol" in check.remedy
    assert not [check.name for check in checks if "systemctl" in check.remedy and check.name.startswith("unit")]


@pytest.mark.parametrize("content", [None, "{"])
def test_a_board_whose_releases_are_not_known_is_flashed_once_more(board: Path, content: str | None) -> None:
    state = board / "opt/fedeq-edge/state.json"
    state.unlink() if content is None else state.write_text(content)
    check = one(look(Here(root=board), clock), "release")
    assert (check.verdict, check.remedy) == ("fail", "on the host: fedeq flash, once more")
    assert str(state) in check.saw


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("gateway/server.crt", "fedeq fleet gateway --host NAME"), ("ca/ca.key", "put it back from a backup")],
)
def test_a_file_that_the_fleet_misses_is_named_with_what_brings_it_back(folder: Path, name: str, remedy: str) -> None:
    (folder / name).unlink()
    (check,) = [check for check in look(Here(fleet=folder), clock) if check.saw == f"{folder / name} is missing"]
    assert (check.verdict, check.remedy) == ("fail", remedy)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_a_fleet_without_its_public_key_gets_it_back_by_the_command_that_is_named(folder: Path) -> None:
    public = folder / "keys/bundle.pub"
    before = public.read_bytes()
    public.unlink()
    check = one(look(Here(fleet=folder), clock), "trust")
    assert (check.verdict, check.saw) == ("fail", f"{public} is missing: no bundle can be flashed or published")
    subprocess.run(shlex.split(check.remedy), check=True)
    assert public.read_bytes() == before
    assert not verdicts(look(Here(fleet=folder), clock), "trust")


def test_a_fleet_without_its_signed_metadata_is_told_what_to_take_from_a_backup(folder: Path) -> None:
    shutil.rmtree(folder / "tuf/metadata")
    check = one(look(Here(fleet=folder), clock), "trust")
    assert (check.verdict, check.remedy.partition(",")[0]) == ("fail", f"cp -a BACKUP/tuf/metadata {folder}/tuf/")
    assert "1.root.json is missing: no board can enrol or update" in check.saw


@pytest.mark.parametrize(
    ("lost", "source"),
    [
        ("opt/fedeq-edge/bundle.pub", "keys/bundle.pub"),
        ("etc/fedeq-edge/root.json", "tuf/metadata/1.root.json"),
    ],
)
def test_a_board_that_has_lost_what_it_trusts_is_told_which_file_of_the_fleet_it_is(
    board: Path, plant: Plant, lost: str, source: str
) -> None:
    assert not verdicts(look(Here(root=board), clock), "trust")
    before = (board / lost).read_bytes()
    (board / lost).unlink()
    check = one(look(Here(root=board), clock), "trust")
    assert (check.verdict, check.saw) == ("fail", f"{board / lost} is missing: no update is taken")
    assert check.remedy.endswith(f"scp fleet/{source} root@BOARD:/{lost}")
    assert (plant.fleet.folder / source).read_bytes() == before


@pytest.mark.broker
def test_a_broker_is_asked_the_way_the_agent_asks(tmp_path: Path, mosquitto: RealMosquitto) -> None:
    config = tmp_path / "agent.toml"
    config.write_text(
        f'device = "a"\nstate = "state"\n[broker]\nurl = "mqtt://user:geheim@127.0.0.1:{mosquitto.port}"\n'
    )
    assert find(tmp_path, config, tmp_path).places == ["device"]
    checks = look(Here(config=config), clock)
    assert verdicts(checks, "broker") == {"ok"}
    mosquitto.kill()
    check = one(look(Here(config=config), clock), "broker")
    assert check.verdict == "fail"
    assert "geheim" not in str(check)


def test_settings_of_an_aggregator_are_a_gateway_and_its_state_is_read(tmp_path: Path) -> None:
    config = tmp_path / "aggregator.toml"
    config.write_text('federation = "plant"\n')
    here = find(tmp_path / "fleet", config, tmp_path)
    assert here.places == ["gateway"]
    assert one(look(here, clock), "state").verdict == "warn"
    (tmp_path / "state").mkdir()
    (tmp_path / "state/status.json").write_text(json.dumps({"pid": os.getpid(), "broker": "connected"}))
    check = one(look(here, clock), "state")
    assert check.verdict == "ok"
    assert "aggregator runs, broker: connected" in check.saw


def test_a_device_is_known_by_its_certificates_its_report_and_its_action(folder: Path) -> None:
    fleet = Fleet.open(folder, clock)
    assert "1 good" in one(of_device(fleet, OWN, clock), "identity").saw
    action = fleet.give_action(OWN, "update", "1.1+b", 60)
    said = Report(
        version="1.0+a",
        confirmed=True,
        healthy=False,
        last_error="a\n\x1b[31mSIGILL",
        action=ActionState(id=action.id, state="rolled_back", detail="x\nno"),
    )
    fleet.take_report(OWN, said)
    checks = of_device(fleet, OWN, clock)
    assert one(checks, OWN).verdict == "fail"
    assert one(checks, f"{OWN}: last error").saw == "?[31mSIGILL"
    assert one(checks, "last action").saw == "update 1.1+b: rolled_back (no)"
    fleet.revoke(OWN)
    check = one(of_device(fleet, OWN, clock), "identity")
    assert (check.verdict, check.saw) == ("warn", f"revoked on {datetime.fromtimestamp(NOW, UTC):%Y-%m-%d}")
    assert check.remedy.endswith(f"fedeq fleet add {OWN} --profile x86-64")
    assert verdicts(look(Here(fleet=folder), clock), OWN) == {"ok"}


SECRET_TEXTS = {
    'url = "mqtts://pi:hunter2secret@gateway:8883"': "hunter2secret",
    'url = "mqtts://pi:pa/ss@w0rdtail@gateway:8883"': "w0rdtail",
    'password = "correct horse"': "correct horse",
    "MQTT_PASSWORD=batterystaple": "batterystaple",
    '{"token": "fedeq1.pi-01.0123456789abcdef.ffff"}': "0123456789abcdef",
    "Authorization: Bearer abcdefghijklmnop": "abcdefghijklmnop",
    "use fedeq1.pi-01.deadbeefdeadbeef.00 now": "deadbeefdeadbeef",
    "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEIB\n-----END EC PRIVATE KEY-----": "MHcCAQEEIB",
    "cut off: -----BEGIN PRIVATE KEY-----\nMC4CAQAwBQ": "MC4CAQAwBQ",
    "api_key: 'sk-123456'": "sk-123456",
    'client_secret = "opensesame"': "opensesame",
}


@pytest.mark.parametrize(("text", "secret"), SECRET_TEXTS.items())
def test_secrets_are_cut_out_of_a_text_and_the_rest_stays(text: str, secret: str) -> None:
    shown = without(f"before\n{text}\nafter") if "cut off" not in text else without(f"before\n{text}")
    assert secret not in shown
    assert shown.startswith("before\n")


def test_no_secret_gets_into_a_support_bundle(folder: Path, board: Path, tmp_path: Path) -> None:
    fleet = Fleet.open(folder, clock)
    token = str(fleet.issue_token(OWN))
    (board / "etc/fedeq-edge/join.toml").write_text(f'service = "https://g"\ntoken = "{token}"\n')
    config = board / "etc/fedeq-edge/agent.toml"
    config.write_text("device = 'pi-01'\n[broker]\nurl = 'mqtts://pi:hunter2@g'\n# password = 'opensesame'\n")
    keys = [path for path in (*folder.rglob("*"), *board.rglob("*")) if path.is_file() and b"PRIVATE" in _start(path)]
    assert len(keys) >= 8  # CA, bundle, gateway, aggregator, four of TUF, device
    for number, key in enumerate(keys):  # and where nobody expects them
        shutil.copyfile(key, folder / "reports" / f"copy-{number}.json")
    leaked = Report(version="1.0+a", confirmed=True, healthy=True, last_error=f"join with {token} failed")
    fleet.take_report(OWN, leaked)
    here = Here(fleet=folder, config=config, root=board)
    names = pack(here, look(here, clock), tmp_path / "support.zip")
    assert {"checks.json", "machine.json", "fleet/fleet.toml", "config/agent.toml", "board/state.json"} <= set(names)
    assert (tmp_path / "support.zip").stat().st_mode & 0o777 == 0o600
    secrets = [token, token.split(".")[2], "hunter2", "opensesame"]
    secrets += [line for key in keys for line in key.read_text().splitlines() if line and not line.startswith("-----")]
    with zipfile.ZipFile(tmp_path / "support.zip") as archive:
        assert sorted(archive.namelist()) == names
        for name in names:
            content = archive.read(name).decode()
            assert not [secret for secret in secrets if secret in content], name
        assert msgspec.json.decode(archive.read("checks.json"), type=list[Check])
        assert "1.0+a" in archive.read(f"fleet/reports/{OWN}.json").decode()


def _start(path: Path) -> bytes:
    return path.read_bytes()[:64]

"""The systemd units of devices/ and broker/: systemd's own checkers accept them, and they are hardened."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fedeq_edge import updater
from fedeq_edge.cli import command_line
from fedeq_edge.kit import folder
from fedeq_edge.provision import release
from fedeq_edge.provision.brokerlist import MARK
from fedeq_edge.provision.brokerlist import WATCHER as WATCHER_NAME

AGENT, UPDATER = folder("devices") / release.AGENT, folder("devices") / release.UPDATER
AGGREGATOR, SERVICE = folder("broker") / "fedeq-aggregator.service", folder("broker") / "fedeq-fleet@.service"
REVOKED, WATCHER = folder("broker") / "fedeq-revoked.service", folder("broker") / WATCHER_NAME
OURS = (AGENT, UPDATER, AGGREGATOR, SERVICE)
UNITS = (*OURS, REVOKED)


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: apt-get install systemd")
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_a_unit_is_what_systemd_understands(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name
    copy.write_text(re.sub(r"/opt/fedeq-edge/\S+/fedeq\S*", "/bin/true", unit.read_text()))  # it must exist
    ended = analyze("verify", copy)
    assert (ended.returncode, ended.stderr) == (0, "")  # an unknown key is told, and not an error


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_a_unit_is_exposed_by_2_of_10_at_most(unit: Path, tmp_path: Path) -> None:
    instance = tmp_path / unit.name.replace("@", "@somebody")  # of a template, what is judged is an instance
    instance.write_text(unit.read_text())
    ended = analyze("security", "--offline=true", "--threshold=20", instance)
    assert ended.returncode == 0, ended.stdout


def test_the_agent_is_ready_only_when_its_main_process_says_so() -> None:
    lines = AGENT.read_text().splitlines()
    assert {"Type=notify", "NotifyAccess=main", "DynamicUser=yes", "ProtectSystem=strict"} <= set(lines)
    assert "Environment=ORT_DISABLE_TELEMETRY=1" in lines


def test_the_agent_sees_its_settings_and_its_identity_and_nothing_else_of_etc() -> None:
    loaded = [line for line in AGENT.read_text().splitlines() if line.startswith("LoadCredential=")]
    assert loaded == [
        f"LoadCredential={name}:/etc/fedeq-edge/{name}" for name in ("agent.toml", "ca.crt", "device.crt", "device.key")
    ]


def test_the_list_of_the_revoked_is_looked_for_where_the_fleets_service_has_its_folder(tmp_path: Path) -> None:
    (watched,) = re.findall(rf"^PathExists=(.*)/gateway/{MARK}$", WATCHER.read_text(), re.MULTILINE)
    assert f"--fleet {watched}\n" in SERVICE.read_text()
    assert f"NEW={watched}/gateway " in REVOKED.read_text()
    for unit in (REVOKED, WATCHER):
        shutil.copy(unit, tmp_path)
    ended = analyze("verify", tmp_path / WATCHER.name)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_what_is_given_to_mosquitto_is_what_its_shipped_settings_read() -> None:
    (read,) = re.findall(r"^crlfile (.*)$", (folder("broker") / "mosquitto.conf").read_text(), re.MULTILINE)
    assert f"READ={read}\n" in REVOKED.read_text()


@pytest.mark.parametrize("unit", [AGENT, UPDATER], ids=lambda path: path.stem)
def test_a_board_that_is_not_enrolled_starts_nothing_that_would_fail_for_ever(unit: Path) -> None:
    assert "ConditionPathExists=/etc/fedeq-edge/device.crt" in unit.read_text().splitlines()


@pytest.mark.parametrize("unit", OURS, ids=lambda path: path.stem)
def test_a_unit_starts_what_the_command_line_or_a_release_has(unit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = re.search(r"^ExecStart=/opt/fedeq-edge/(current|venv)/bin/(\S+) ?(.*)$", unit.read_text(), re.MULTILINE)
    assert started is not None
    assert started[2] in ("fedeq", "fedeq-updater")
    words = [word for word in started[3].split(" --")[0].split() if word]
    main = updater.main if started[2] == "fedeq-updater" else command_line()
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert not ended.value.code
    for option in re.findall(r"--[a-z]+", started[3]):
        assert option in capsys.readouterr().out


def test_the_aggregators_key_may_be_missing_where_its_broker_has_no_tls() -> None:
    lines = AGGREGATOR.read_text().splitlines()
    for name in ("ca.crt", "aggregator.crt", "aggregator.key"):
        assert f"LoadCredential={name}:/etc/fedeq-edge/{name}" in lines
        assert f"SetCredential={name}:none" in lines

"""The systemd units of devices/: systemd's own checkers accept them, and they are hardened."""

import shutil
import subprocess
from pathlib import Path

import pytest

from fedeq_edge.kit import folder
from fedeq_edge.provision import release

AGENT, UPDATER = folder("devices") / release.AGENT, folder("devices") / release.UPDATER


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: apt-get install systemd")
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("unit", [AGENT, UPDATER], ids=lambda path: path.stem)
def test_a_unit_is_what_systemd_understands(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/opt/fedeq-edge/current/bin/fedeq", "/bin/true"))  # it must exist
    ended = analyze("verify", copy)
    assert (ended.returncode, ended.stderr) == (0, "")  # an unknown key is told, and not an error


@pytest.mark.parametrize("unit", [AGENT, UPDATER], ids=lambda path: path.stem)
def test_a_unit_is_exposed_by_2_of_10_at_most(unit: Path) -> None:
    ended = analyze("security", "--offline=true", "--threshold=20", unit)
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

"""release.py as its own process in temporary roots: install, trial, rollback, and everything it refuses."""

import ast
import contextlib
import fcntl
import gzip
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedeq_edge import errors
from fedeq_edge.provision import release
from tests.provision.release_board import (
    INSTALLER,
    KEY,
    PUBLIC_PEM,
    FakeBoard,
    bundle,
    digest,
    files_of,
    manifest_json,
    packed,
)

# Journals as systemd 252 writes them.
ENDED = ["fedeq-agent.service: Failed with result 'exit-code'.", "Failed to start fedeq-agent.service - fedeq-edge."]
PYTHON_FAILS = [
    "ModuleNotFoundError: No module named 'numpy'",
    "fedeq-agent.service: Main process exited, code=exited, status=1/FAILURE",
    *ENDED,
]
KILLED = ["fedeq-agent.service: Main process exited, code=killed, status=4/ILL", *ENDED]
NO_KEY = [
    "fedeq-agent.service: Failed to set up credentials: No such file or directory",
    "fedeq-agent.service: Main process exited, code=exited, status=243/CREDENTIALS",
    *ENDED,
]


@pytest.fixture
def board(tmp_path: Path) -> FakeBoard:
    return FakeBoard(tmp_path)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> FakeBoard:
    folder = tmp_path_factory.mktemp("template")
    board = FakeBoard(folder)
    assert board.install(bundle(folder, "v1"))[0] == 0
    board.calls()
    return board


@pytest.fixture
def running(template: FakeBoard, board: FakeBoard) -> FakeBoard:
    """A board on which v1 is confirmed and runs."""
    shutil.copytree(template.root, board.root, symlinks=True, dirs_exist_ok=True)
    shutil.copytree(template.scripts, board.scripts, dirs_exist_ok=True)
    return board


def still_runs_v1(board: FakeBoard) -> None:
    """Nothing that was asked has changed the board or left something on it."""
    status = board.call("status")[1]
    assert board.runs() == "v1"
    assert board.releases() == {"v1"}
    assert (status["current"], status["confirmed"], status["trial"]) == ("v1", "v1", None)


# What it is


def test_the_installer_is_python_3_9_and_imports_the_standard_library_alone() -> None:
    tree = ast.parse(INSTALLER.read_text(), feature_version=(3, 9))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= sys.stdlib_module_names


@pytest.mark.parametrize("name", ["python3.9", "python3.10", "python3.12", "python3.13"])
def test_it_installs_under_other_pythons(name: str, board: FakeBoard, tmp_path: Path) -> None:
    found = shutil.which(name)
    if found is None or subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode:
        pytest.skip(f"{name} is not installed")
    path = bundle(tmp_path, "v1")
    command = [found, "-IWerror", *board.command("install", path, "--sha256", digest(path), "--trial-s", "0")[2:]]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=board.environment | HOME)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert board.runs() == "v1"


HOME = {name: os.environ[name] for name in ("HOME", "PYENV_ROOT", "PYENV_VERSION") if name in os.environ}


def test_its_exit_statuses_are_those_of_the_package() -> None:
    assert {own.name: own.value for own in release.Exit}.items() <= {one.name: one.value for one in errors.Exit}.items()


# The way it goes


def test_a_release_is_installed_started_and_confirmed(board: FakeBoard, tmp_path: Path) -> None:
    status, told, _ = board.install(bundle(tmp_path, "v1"))

    assert (status, told["changed"], told["restarted"]) == (0, True, True)
    assert (told["current"], told["confirmed"], told["previous"], told["trial"]) == ("v1", "v1", None, None)
    assert board.runs() == "v1"
    assert json.loads((board.base / "state.json").read_text())["confirmed"] == "v1"
    assert stat.S_IMODE((board.base / "releases/v1/bin/fedeq").stat().st_mode) == 0o755
    assert stat.S_IMODE((board.base / "releases/v1/config/health").stat().st_mode) == 0o644
    assert (board.base / "release.py").read_bytes().endswith(b"# v1\n")
    assert board.calls() == [
        "enable fedeq-agent.service",
        "daemon-reload",
        "reset-failed fedeq-agent.service",
        "restart fedeq-agent.service",
        "show fedeq-agent.service --property=ActiveState --property=InvocationID",
        "--no-block restart fedeq-updater.service",
    ]


def test_an_update_brings_its_unit_and_its_installer_and_enables_nothing_again(
    running: FakeBoard, tmp_path: Path
) -> None:
    status, told, _ = running.install(bundle(tmp_path, "v2"))

    assert (status, told["current"], told["confirmed"], told["previous"]) == (0, "v2", "v2", "v1")
    assert running.runs() == "v2"
    assert (running.root / "etc/systemd/system/fedeq-agent.service").read_text().endswith("# v2\n")
    assert (running.base / "release.py").read_bytes().endswith(b"# v2\n")
    assert "daemon-reload" in (calls := running.calls())
    assert not [call for call in calls if call.startswith("enable")]


def test_the_command_is_on_the_path_whichever_release_runs(running: FakeBoard, tmp_path: Path) -> None:
    link = running.root / "usr/local/bin/fedeq"
    assert str(link.readlink()) == "/opt/fedeq-edge/current/bin/fedeq"
    running.install(bundle(tmp_path, "v2"))
    assert str(link.readlink()) == "/opt/fedeq-edge/current/bin/fedeq"


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_command_of_that_name_that_is_somebody_elses_stays(kind: str, board: FakeBoard, tmp_path: Path) -> None:
    (folder := board.root / "usr/local/bin").mkdir(parents=True)
    theirs = folder / "fedeq"
    theirs.write_text("theirs") if kind == "file" else theirs.symlink_to("/opt/other/fedeq")
    assert board.install(bundle(tmp_path, "v1"))[0] == 0
    assert theirs.read_text() == "theirs" if kind == "file" else str(theirs.readlink()) == "/opt/other/fedeq"


def test_a_path_that_cannot_be_written_keeps_no_release_away(board: FakeBoard, tmp_path: Path) -> None:
    (board.root / "usr").mkdir()
    (board.root / "usr/local").touch()
    assert board.install(bundle(tmp_path, "v1"))[0] == 0
    assert board.runs() == "v1"


def test_the_same_release_again_changes_nothing(running: FakeBoard, tmp_path: Path) -> None:
    status, told, _ = running.install(bundle(tmp_path, "v1"))

    assert (status, told["changed"], told["restarted"]) == (0, False, False)
    assert not [call for call in running.calls() if call.startswith("restart")]
    still_runs_v1(running)


def test_a_release_that_never_gets_ready_is_left_again_and_its_last_lines_are_told(
    running: FakeBoard, tmp_path: Path
) -> None:
    status, told, line = running.install(bundle(tmp_path, "v2", "broken"))

    assert status == errors.Exit.ROLLED_BACK
    assert told["failed"] == {"version": "v2", "log": ["Illegal instruction"]}
    assert line == "release.py: release v2 is unhealthy, v1 runs again; its last line: Illegal instruction\n"
    assert (running.root / "etc/systemd/system/fedeq-agent.service").read_text().endswith("# v1\n")
    assert (running.base / "release.py").read_bytes().endswith(b"# v1\n")
    assert (running.scripts / "active").exists()
    still_runs_v1(running)


def test_a_release_that_falls_after_ready_is_left_again(running: FakeBoard, tmp_path: Path) -> None:
    status, told, line = running.install(bundle(tmp_path, "v2", "falls"), "--trial-s", "0.01")

    assert status == errors.Exit.ROLLED_BACK
    assert "out of memory" in line
    assert told["failed"]["version"] == "v2"
    still_runs_v1(running)


def test_a_first_release_that_is_unhealthy_stays_for_another_try(board: FakeBoard, tmp_path: Path) -> None:
    path = bundle(tmp_path, "v1", "broken")
    status, told, line = board.install(path)
    assert status == errors.Exit.ROLLED_BACK
    assert (told["current"], told["confirmed"], told["failed"]["log"]) == ("v1", None, ["Illegal instruction"])
    assert "no earlier one" in line

    status, told, _ = board.install(bundle(tmp_path, "v2"))
    assert (status, told["confirmed"], told["previous"]) == (0, "v2", None)
    assert board.releases() == {"v2"}


def test_two_releases_to_go_back_to_are_kept(running: FakeBoard, tmp_path: Path) -> None:
    for version in ("v2", "v3", "v4", "v5"):
        assert running.install(bundle(tmp_path, version))[0] == 0
    assert running.releases() == {"v3", "v4", "v5"}
    assert running.call("rollback", "--trial-s", "0")[1]["current"] == "v4"
    status, told, _ = running.call("rollback", "--trial-s", "0")
    assert (status, told["current"], told["confirmed"], told["previous"]) == (0, "v3", "v3", None)
    assert running.runs() == "v3"
    status, _, line = running.call("rollback")
    assert (status, line) == (
        1,
        "release.py: there is no earlier release to go back to; install another one\n",
    )


def test_without_start_nothing_is_restarted_until_start_is_asked_for(running: FakeBoard, tmp_path: Path) -> None:
    status, told, _ = running.install(bundle(tmp_path, "v2"), "--no-start")
    assert (status, told["current"], told["confirmed"]) == (0, "v2", "v1")
    assert told["trial"]["version"] == json.loads((running.base / "state.json").read_text())["current"] == "v2"
    assert not [call for call in running.calls() if call.startswith("restart")]

    status, told, _ = running.call("start", "--trial-s", "0")
    assert (status, told["confirmed"], told["trial"]) == (0, "v2", None)


def test_a_rollback_of_a_trial_ends_it(running: FakeBoard, tmp_path: Path) -> None:
    running.install(bundle(tmp_path, "v2"), "--no-start")
    status, told, _ = running.call("rollback", "--trial-s", "0")
    assert (status, told["current"], told["failed"]["version"]) == (0, "v1", "v2")
    still_runs_v1(running)


def test_a_confirmed_release_stays_confirmed(running: FakeBoard) -> None:
    assert running.call("confirm")[0] == 0
    still_runs_v1(running)


def test_units_that_cannot_be_enabled_are_enabled_at_the_next_try(board: FakeBoard, tmp_path: Path) -> None:
    (board.scripts / "cannot-enable").touch()
    status, _, line = board.install(bundle(tmp_path, "v1"))
    assert status == errors.Exit.FAILED
    assert "Read-only file system" in line

    (board.scripts / "cannot-enable").unlink()
    board.calls()
    assert board.install(bundle(tmp_path, "v1"))[0] == 0
    assert "enable fedeq-agent.service" in board.calls()


def test_a_clock_in_1970_is_no_obstacle(board: FakeBoard, tmp_path: Path) -> None:
    path = bundle(tmp_path, "v1")
    program = (
        "import runpy, sys, time; time.time = lambda: 12.0; sys.argv = sys.argv[1:];"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    install = board.command("install", path, "--sha256", digest(path), "--no-start")[2:]
    ended = subprocess.run(
        [sys.executable, "-c", program, *install], env=board.environment, check=True, capture_output=True
    )
    assert json.loads(ended.stdout)["trial"] == {"version": "v1", "boots": 0, "since": 12.0}
    status, told, _ = board.call("start", "--trial-s", "0")
    assert (status, told["confirmed"]) == (0, "v1")


def test_what_the_disk_has_damaged_is_mended_by_the_same_bundle(running: FakeBoard, tmp_path: Path) -> None:
    running.wound("v1", "bin/fedeq")
    (running.base / "releases/v1/config/health").unlink()
    status, told, _ = running.install(bundle(tmp_path, "v1"))
    assert (status, told["changed"]) == (0, True)
    still_runs_v1(running)


def test_who_asked_may_be_gone_when_the_work_is_done(running: FakeBoard, tmp_path: Path) -> None:
    path = bundle(tmp_path, "v2")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as nobody:
        subprocess.run(
            running.command("install", path, "--sha256", digest(path), "--trial-s", "0"),
            env=running.environment,
            stdout=nobody,
            check=False,
        )
    assert running.call("status")[1]["confirmed"] == "v2"
    assert running.calls()[-1] == "--no-block restart fedeq-updater.service"


# After a reboot


def test_a_trial_that_gets_ready_after_a_reboot_is_confirmed(running: FakeBoard, tmp_path: Path) -> None:
    running.install(bundle(tmp_path, "v2"), "--no-start")
    assert running.call("boot")[1]["trial"]["boots"] == 1
    assert running.call("ready")[1]["confirmed"] == "v2"


def test_the_third_start_of_a_trial_goes_back(running: FakeBoard, tmp_path: Path) -> None:
    running.install(bundle(tmp_path, "v2"), "--no-start")
    start = "Starting fedeq-agent.service - fedeq-edge device agent...\n"
    (running.scripts / "log").write_text(f"{start}cannot find numpy\n{start}")  # the third start
    assert [running.call("boot")[1]["current"] for _ in range(3)] == ["v2", "v2", "v1"]
    told = running.call("status")[1]
    assert (told["confirmed"], told["trial"]) == ("v1", None)
    assert told["failed"] == {"version": "v2", "log": ["cannot find numpy"]}
    assert (running.root / "etc/systemd/system/fedeq-agent.service").read_text().endswith("# v1\n")


def test_a_trial_that_the_power_cut_has_damaged_goes_back_at_once(running: FakeBoard, tmp_path: Path) -> None:
    running.install(bundle(tmp_path, "v2"), "--no-start")
    running.wound("v2", "bin/fedeq")
    assert running.call("boot")[1]["current"] == "v1"


def test_a_first_release_has_nowhere_to_go_back_to(board: FakeBoard, tmp_path: Path) -> None:
    board.install(bundle(tmp_path, "v1"), "--no-start")
    assert {board.call("boot")[1]["current"] for _ in range(5)} == {"v1"}
    assert board.call("ready")[1]["confirmed"] == "v1"
    assert board.call("boot") == board.call("ready") == (0, {}, "")


@pytest.mark.parametrize(
    ("log", "told"),
    [
        (["Starting fedeq-agent.service - fedeq-edge device agent...", *PYTHON_FAILS], "No module named 'numpy'"),
        ([*PYTHON_FAILS, "Starting fedeq-agent.service - fedeq-edge device agent...", *KILLED], "status=4/ILL"),
        (["Starting fedeq-edge device agent...", *NO_KEY], "Failed to set up credentials"),
        (["Starting fedeq-edge device agent..."], "it said nothing"),
    ],
)
def test_the_line_that_tells_most_is_told(log: list[str], told: str, running: FakeBoard, tmp_path: Path) -> None:
    (running.scripts / "log").write_text("".join(f"{line}\n" for line in log))
    path = bundle(tmp_path, "v2", "silent")
    status, _, line = running.install(path)
    assert (status, told in line) == (errors.Exit.ROLLED_BACK, True), line


def test_the_unit_leaves_an_installer_at_work_alone(running: FakeBoard, tmp_path: Path) -> None:
    (running.scripts / "hooks").touch()
    assert running.install(bundle(tmp_path, "v2", "broken"))[0] == errors.Exit.ROLLED_BACK
    assert running.install(bundle(tmp_path, "v3"))[0] == 0
    v2, v1, v3 = ["boot"], ["boot", "ready"], ["boot", "ready"]
    assert (running.scripts / "hooks").read_text().split() == [*v2, *v1, *v3]  # and not a word of what they did


def test_a_state_that_the_disk_has_eaten_is_made_again(running: FakeBoard, tmp_path: Path) -> None:
    (running.base / "state.json").write_bytes(b"\0" * 100)
    status, told, _ = running.call("sweep")
    assert (status, told["current"], told["confirmed"]) == (0, "v1", "v1")


def test_a_link_that_is_lost_is_made_again(running: FakeBoard) -> None:
    (running.base / "current").unlink()
    assert running.call("boot")[1]["current"] == "v1"
    still_runs_v1(running)


# What it refuses


def member(name: str, **changes: Any) -> tuple[tarfile.TarInfo, bytes]:
    found = tarfile.TarInfo(name)
    for key, value in changes.items():
        setattr(found, key, value)
    return found, b""


FILES = files_of("v2")
HOSTILE = {
    "a changed byte": lambda path: packed(path, manifest_json("v2", FILES), {**FILES, "config/health": b"oK"}),
    "a longer file": lambda path: packed(path, manifest_json("v2", FILES), {**FILES, "config/health": b"ok "}),
    "a shorter file": lambda path: packed(path, manifest_json("v2", FILES), {**FILES, "config/health": b"o"}),
    "an additional file": lambda path: packed(path, manifest_json("v2", FILES), {**FILES, "site/evil.py": b"1"}),
    "a missing file": lambda path: packed(
        path, manifest_json("v2", FILES), {name: FILES[name] for name in FILES if name != "site/empty.py"}
    ),
    "a file twice": lambda path: packed(path, manifest_json("v2", FILES), FILES, more=[member("site/empty.py")]),
    "a link": lambda path: packed(
        path, manifest_json("v2", FILES), FILES, more=[member("l", type=tarfile.SYMTYPE, linkname="/etc/shadow")]
    ),
    "a hard link": lambda path: packed(
        path, manifest_json("v2", FILES), FILES, more=[member("l", type=tarfile.LNKTYPE, linkname="bin/fedeq")]
    ),
    "a device": lambda path: packed(path, manifest_json("v2", FILES), FILES, more=[member("d", type=tarfile.CHRTYPE)]),
    "a path outside": lambda path: packed(path, manifest_json("v2", {**FILES, "../x": b"1"}), {**FILES, "../x": b"1"}),
    "an absolute path": lambda path: packed(path, manifest_json("v2", {**FILES, "/x": b"1"}), {**FILES, "/x": b"1"}),
    "a file that is a folder": lambda path: packed(
        path, manifest_json("v2", {**FILES, "bin": b"1"}), {**FILES, "bin": b"1"}
    ),
    "a version that is a path": lambda path: packed(path, manifest_json("../v2", FILES), FILES),
    "another format": lambda path: packed(path, manifest_json("v2", FILES, format=2), FILES),
    "a file of many gigabytes": lambda path: packed(
        path, manifest_json("v2", FILES).replace(b'"size":2', b'"size":2222222222222'), FILES
    ),
    "a manifest that is no manifest": lambda path: packed(path, b'{"format":1}', FILES),
    "a manifest that is no JSON": lambda path: packed(path, b"{", FILES),
    "another fleet's signature": lambda path: packed(
        path,
        manifest_json("v2", FILES),
        FILES,
        signature=Ed25519PrivateKey.from_private_bytes(bytes(32)).sign(manifest_json("v2", FILES)),
    ),
    "no signature": lambda path: packed(path, manifest_json("v2", FILES), FILES, signature=b""),
    "no manifest": lambda path: _written(path, gzip.compress(bytes(10240))),
    "no archive": lambda path: _written(path, b"not a tar.gz"),
    "half an archive": lambda path: _written(
        path, packed(path, manifest_json("v2", FILES), {**FILES, "site/z": os.urandom(9999)}).read_bytes()[:-5000]
    ),
}


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("what", HOSTILE)
def test_a_bundle_is_refused_in_one_line_that_has(what: str, running: FakeBoard, tmp_path: Path) -> None:
    path = HOSTILE[what](tmp_path / "hostile.tar.gz")
    status, told, line = running.install(path)

    assert status == errors.Exit.VERIFICATION, line
    assert line.startswith("release.py: ")
    assert line.count("\n") == 1
    assert told["error"] in line
    assert not [call for call in running.calls() if call.startswith(("restart", "daemon"))]
    still_runs_v1(running)


def test_a_bundle_with_another_sha256_is_not_looked_into(running: FakeBoard, tmp_path: Path) -> None:
    path = bundle(tmp_path, "v2")
    status, _, line = running.call("install", path, "--sha256", digest(path).replace(digest(path)[0], "x", 1))
    assert (status, "sha256" in line) == (errors.Exit.VERIFICATION, True)
    still_runs_v1(running)


def test_another_key_can_be_named(board: FakeBoard, tmp_path: Path) -> None:
    (board.base / "bundle.pub").unlink()
    path = bundle(tmp_path, "v1")
    status, _, line = board.install(path)
    assert (status, "bundle.pub" in line) == (errors.Exit.MISUSED, True)

    (tmp_path / "key.pub").write_bytes(PUBLIC_PEM)
    assert board.install(path, "--key", tmp_path / "key.pub")[0] == 0

    (tmp_path / "key.pub").write_text("-----BEGIN PUBLIC KEY-----\nMCow\n-----END PUBLIC KEY-----\n")
    status, _, line = board.install(path, "--key", tmp_path / "key.pub")
    assert (status, "no Ed25519 key" in line) == (errors.Exit.VERIFICATION, True)


def test_a_bundle_that_is_not_there_is_a_misuse(running: FakeBoard, tmp_path: Path) -> None:
    status, _, line = running.call("install", tmp_path / "none.tar.gz", "--sha256", "0" * 64)
    assert (status, "none.tar.gz cannot be read: No such file" in line) == (errors.Exit.MISUSED, True)


def test_a_release_beyond_the_limit_of_a_file_finds_no_space(running: FakeBoard, tmp_path: Path) -> None:
    path = bundle(tmp_path, "v2", ballast=[bytes(2 << 20)])
    status, _, line = running.process("install", path, "--sha256", digest(path), file_bytes=1 << 20)
    assert (status, "needs 18 MB free" in line) == (errors.Exit.NO_SPACE, True)
    still_runs_v1(running)


@pytest.mark.parametrize("megabytes", [4, 20])
def test_a_full_disk_is_found_before_anything_is_unpacked(megabytes: int, running: FakeBoard, tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare -rm is not allowed here; a small tmpfs needs a mount namespace")
    path = bundle(tmp_path, "v2", ballast=[bytes(6 << 20)])
    small = tmp_path / "small"
    small.mkdir()
    install = running.command("install", path, "--sha256", digest(path), "--trial-s", "0")
    install[install.index(str(running.root))] = str(small)
    script = 'mount -t tmpfs -o size=$1m none "$2" && cp -a "$3"/. "$2" && shift 3 && "$@"; s=$?; ls "$0"; exit $s'
    releases = small / "opt/fedeq-edge/releases"
    shell = ["unshare", "-rm", "sh", "-c", script, str(releases), str(megabytes), str(small), str(running.root)]
    ended = subprocess.run([*shell, *install], env=running.environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.splitlines()[-1]) == (errors.Exit.NO_SPACE, "v1"), ended.stderr
    assert json.loads(ended.stdout.splitlines()[0])["current"] == "v1"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architecture": "aarch64"}, "bundle is for aarch64 and this system is x86_64; build one for this board's"),
        ({"python": "3.13"}, "bundle is for python 3.13 and /usr/bin/python3 is 3.11; build it with --python"),
        ({"glibc": "2.99"}, "bundle needs glibc 2.99 and this system has 2.36; install a newer OS"),
    ],
)
def test_a_bundle_for_another_platform_is_refused(
    changes: dict[str, Any], told: str, running: FakeBoard, tmp_path: Path
) -> None:
    make_system(running.root, 0x3E)
    status, _, line = running.install(bundle(tmp_path, "v2", **changes))
    assert status == errors.Exit.WRONG_PLATFORM
    assert line.startswith(f"release.py: {told}")
    still_runs_v1(running)


def test_a_32_bit_system_is_known_by_its_programs_whatever_its_kernel(running: FakeBoard, tmp_path: Path) -> None:
    make_system(running.root, 0x28)
    status, _, line = running.install(bundle(tmp_path, "v2", architecture="aarch64"))
    assert (status, "install a 64-bit OS" in line) == (errors.Exit.WRONG_PLATFORM, True)


def test_a_bundle_for_a_python_that_stands_beside_the_systems_own_is_taken(running: FakeBoard, tmp_path: Path) -> None:
    make_system(running.root, 0x3E)
    (running.root / "usr/local/bin/python3.12").touch()
    status, told, _ = running.install(bundle(tmp_path, "v2", python="3.12"))
    assert (status, told["current"]) == (0, "v2")


def make_system(root: Path, machine: int) -> None:
    """A python 3.11 of that ELF machine and a glibc 2.36, as far as anybody looks."""
    binaries, libraries = root / "usr/bin", root / "lib/x86_64-linux-gnu"
    binaries.mkdir(parents=True)
    libraries.mkdir(parents=True)
    (binaries / "python3.11").write_bytes(b"\x7fELF" + bytes(14) + machine.to_bytes(2, "little"))
    (binaries / "python3").symlink_to("python3.11")
    (libraries / "libc.so.6").write_bytes(b"\0GNU C Library (Debian GLIBC 2.36-9) stable release version 2.36.\n\0")


def test_a_second_installer_is_refused_and_the_status_is_not(running: FakeBoard, tmp_path: Path) -> None:
    with (running.base / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, told, line = running.install(bundle(tmp_path, "v2"))
        assert (status, "another installer is at work" in line) == (errors.Exit.BUSY, True)
        assert told["current"] == running.call("status")[1]["current"] == "v1"
        assert running.call("boot") == (0, {}, "")


def test_misuse_is_told_by_status_2(board: FakeBoard) -> None:
    ended = subprocess.run(board.command("install"), capture_output=True, text=True, check=False)
    assert (ended.returncode, "usage: release.py" in ended.stderr) == (2, True)


# Signatures


def test_signatures_agree_with_those_of_cryptography() -> None:
    key = KEY.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    for size in (0, 1, 200, 5000):
        message = bytes(number % 251 for number in range(size))
        signature = KEY.sign(message)
        assert release.signed(key, signature, message)
        for bit in range(0, 512, 37):
            wrong = bytearray(signature)
            wrong[bit // 8] ^= 1 << bit % 8
            assert not release.signed(key, bytes(wrong), message)
        assert not release.signed(key, signature, message + b"\0")


ORDER = 2**252 + 27742317777372353535851937790883648493
LOW_ORDER = [bytes(32), (1).to_bytes(32, "little"), (2**255 - 20).to_bytes(32, "little")]
NOT_CANONICAL = (2**255 - 18).to_bytes(32, "little")


def _holds_for_cryptography(key: bytes, signature: bytes) -> bool:
    with contextlib.suppress(InvalidSignature):
        Ed25519PublicKey.from_public_bytes(key).verify(signature, b"message")
        return True
    return False


def test_a_signature_cannot_be_changed_into_another_one_that_holds() -> None:
    key = KEY.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    signature = KEY.sign(b"message")
    s = int.from_bytes(signature[32:], "little")
    assert release.signed(key, signature, b"message")
    assert not release.signed(key, signature[:32] + (s + ORDER).to_bytes(32, "little"), b"message")


@pytest.mark.parametrize(
    "key", [KEY.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw), *LOW_ORDER, NOT_CANONICAL], ids=range(5)
)
@pytest.mark.parametrize("R", [*LOW_ORDER, NOT_CANONICAL, b"\xff" * 32], ids=range(5))
@pytest.mark.parametrize("s", [0, 1, ORDER - 1, ORDER])
def test_odd_points_are_judged_as_cryptography_judges_them(key: bytes, R: bytes, s: int) -> None:
    signature = R + s.to_bytes(32, "little")
    theirs = _holds_for_cryptography(key, signature) and key != NOT_CANONICAL  # RFC 8032 has us refuse this one
    assert release.signed(key, signature, b"message") == theirs


@pytest.mark.parametrize("size", [(0, 64), (31, 64), (32, 63), (32, 65)])
def test_keys_and_signatures_of_other_sizes_do_not_hold(size: tuple[int, int]) -> None:
    assert not release.signed(bytes(size[0]), bytes(size[1]), b"")


def test_openssl_signs_what_holds_here(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, message = tmp_path / "key.pem", tmp_path / "message"
    message.write_bytes(b"manifest")
    with contextlib.chdir(tmp_path):
        for command in (
            "genpkey -algorithm ed25519 -out key.pem",
            "pkey -in key.pem -pubout -out pub.pem",
            "pkeyutl -sign -inkey key.pem -rawin -in message -out sig",
        ):
            subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
    assert key.exists()
    public = release.public_key((tmp_path / "pub.pem").read_bytes())
    assert release.signed(public, (tmp_path / "sig").read_bytes(), b"manifest")

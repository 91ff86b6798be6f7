"""What is sent to boards as scripts: they run on older pythons than ours, and judge a tree that is not running."""

import ast
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import fedeq_edge
from fedeq_edge.errors import ProvisionError
from fedeq_edge.provision.facts import SCRIPT, parse
from fedeq_edge.provision.targets.rootfs import RootfsTarget
from tests.provision.flash.board import system

PROVISION = Path(fedeq_edge.__file__).parent / "provision"


@pytest.mark.parametrize(
    ("name", "version"), [("board_probe.py", (3, 7)), ("board_heartbeat.py", (3, 8)), ("first_boot.py", (3, 9))]
)
def test_a_script_for_boards_parses_in_the_oldest_python_it_may_meet(name: str, version: tuple[int, int]) -> None:
    ast.parse((PROVISION / name).read_text(), feature_version=version)


@pytest.mark.parametrize("name", ["board_probe.py", "board_heartbeat.py", "first_boot.py"])
def test_a_script_for_boards_needs_the_standard_library_alone(name: str) -> None:
    tree = ast.parse((PROVISION / name).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    standard = {"argparse", "json", "os", "pathlib", "platform", "re", "shutil", "socket", "struct", "subprocess"}
    assert imported <= standard | {"__future__", "sys", "time", "typing"}


def test_this_machine_is_described() -> None:
    done = subprocess.run(["/usr/bin/python3", "-"], input=SCRIPT, capture_output=True, check=True)
    facts = parse(done.stdout)
    assert facts.architecture == os.uname().machine
    assert facts.root == (os.geteuid() == 0)
    assert facts.memory_bytes
    assert facts.memory_bytes > 2**20


def test_the_core_of_an_arm_board_gets_its_name() -> None:
    said = json.loads(subprocess.run(["/usr/bin/python3", "-"], input=SCRIPT, capture_output=True, check=True).stdout)
    facts = parse(json.dumps({**said, "cpu_implementer": "0x41", "cpu_part": "0xd08"}).encode())
    assert facts.cpu_name == "Cortex-A72"


def test_an_answer_that_is_no_json_is_said_with_its_usual_cause() -> None:
    with pytest.raises(ProvisionError, match="login message"):
        parse(b"Welcome to box-01!\n{}")


def test_a_tree_is_described_without_running_any_of_it(tmp_path: Path) -> None:
    system(tmp_path)
    facts = RootfsTarget(tmp_path).facts()
    assert (facts.architecture, facts.libc, facts.glibc, facts.python) == ("aarch64", "glibc", "2.36", "3.11")
    assert facts.pythons == ["3.11"]
    assert (facts.systemd, facts.hostname, facts.booted) == (252, "raspberrypi", False)
    assert facts.memory_bytes is None
    assert facts.clock is None


@pytest.mark.parametrize("mounted", ["opt", "opt/fedeq-edge"])
def test_the_disk_that_is_measured_is_the_one_that_releases_go_to(mounted: str, tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system: /dev/shm is absent or that of the temporary folder")
    system(tmp_path)
    (tmp_path / mounted).parent.mkdir(exist_ok=True)
    (tmp_path / mounted).symlink_to(memory)  # stands for a mount, which would need root
    found = RootfsTarget(tmp_path).facts().free_disk_bytes
    assert found is not None
    assert abs(found - shutil.disk_usage(memory).free) < abs(found - shutil.disk_usage(tmp_path).free)


def test_a_32_bit_tree_is_told_from_a_64_bit_one(tmp_path: Path) -> None:
    system(tmp_path, machine=40)
    assert RootfsTarget(tmp_path).facts().architecture == "armv7l"


@pytest.mark.parametrize("mark", ["var/lib/systemd/random-seed", "var/lib/cloud/instance"])
def test_a_tree_that_ran_once_is_known_by_what_booting_leaves(mark: str, tmp_path: Path) -> None:
    system(tmp_path)
    (tmp_path / mark).parent.mkdir(parents=True)
    (tmp_path / mark).symlink_to("gone")
    assert RootfsTarget(tmp_path).facts().booted

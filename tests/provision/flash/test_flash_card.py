"""Flashing cards: images made here without root, read back by other people's tools; and what their first boot does."""

import contextlib
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from cryptography import x509

from fedeq_edge.errors import ConfigError, Exit, ProvisionError
from fedeq_edge.provision.archive import read_manifest
from fedeq_edge.provision.ca import Authority, common_name
from fedeq_edge.provision.desk import Desk
from fedeq_edge.provision.enrol import csr
from fedeq_edge.provision.flash import flash, prepare
from fedeq_edge.provision.flash_card import ImageWay
from fedeq_edge.provision.fleet import Fleet
from fedeq_edge.provision.plan import Flashed, Plan
from fedeq_edge.provision.service import Service
from fedeq_edge.provision.targets import open_target
from fedeq_edge.provision.targets.disks import check_disk, check_writable
from fedeq_edge.provision.targets.image import ImageTarget
from fedeq_edge.provision.targets.partitions import Ext4, Fat
from fedeq_edge.provision.targets.rootfs import RootfsTarget
from tests.provision.flash.board import (
    BOOT_AT,
    CMDLINE,
    DEVICE,
    FIRST_BOOT,
    ROOT_AT,
    SYSTEMCTL,
    USER_DATA,
    Board,
    BundleMaker,
    Card,
    CardMaker,
    system,
)
from tests.provision.release_board import hasty


def flashed(card: Card, fleet: Fleet, bundle: Path, **more: Path) -> Flashed:
    target = ImageTarget(card.path)
    return flash(target, fleet, prepare(target, fleet, "pi-01", bundle, **more), sign=never)


def never() -> Authority:
    raise AssertionError("a card is not signed for")


def test_a_trixie_card_gets_bundle_token_and_a_part_of_user_data(make_card: CardMaker, arm: Path, fleet: Fleet) -> None:
    card = make_card()
    done = flashed(card, fleet, arm)
    assert done.heartbeat_s is None
    assert card.fat("fedeq/bundle.tar.gz") == arm.read_bytes()
    assert b"pi-01" in card.fat("fedeq/join.toml")
    assert USER_DATA in card.fat("user-data")
    assert b"arrange.sh" in card.fat("user-data")
    assert card.fat("cmdline.txt") == CMDLINE


def test_a_bookworm_card_is_called_from_firstrun(make_card: CardMaker, arm: Path, fleet: Fleet) -> None:
    card = make_card(cloud=False)
    flashed(card, fleet, arm)
    assert b"arrange.sh later" in card.fat("firstrun.sh")
    assert card.fat("cmdline.txt").startswith(CMDLINE.strip() + b" systemd.run=")


def test_a_card_of_no_raspberry_gets_the_unit_into_its_root(make_card: CardMaker, arm: Path, fleet: Fleet) -> None:
    card = make_card(cloud=False, raspberry=False)
    flashed(card, fleet, arm)
    root = Ext4(card.path, ROOT_AT)
    assert root.read("opt/fedeq-edge/first-boot/bundle.tar.gz") == arm.read_bytes()
    assert root.link("etc/systemd/system/multi-user.target.wants/fedeq-first-boot.service")
    said = subprocess.run(
        ["debugfs", "-R", "stat /opt/fedeq-edge/first-boot/join.toml", f"{card.path}?offset={ROOT_AT}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "Mode:  0600" in said
    assert "User:     0" in said


def test_the_file_system_of_a_flashed_root_is_sound(make_card: CardMaker, arm: Path, fleet: Fleet) -> None:
    card = make_card(cloud=False, raspberry=False)
    flashed(card, fleet, arm)
    content = card.path.read_bytes()[ROOT_AT:]
    (alone := card.path.with_name("root.img")).write_bytes(content)
    assert subprocess.run(["e2fsck", "-fn", str(alone)], capture_output=True, check=False).returncode == 0


def test_the_same_card_again_is_no_change_and_keeps_its_token(make_card: CardMaker, arm: Path, fleet: Fleet) -> None:
    card = make_card()
    assert flashed(card, fleet, arm).changed
    before = card.path.read_bytes()
    assert not flashed(card, fleet, arm).changed
    assert card.path.read_bytes() == before


def test_a_card_whose_token_is_void_gets_a_new_one(make_card: CardMaker, arm: Path, fleet: Fleet) -> None:
    card = make_card()
    flashed(card, fleet, arm)
    old = card.fat("fedeq/join.toml")
    fleet.tokens.void("pi-01")
    assert flashed(card, fleet, arm).changed
    assert card.fat("fedeq/join.toml") != old


@pytest.mark.parametrize("raspberry", [True, False])
def test_a_card_of_another_device_is_said_to_be_one_and_its_data_do_not_stay(
    raspberry: bool, make_card: CardMaker, arm: Path, fleet: Fleet, tmp_path: Path
) -> None:
    card = make_card(cloud=raspberry, raspberry=raspberry)
    (data := tmp_path / "mine.npz").write_bytes(b"samples of pi-01")
    flashed(card, fleet, arm, data=data)
    fleet.add("pi-02", "raspberry-pi-4")
    target = ImageTarget(card.path)
    plan = prepare(target, fleet, "pi-02", arm)
    assert plan.occupant == "pi-01"
    assert plan.intended[0] == "take the place of what was prepared for device pi-01"
    flash(target, fleet, plan, sign=never)
    assert prepare(ImageTarget(card.path), fleet, "pi-02", arm).occupant == ""
    box = Fat(card.path, BOOT_AT) if raspberry else Ext4(card.path, ROOT_AT)
    assert box.read("fedeq/data.npz" if raspberry else "opt/fedeq-edge/first-boot/data.npz") is None


@pytest.mark.parametrize("mark", ["var/lib/systemd/random-seed", "var/lib/cloud/instance"])
def test_a_card_that_has_booted_is_refused(mark: str, make_card: CardMaker, arm: Path, fleet: Fleet) -> None:
    card = make_card(mark=mark)
    before = card.path.read_bytes()
    with pytest.raises(ProvisionError, match="booted already") as caught:
        flashed(card, fleet, arm)
    assert caught.value.exit == Exit.BOOTED_CARD
    assert card.path.read_bytes() == before


def test_a_card_whose_first_boot_has_reported_is_refused(make_card: CardMaker, arm: Path, fleet: Fleet) -> None:
    card = make_card()
    flashed(card, fleet, arm)
    card.put("fedeq/status.json", b"{}")
    with pytest.raises(ProvisionError) as caught:
        flashed(card, fleet, arm)
    assert caught.value.exit == Exit.BOOTED_CARD


def test_a_card_without_data_is_refused_with_the_option_as_a_board_is(
    make_card: CardMaker, arm: Path, fleet: Fleet, tmp_path: Path
) -> None:
    card = make_card()
    (data := tmp_path / "mine.npz").write_bytes(b"mine")
    target = ImageTarget(card.path)
    assert target.root is not None
    target.root.remove("var/lib/fedeq-edge/data.npz")
    before = card.path.read_bytes()
    with pytest.raises(ProvisionError, match="no data to train on; give its npz with --data") as refused:
        flashed(card, fleet, arm)
    assert (refused.value.exit, card.path.read_bytes() == before) == (Exit.MISUSED, True)
    assert flashed(card, fleet, arm, data=data).changed
    assert not flashed(card, fleet, arm).changed  # what the first flash brought is still to come


def test_a_32_bit_card_is_refused_with_64_bit_os_needed(make_card: CardMaker, arm: Path, fleet: Fleet) -> None:
    with pytest.raises(ProvisionError, match="64-bit OS needed") as caught:
        flashed(make_card(machine=40), fleet, arm)
    assert caught.value.exit == Exit.WRONG_PLATFORM


def test_a_card_that_is_too_small_is_refused_before_it_is_written(
    make_card: CardMaker, arm: Path, fleet: Fleet
) -> None:
    card = make_card()
    card.put("filler", bytes(29 << 20))
    before = card.path.read_bytes()
    with pytest.raises(ProvisionError, match="MB free") as caught:
        flashed(card, fleet, arm)
    assert caught.value.exit == Exit.NO_SPACE
    assert card.path.read_bytes() == before


@pytest.mark.usefixtures("card_tools")
def test_a_file_that_is_no_card_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ProvisionError) as caught:
        ImageTarget(tmp_path / "notes.txt")
    assert caught.value.exit == Exit.MISUSED


def test_what_can_not_be_flashed_is_said_with_what_can(tmp_path: Path) -> None:
    for text in ("pi@10.0.0.5", str(tmp_path / "absent.img"), "ssh://", "ssh://pi:secret@host", "ssh://host/path", "/"):
        with pytest.raises(ConfigError, match="give"):
            open_target(text, known_hosts=tmp_path / "known")


# The first boot


@pytest.fixture
def serving(fleet: Fleet) -> Iterator[None]:
    """The fleet's service, at the address that its devices are told."""
    with contextlib.ExitStack() as stack:
        desk = Desk(fleet, Authority.open(fleet.folder / "ca"))
        service = stack.enter_context(Service(desk, fleet.folder / "gateway", ("127.0.0.1", 0)))
        text = (fleet.folder / "fleet.toml").read_text()
        (fleet.folder / "fleet.toml").write_text(text.replace("gateway:8443", f"127.0.0.1:{service.port}"))
        thread = threading.Thread(target=service.serve_forever, args=(0.01,))
        thread.start()
        yield
        service.shutdown()
        thread.join()


def first_boot(folder: Path, board: Board) -> "subprocess.CompletedProcess[str]":
    command = ["/usr/bin/python3", "-I", str(FIRST_BOOT), "--root", str(board.root), str(folder)]
    return subprocess.run(command, env=board.environment, capture_output=True, text=True, check=False)


def brought(make_card: CardMaker, fleet: Fleet, bundle: Path, board: Board, tmp_path: Path) -> Path:
    """What the card brings to its first boot, with data."""
    (board.root / "var/lib/fedeq-edge/data.npz").unlink()
    (data := tmp_path / "mine.npz").write_bytes(b"mine")
    card = make_card()
    flashed(card, fleet, bundle, data=data)
    folder = card.extract(tmp_path)
    (folder / "release.py").write_bytes(hasty((folder / "release.py").read_bytes()))
    return folder


def test_the_first_boot_installs_enrols_starts_and_leaves_no_secret(
    make_card: CardMaker, arm: Path, fleet: Fleet, board: Board, serving: None, tmp_path: Path
) -> None:
    folder = brought(make_card, fleet, arm, board, tmp_path)
    done = first_boot(folder, board)
    assert done.returncode == 0, done.stderr
    identity = board.root / "etc/fedeq-edge"
    assert common_name(x509.load_pem_x509_certificate((identity / "device.crt").read_bytes())) == "pi-01"
    assert (board.home / "active").read_text().strip() == "active"
    assert (board.root / "var/lib/fedeq-edge/data.npz").read_bytes() == b"mine"
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["version"], status["device"]) == ("running", "1.0", "pi-01")
    assert not (identity / "join.toml").exists()
    left = {path.name for path in folder.iterdir()}
    assert left == {"status.json", "arrange.sh", "first_boot.py", "fedeq-first-boot.service"}


def test_a_first_boot_without_network_says_so_on_the_card_and_ends_it_later(
    make_card: CardMaker, arm: Path, fleet: Fleet, board: Board, tmp_path: Path
) -> None:
    text = (fleet.folder / "fleet.toml").read_text()
    (fleet.folder / "fleet.toml").write_text(text.replace("gateway:8443", "127.0.0.1:1"))
    folder = brought(make_card, fleet, arm, board, tmp_path)
    assert first_boot(folder, board).returncode == 1
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", "enrol")
    assert "127.0.0.1:1" in status["detail"]
    assert board.restarts() == 0
    assert not (folder / "join.toml").exists()
    assert (board.root / "etc/fedeq-edge/join.toml").stat().st_mode & 0o777 == 0o600


def test_a_first_boot_whose_installer_is_killed_is_ended_by_the_next(
    make_card: CardMaker, arm: Path, fleet: Fleet, board: Board, serving: None, tmp_path: Path
) -> None:
    folder = brought(make_card, fleet, arm, board, tmp_path)
    board.program("systemctl", "#!/bin/sh\nkill -9 $PPID\n")  # the first thing that the installer asks it
    assert first_boot(folder, board).returncode != 0
    board.program("systemctl", SYSTEMCTL)
    assert first_boot(folder, board).returncode == 0
    assert board.current() == "1.0"


# A mounted root


def test_a_mounted_root_is_installed_at_once_and_enrols_at_its_next_boot(
    make_bundle: BundleMaker, fleet: Fleet, tmp_path: Path
) -> None:
    root = tmp_path / "mounted"
    system(root, machine=62)
    bundle = make_bundle("1.0", architecture="x86_64", python="3.11")
    target = RootfsTarget(root)
    assert flash(target, fleet, prepare(target, fleet, DEVICE, bundle), sign=never).changed
    assert (root / "opt/fedeq-edge/current").readlink().name == "1.0"
    wants = root / "etc/systemd/system/multi-user.target.wants/fedeq-first-boot.service"
    assert wants.resolve() == root / "etc/systemd/system/fedeq-first-boot.service"
    again = RootfsTarget(root)
    assert not flash(again, fleet, prepare(again, fleet, DEVICE, bundle), sign=never).changed


def test_a_mounted_root_without_data_is_refused_with_the_option_as_a_board_is(
    make_bundle: BundleMaker, fleet: Fleet, tmp_path: Path
) -> None:
    root, bundle = tmp_path / "mounted", make_bundle("1.0", architecture="x86_64", python="3.11")
    system(root, machine=62)
    (root / "var/lib/fedeq-edge/data.npz").rename(tmp_path / "mine.npz")
    with pytest.raises(ProvisionError, match="no data to train on; give its npz with --data") as refused:
        prepare(RootfsTarget(root), fleet, DEVICE, bundle)
    assert (refused.value.exit, (root / "opt").exists()) == (Exit.MISUSED, False)
    target = RootfsTarget(root)
    flash(target, fleet, prepare(target, fleet, DEVICE, bundle, data=tmp_path / "mine.npz"), sign=never)
    assert prepare(target, fleet, DEVICE, bundle).intended == ["nothing: it is ready for its next boot"]


def test_the_plan_of_a_mounted_root_that_gets_nothing_but_data_names_them(
    make_bundle: BundleMaker, fleet: Fleet, tmp_path: Path
) -> None:
    root, bundle = tmp_path / "mounted", make_bundle("1.0", architecture="x86_64", python="3.11")
    system(root, machine=62)
    (data := tmp_path / "mine.npz").write_bytes(b"samples")
    flash(RootfsTarget(root), fleet, prepare(RootfsTarget(root), fleet, DEVICE, bundle), sign=never)
    assert prepare(RootfsTarget(root), fleet, DEVICE, bundle, data=data).intended == ["put mine.npz"]


def test_a_mounted_root_of_another_device_is_taken_over_before_its_first_boot_and_refused_after_it(
    make_bundle: BundleMaker, fleet: Fleet, tmp_path: Path
) -> None:
    root, bundle = tmp_path / "mounted", make_bundle("1.0", architecture="x86_64", python="3.11")
    system(root, machine=62)
    (data := tmp_path / "mine.npz").write_bytes(b"samples")
    target = RootfsTarget(root)
    flash(target, fleet, prepare(target, fleet, DEVICE, bundle, data=data), sign=never)
    fleet.add("box-02", "x86-64")
    plan = prepare(target, fleet, "box-02", bundle)
    assert plan.occupant == DEVICE
    flash(target, fleet, plan, sign=never)
    first = root / "opt/fedeq-edge/first-boot"
    assert json.loads((first / "card.json").read_text())["device"] == "box-02"
    assert not (first / "data.npz").exists()
    (root / "etc/fedeq-edge").mkdir()
    (first / "agent.toml").rename(root / "etc/fedeq-edge/agent.toml")  # as the first boot does
    with pytest.raises(ProvisionError, match=f"the board is device box-02, not {DEVICE}") as refused:
        prepare(target, fleet, DEVICE, bundle)
    assert refused.value.exit is Exit.OTHER_DEVICE


def test_a_mounted_root_that_is_a_device_already_is_refused_as_a_booted_card_is(
    make_bundle: BundleMaker, fleet: Fleet, sign: Callable[[], Authority], tmp_path: Path
) -> None:
    root, bundle = tmp_path / "mounted", make_bundle("1.0", architecture="x86_64", python="3.11")
    system(root, machine=62)
    target = RootfsTarget(root)
    flash(target, fleet, prepare(target, fleet, DEVICE, bundle), sign=never)
    token = fleet.tokens.waiting(DEVICE, now=0.0)
    enrolled(root / "etc/fedeq-edge", sign())
    before, later = tree_of(root), make_bundle("1.1", architecture="x86_64", python="3.11")
    for data in (None, root / "var/lib/fedeq-edge/data.npz"):
        with pytest.raises(ProvisionError, match=r"booted already.*fedeq flash ssh://USER@HOST") as refused:
            prepare(RootfsTarget(root), fleet, DEVICE, later, data=data)
        assert refused.value.exit is Exit.BOOTED_CARD
    assert tree_of(root) == before
    assert fleet.tokens.waiting(DEVICE, now=0.0) == token


def enrolled(identity: Path, authority: Authority) -> None:
    """What a first boot leaves in /etc/fedeq-edge."""
    (identity / "device.crt").write_bytes(authority.device_certificate(csr(identity, DEVICE), DEVICE))
    (identity / "ca.crt").write_bytes(authority.pem)


def tree_of(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_mounted_root_whose_certificate_was_revoked_gets_a_token_once_its_device_is_added_again(
    make_bundle: BundleMaker, fleet: Fleet, sign: Callable[[], Authority], tmp_path: Path
) -> None:
    root, bundle = tmp_path / "mounted", make_bundle("1.0", architecture="x86_64", python="3.11")
    system(root, machine=62)
    enrolled(root / "etc/fedeq-edge", sign())
    target = RootfsTarget(root)
    fleet.revoke(DEVICE)
    with pytest.raises(ProvisionError, match="fedeq fleet add"):
        prepare(target, fleet, DEVICE, bundle)
    fleet.add(DEVICE, "x86-64")
    flash(target, fleet, prepare(target, fleet, DEVICE, bundle), sign=never)
    assert f"fedeq1.{DEVICE}." in (root / "opt/fedeq-edge/first-boot/join.toml").read_text()


@pytest.mark.parametrize(("packages", "advised"), [({"torch": "2.9.1"}, True), ({}, False)])
def test_a_bundle_that_does_not_fit_is_advised_to_do_without_torch_only_where_it_has_some(
    packages: dict[str, str], advised: bool, make_card: CardMaker, arm: Path, fleet: Fleet
) -> None:
    card = make_card()
    card.put("ballast", bytes(30 << 20))
    target = ImageTarget(card.path)
    plan = Plan(
        device="pi-01", target=target.name, bundle=arm, digest="", manifest=read_manifest(arm), facts=target.facts(),
        warnings=[], intended=[], data=None,
    )  # fmt: skip
    plan = msgspec.structs.replace(plan, manifest=msgspec.structs.replace(plan.manifest, packages=packages))
    with pytest.raises(ProvisionError, match="larger boot partition") as refused:
        ImageWay(target, fleet, plan).intended()
    assert refused.value.exit is Exit.NO_SPACE
    assert ("without torch" in str(refused.value)) == advised


# Disks of this machine


def machine(tmp_path: Path, mounts: str, swaps: str = "") -> tuple[Path, Path]:
    """/proc and /sys of a machine with a disk 8:0 of two partitions and an encrypted volume on the second."""
    proc, sys = tmp_path / "proc", tmp_path / "sys"
    (proc / "self").mkdir(parents=True)
    (proc / "self/mountinfo").write_text(mounts)
    (proc / "swaps").write_text("Filename Type Size Used Priority\n" + swaps)
    disk = sys / "devices/block/sda"
    for part, name in enumerate(("sda1", "sda2"), 1):
        (disk / name / "holders").mkdir(parents=True)
        (disk / name / "partition").write_text(str(part))
        (disk / name / "dev").write_text(f"8:{part}\n")
    (disk / "dev").write_text("8:0\n")
    volume = sys / "devices/block/dm-0"
    volume.mkdir()
    (volume / "dev").write_text("254:0\n")
    (disk / "sda2/holders/dm-0").symlink_to(volume)
    (sys / "dev/block").mkdir(parents=True)
    for number, place in (("8:0", disk), ("8:1", disk / "sda1"), ("8:2", disk / "sda2"), ("254:0", volume)):
        (sys / "dev/block" / number).symlink_to(place)
    (sys / "class/block/sda1").mkdir(parents=True)
    (sys / "class/block/sda1/dev").write_text("8:1\n")
    return proc, sys


@pytest.mark.parametrize(
    ("mounts", "swaps", "said"),
    [
        ("1 1 8:1 / / rw - ext4 /dev/sda1 rw\n", "", "system disk is never written"),
        ("1 1 254:0 / / rw - ext4 /dev/mapper/root rw\n", "", "system disk is never written"),
        ("", "/dev/sda1 partition 1 0 -2\n", "system disk is never written"),
        ("1 1 8:2 / /media/card rw - ext4 /dev/sda2 rw\n", "", "umount /media/card"),
    ],
)
def test_a_disk_in_use_is_never_written(mounts: str, swaps: str, said: str, tmp_path: Path) -> None:
    proc, sys = machine(tmp_path, mounts, swaps)
    with pytest.raises(ProvisionError, match=said):
        check_disk(Path("/dev/sda"), "8:0", proc, sys)


def test_a_disk_that_nothing_uses_may_be_written(tmp_path: Path) -> None:
    proc, sys = machine(tmp_path, "1 1 9:9 / / rw - ext4 /dev/x rw\n")
    check_disk(Path("/dev/sda"), "8:0", proc, sys)


def test_a_partition_is_refused_with_the_name_of_its_disk(tmp_path: Path) -> None:
    proc, sys = machine(tmp_path, "")
    with pytest.raises(ProvisionError, match="give the whole card, /dev/sda"):
        check_disk(Path("/dev/sda1"), "8:1", proc, sys)


def test_an_image_file_needs_no_disk() -> None:
    with pytest.raises(ProvisionError, match="neither an image file nor a disk"):
        check_writable(Path("/dev/null"))

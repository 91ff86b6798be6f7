"""A card from the computer that writes it to a board that boots from it, and back into the computer.

The board is an x86-64 one. Its card has the partitions and boot files of Raspberry Pi OS bookworm: the kernel's command
line names firstrun.sh, then comes a restart, then the first boot's unit. The tests share it, in the order of its life;
the last two have cards of their own: one of no Raspberry, and one of trixie, whose cloud-init really runs.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedeq_edge.errors import Exit
from fedeq_edge.provision.archive import read_manifest
from fedeq_edge.provision.card import ROOT_FOLDER
from tests.conftest import until
from tests.devices import cards
from tests.devices.board import Board
from tests.devices.cards import BOOKWORM, CMDLINE, FIRMWARE, NO_RASPBERRY, TRIXIE, Card
from tests.devices.conftest import MakeBoard
from tests.devices.gateway import Gateway, some_data
from tests.devices.releases import connected, runs
from tests.devices.rootfs import RootfsError, scratch

pytestmark = pytest.mark.devices

DEVICE = "box-04"
# Where the image's makers tell cloud-init to look.
SEED = f"datasource_list: [NoCloud, None]\ndatasource: {{NoCloud: {{seedfrom: 'file://{FIRMWARE}/'}}}}\n"
START_S = 120.0


@pytest.fixture(scope="module")
def bundle(gateway: Gateway) -> Path:
    """What a card brings, where cards can be made."""
    if why := cards.missing():
        pytest.skip(why)
    return gateway.bundle("x86-64")


@pytest.fixture(scope="module")
def drawer(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the cards are, as long as there are any."""
    with scratch(tmp_path_factory.mktemp("cards") / "drawer") as folder:
        yield folder


@pytest.fixture(scope="module")
def card(gateway: Gateway, bundle: Path, drawer: Path) -> Card:
    """A card that was flashed for the device and has not booted."""
    made = Card(drawer / "bookworm.img", BOOKWORM)
    prepare(made, DEVICE, gateway, bundle)
    return made


@pytest.fixture(scope="module")
def token(card: Card) -> str:
    """What stands for the signature that the card does not have."""
    return next(word.strip('"') for word in card.fat("fedeq/join.toml").decode().split() if "fedeq1." in word)


@pytest.fixture(scope="module")
def booted(card: Card, token: str, make_board: MakeBoard) -> Board:
    """The board that has the card, twice booted: the first time arranges, the second installs, enrols and starts."""
    board = make_board(DEVICE, card=card)
    board.boot_until_it_restarts()
    board.boot()
    until(lambda: status(board).get("state") == "running", "the first boot says that the agent runs", START_S)
    return board


def prepare(card: Card, device: str, gateway: Gateway, bundle: Path) -> None:
    """The card is flashed for a device that is new to the fleet."""
    gateway.add(device, "x86-64")
    done = gateway.flash_card(card, device, bundle, "--data", str(some_data(card.path.with_name("data.npz"))))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["changed"]


def status(board: Board, folder: str = f"{FIRMWARE}/fedeq") -> dict[str, Any]:
    """What status.json says so far."""
    found: dict[str, Any] = json.loads(board.ssh(f"cat {folder}/status.json", check=False).stdout or "{}")
    return found


def holders(secret: str, folders: list[Path]) -> list[str]:
    """Files below the folders that hold the secret."""
    command = ["grep", "--recursive", "--files-with-matches", "--fixed-strings", "--devices=skip", secret]
    searched = subprocess.run([*command, *map(str, folders)], capture_output=True, text=True, check=False)
    assert searched.returncode in (0, 1), searched.stderr
    return searched.stdout.splitlines()


def test_a_flashed_card_has_everything_on_the_partition_that_any_computer_reads(
    card: Card, bundle: Path, token: str
) -> None:
    assert card.fat("fedeq/bundle.tar.gz") == bundle.read_bytes()
    assert card.fat("cmdline.txt").decode().startswith(f"{CMDLINE.strip()} systemd.run=")
    assert token.split(".")[:2] == ["fedeq1", DEVICE]


def test_its_first_boot_enrols_it_and_starts_an_agent_that_is_heard(
    booted: Board, gateway: Gateway, bundle: Path
) -> None:
    until(lambda: runs(booted, bundle), "the agent is connected to its broker", START_S)
    until(lambda: gateway.reported(DEVICE) is not None, "the updater reports to the fleet", START_S)
    reported = gateway.reported(DEVICE)
    assert reported is not None
    assert (reported.version, reported.healthy) == (read_manifest(bundle).version, True)


def test_the_token_is_nowhere_on_the_card_and_good_for_nobody_else(booted: Board, gateway: Gateway, token: str) -> None:
    assert (
        holders(token, [*(booted.root / name for name in ("etc", "opt", "root", "var")), booted.mounted(FIRMWARE)])
        == []
    )
    stolen = gateway.enrol(booted, token, folder="/tmp/thief")
    assert stolen.returncode == Exit.TOKEN_USED
    assert len(stolen.stderr.strip().splitlines()) == 1


def test_the_boot_partition_tells_how_it_went_and_asks_for_no_second_first_boot(booted: Board, bundle: Path) -> None:
    said = status(booted)
    assert (said["state"], said["device"], said["version"]) == ("running", DEVICE, read_manifest(bundle).version)
    left = set(booted.says(f"ls {FIRMWARE} {FIRMWARE}/fedeq").split())
    assert left.isdisjoint({"firstrun.sh", "bundle.tar.gz", "join.toml", "agent.toml", "data.npz", "card.json"})
    assert booted.says(f"cat {FIRMWARE}/cmdline.txt") == CMDLINE.strip()
    assert booted.says("stat -c '%a %U' /etc/fedeq-edge /etc/fedeq-edge/device.key") == "700 root\n600 root"


def test_it_starts_again_without_a_first_boot(booted: Board, bundle: Path) -> None:
    before = status(booted)
    booted.cut_power()
    booted.boot()
    until(lambda: connected(booted), "the agent answers after the power cut", START_S)
    assert runs(booted, bundle)
    assert booted.says("systemctl show --property=ConditionResult --value fedeq-first-boot") == "no"
    assert status(booted) == before


def test_a_card_that_has_booted_is_not_flashed_again(booted: Board, gateway: Gateway, card: Card, bundle: Path) -> None:
    booted.close()
    before = card.digest()
    done = gateway.flash_card(card, DEVICE, bundle)
    assert done.returncode == Exit.BOOTED_CARD
    assert len(done.stderr.strip().splitlines()) == 1
    assert "write its operating system anew" in done.stderr
    assert card.digest() == before
    assert json.loads(card.fat("fedeq/status.json"))["state"] == "running"


# Cards that are told of their first boot in another way


def test_a_card_of_no_raspberry_enrols_by_the_unit_in_its_root(
    gateway: Gateway, bundle: Path, make_board: MakeBoard, drawer: Path
) -> None:
    card = Card(drawer / "debian.img", NO_RASPBERRY)
    prepare(card, "box-05", gateway, bundle)
    board = make_board("box-05", card=card)
    board.boot()
    until(lambda: status(board, ROOT_FOLDER).get("state") == "running", "the first boot succeeds", START_S)
    until(lambda: runs(board, bundle), "the agent is connected to its broker", START_S)
    board.close()


def test_cloud_init_does_what_the_user_wants_and_arranges_the_first_boot(
    gateway: Gateway, bundle: Path, make_board: MakeBoard, drawer: Path
) -> None:
    card = cloud_card(drawer / "trixie.img")
    prepare(card, "box-06", gateway, bundle)
    board = make_board("box-06", card=card)
    (board.root / "etc/cloud/cloud.cfg.d/99_raspberry.cfg").write_text(SEED)
    board.boot()
    until(lambda: status(board).get("state") == "running", "the first boot succeeds", START_S)
    until(lambda: runs(board, bundle), "the agent is connected to its broker", START_S)
    assert board.says("hostname; cloud-init status --wait").splitlines()[0] == "mine"
    board.close()
    assert gateway.flash_card(card, "box-06", bundle).returncode == Exit.BOOTED_CARD


def cloud_card(path: Path) -> Card:
    """A card as Raspberry Pi OS trixie has it, with cloud-init."""
    try:
        return Card(path, TRIXIE, "cloud-init")
    except RootfsError as error:  # no way to Debian's packages
        pytest.skip(str(error))

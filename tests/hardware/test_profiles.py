"""Every board that we ship is readable, and a mistake in one is named."""

from pathlib import Path

import msgspec
import pytest

from fedeq_edge.errors import ConfigError
from fedeq_edge.hardware.probe import probe, recognise
from fedeq_edge.hardware.profiles import load_profile, profiles
from fedeq_edge.kit import folder
from fedeq_edge.settings import AgentSettings, load

BOARDS = [
    "arm64",
    "jetson-orin-nano",
    "raspberry-pi-3",
    "raspberry-pi-4",
    "raspberry-pi-5",
    "raspberry-pi-zero-2w",
    "x86-64",
]


def test_every_board_is_listed_by_its_folder() -> None:
    known = profiles()

    assert list(known) == BOARDS
    assert all(profile.id == board for board, profile in known.items())


def test_boards_are_ordered_by_speed_as_their_cores_are() -> None:
    speed = {board: profile.relative_speed for board, profile in profiles().items()}

    assert speed["raspberry-pi-zero-2w"] < speed["raspberry-pi-3"] < speed["raspberry-pi-4"]
    assert speed["raspberry-pi-4"] < speed["raspberry-pi-5"] < speed["x86-64"] == 1.0


def test_a_boards_watts_are_stated_where_its_maker_does_and_left_out_elsewhere() -> None:
    watts = {board: profile.active_watts for board, profile in profiles().items()}

    assert watts == {
        "arm64": None,
        "jetson-orin-nano": None,
        "raspberry-pi-3": 2.0,
        "raspberry-pi-4": 3.1,
        "raspberry-pi-5": 4.1,
        "raspberry-pi-zero-2w": 1.8,
        "x86-64": None,
    }


@pytest.mark.parametrize("board", BOARDS)
def test_each_board_brings_a_sample_agent_configuration_for_itself(board: str) -> None:
    path = folder("devices") / board / "agent.toml"
    sample = load(path, AgentSettings)

    assert sample.profile == board
    assert not sample.emulate
    assert sample.broker.endpoint(path)


def test_an_unknown_board_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'raspbery-pi4' has no profile .* did you mean 'raspberry-pi-4'"):
        load_profile("raspbery-pi4")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cores = 4", "coers = 4", "coers"),
        ("cores = 4", "cores = 'four'", "cores"),
        ("relative_speed = 0.15", "relative_speed = 0.0", "relative_speed"),
        ('id = "raspberry-pi-4"', 'id = "other"', "folder"),
        ("active_watts = 3.1", "active_watts = 0.0", "active_watts"),
        ("[limits]", "[limits", "not a board profile"),
    ],
)
def test_a_faulty_profile_is_named_with_its_fault(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (folder("devices") / "raspberry-pi-4" / "profile.toml").read_text()
    assert old in text
    (tmp_path / "raspberry-pi-4").mkdir()
    (tmp_path / "raspberry-pi-4" / "profile.toml").write_text(text.replace(old, new))

    with pytest.raises(ConfigError, match=message) as caught:
        load_profile("raspberry-pi-4", tmp_path)

    assert "profile.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_added_board_is_found_at_once(tmp_path: Path) -> None:
    text = (folder("devices") / "x86-64" / "profile.toml").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "profile.toml").write_text(text.replace('id = "x86-64"', 'id = "mine"'))

    assert list(profiles(tmp_path)) == ["mine"]


@pytest.mark.parametrize(
    ("arch", "model", "board"),
    [
        ("aarch64", "Raspberry Pi 4 Model B Rev 1.4", "raspberry-pi-4"),
        ("aarch64", "Raspberry Pi Zero 2 W Rev 1.0", "raspberry-pi-zero-2w"),
        ("x86_64", None, "x86-64"),
        ("aarch64", "Radxa ROCK 5B", "arm64"),
        ("armv7l", "Raspberry Pi 4 Model B Rev 1.4", None),
    ],
)
def test_a_board_is_recognised_by_its_device_tree(arch: str, model: str | None, board: str | None) -> None:
    found = msgspec.structs.replace(probe(), arch=arch, model=model)

    profile = recognise(found)

    assert (profile.id if profile else None) == board

"""`fedeq bundle` as a user has it: with a fleet, without one, and with a file that is none."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedeq_edge.provision.archive import Cpu, Manifest, entry_of, pack
from fedeq_edge.provision.fleet import Fleet, FleetSettings

if TYPE_CHECKING:
    from tests.cli.conftest import Fedeq


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """A fleet with one device, where commands look for it first."""
    monkeypatch.chdir(tmp_path)
    settings = FleetSettings(name="plant", broker="mqtts://gw:8883", service="https://gw:8443", federation="plant")
    made = Fleet.init(tmp_path / "fleet", settings, ["gw"])
    made.add("pi-01", "raspberry-pi-4")
    return made


def packed(folder: Path, key: Path | None) -> Path:
    """A small bundle."""
    (folder / "tree/models").mkdir(parents=True)
    (folder / "tree/models/m.onnx").write_bytes(b"graph")
    manifest = Manifest(
        version="0.1.0+0123456789ab", profile="raspberry-pi-4", architecture="aarch64", python="3.11", glibc="2.28",
        cpu=Cpu(part="0xd08", qemu="cortex-a72"), packages={"numpy": "2.4.6"},
        files={"models/m.onnx": entry_of(folder / "tree/models/m.onnx", 0o644)},
    )  # fmt: skip
    pack(folder / "tree", manifest, key, folder / "b.tar.gz")
    return folder / "b.tar.gz"


def test_inspect_shows_what_a_bundle_says_of_itself(fedeq: "Fedeq", tmp_path: Path) -> None:
    bundle = packed(tmp_path, None)

    told = json.loads(fedeq("bundle", "inspect", bundle, "--json").out)

    assert (told["version"], told["models"], told["packages"]) == ("0.1.0+0123456789ab", ["m.onnx"], {"numpy": "2.4.6"})
    assert (told["unpacked_bytes"], told["packed_bytes"]) == (5, bundle.stat().st_size)
    assert (told["signed"], told["verified"]) == (False, False)
    shown = fedeq("bundle", "inspect", bundle).err
    assert "0.1.0+0123456789ab" in shown
    assert f"not checked: fedeq bundle verify {bundle}" in shown


@pytest.mark.parametrize("signed", [True, False])
def test_inspect_of_a_damaged_bundle_exits_3_in_one_line_and_shows_nothing(
    signed: bool, fedeq: "Fedeq", fleet: Fleet, tmp_path: Path
) -> None:
    bundle = packed(tmp_path, fleet.folder / "keys/bundle.key" if signed else None)
    assert json.loads(fedeq("bundle", "inspect", bundle, "--json").out)["signed"] is signed
    raw = bytearray(bundle.read_bytes())
    raw[-8] ^= 1  # of gzip's own checksum
    bundle.write_bytes(raw)

    told = fedeq("bundle", "inspect", bundle, "--json")

    assert (told.status, told.out, told.err.count("\n")) == (3, "", 1)


def test_verify_takes_the_key_of_the_fleet(fedeq: "Fedeq", fleet: Fleet, tmp_path: Path) -> None:
    bundle = packed(tmp_path, fleet.folder / "keys/bundle.key")

    told = fedeq("bundle", "verify", bundle, "--json")

    assert told.status == 0
    assert json.loads(told.out)["verified"] is True


def test_verify_of_a_changed_bundle_exits_3_in_one_line(fedeq: "Fedeq", fleet: Fleet, tmp_path: Path) -> None:
    bundle = packed(tmp_path, fleet.folder / "keys/bundle.key")
    raw = bytearray(bundle.read_bytes())
    raw[-8] ^= 1  # of gzip's own checksum
    bundle.write_bytes(raw)

    told = fedeq("bundle", "verify", bundle)

    assert (told.status, told.out, told.err.count("\n")) == (3, "", 1)
    assert "build it again" in told.err


def test_verify_of_an_unsigned_bundle_exits_3(fedeq: "Fedeq", fleet: Fleet, tmp_path: Path) -> None:
    told = fedeq("bundle", "verify", packed(tmp_path, None))

    assert told.status == 3
    assert "it is not signed" in told.err


def test_without_a_fleet_verify_asks_for_the_key(
    fedeq: "Fedeq", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    told = fedeq("bundle", "verify", packed(tmp_path, None))

    assert told.status == 2
    assert "--key" in told.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--device ID of a fleet, or --profile BOARD"),
        (("--device", "a", "--profile", "b"), "fleet.toml says what board device a is; leave out --profile b"),
        (("--device", "pi-01"), "make one with `fedeq fleet init`"),
        (("--profile", "raspberry-pi-44"), "did you mean 'raspberry-pi-4'"),
        (("--profile", "raspberry-pi-4", "--python", "2.7"), "bundles are built for 3.11"),
        (("--profile", "raspberry-pi-4", "--fleet", "absent"), "fedeq fleet init"),
    ],
)
def test_what_build_cannot_use_is_said_in_one_line(
    fedeq: "Fedeq", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.chdir(tmp_path)

    told = fedeq("bundle", "build", *arguments)

    assert (told.status, told.err.count("\n")) == (2, 1)
    assert words in told.err


def test_build_of_a_device_that_the_fleet_has_not_names_the_nearest(fedeq: "Fedeq", fleet: Fleet) -> None:
    told = fedeq("bundle", "build", "--device", "pi-02")

    assert told.status == 2
    assert "pi-01" in told.err

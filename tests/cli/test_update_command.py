"""fedeq update, doctor and device update-loop: what an operator types, and how each ends."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedeq_edge.errors import Exit
from fedeq_edge.provision.fleet import Fleet
from tests.provision.small_models import personal

if TYPE_CHECKING:
    from tests.cli.conftest import Fedeq


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fedeq: "Fedeq") -> Fleet:
    """plant, with two devices that are off, in ./fleet, and a model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDEQ_CA_PASSPHRASE", raising=False)
    assert fedeq("fleet", "init", "plant", "--host", "127.0.0.1").status == 0
    for device in ("pi-01", "pi-02"):
        assert fedeq("fleet", "add", device, "--profile", "raspberry-pi-4").status == 0
    personal(Path("personal.fedeq"))
    return Fleet.open(tmp_path / "fleet")


@pytest.mark.parametrize("who", [(), ("--all", "--device", "pi-01")])
def test_an_update_is_for_all_or_for_those_named(fleet: Fleet, fedeq: "Fedeq", who: tuple[str, ...]) -> None:
    told = fedeq("update", "--bundle", "personal.fedeq", *who)
    assert (told.status, told.err.count("\n")) == (2, 1)
    assert "--all, or --device" in told.err


def test_what_is_no_bundle_is_refused_in_one_line(fleet: Fleet, fedeq: "Fedeq") -> None:
    Path("x.tar.gz").write_bytes(b"x")
    assert fedeq("update", "--all", "--bundle", "x.tar.gz").status == Exit.VERIFICATION
    for name in ("none.onnx", "none.tar.gz"):
        told = fedeq("update", "--all", "--bundle", name)
        assert (told.status, told.err.count("\n")) == (2, 1)
        assert name in told.err


@pytest.mark.parametrize("name", ["junk.onnx", "junk.fedeq"])
def test_a_model_that_cannot_be_loaded_is_refused_in_one_line_and_nobody_is_told(
    name: str, fleet: Fleet, fedeq: "Fedeq"
) -> None:
    Path(name).write_bytes(b"junk")
    told = fedeq("update", "--all", "--bundle", name)
    assert (told.status, told.err.count("\n")) == (2, 1)
    assert f"model {name} cannot be loaded" in told.err
    assert fleet.given_action("pi-01") is None


def test_boards_that_are_off_end_an_update_with_their_names(fleet: Fleet, fedeq: "Fedeq") -> None:
    told = fedeq("update", "--all", "--bundle", "personal.fedeq", "--timeout", "1", "--json")
    said = json.loads(told.out)
    assert told.status == said["exit"] == Exit.ACTION_EXPIRED
    assert {device: outcome["state"] for device, outcome in said["devices"].items()} == {
        "pi-01": "silent",
        "pi-02": "untold",
    }
    assert "it has never reported" in said["devices"]["pi-01"]["detail"]
    assert fleet.action_for("pi-01") is None


def test_an_updater_on_a_board_that_is_not_enrolled_says_so(tmp_path: Path, fedeq: "Fedeq") -> None:
    told = fedeq("device", "update-loop", "--once", "--root", str(tmp_path))
    assert (told.status, told.err.count("\n")) == (1, 1)
    assert "fedeq device enrol" in told.err


def test_the_doctor_prints_what_programs_read_and_fails_where_something_does(fleet: Fleet, fedeq: "Fedeq") -> None:
    told = fedeq("doctor", "--json", "--bundle", "support.zip")
    checks = {check["name"]: check for check in json.loads(told.out)}
    assert told.status == 1
    assert checks["service"]["verdict"] == "fail"
    assert checks["pi-01"]["saw"] == "has never reported"
    assert Path("support.zip").exists()
    assert fedeq("doctor", "pi-01", "--json").status == 0
    told = fedeq("doctor", "pi-1")
    assert (told.status, "did you mean pi-01" in told.err) == (2, True)


def test_the_doctor_takes_no_settings_that_the_program_would_refuse(place: Path, fedeq: "Fedeq") -> None:
    for name in ("agent.toml", "aggregator.toml"):
        checks = {check["name"]: check for check in json.loads(fedeq("doctor", "--config", name, "--json").out)}
        assert checks["settings"]["verdict"] == "ok"
        path = place / name
        path.write_text(f"cohort_siz = 3\n{path.read_text()}")
        told = fedeq("doctor", "--config", name, "--json")
        checks = {check["name"]: check for check in json.loads(told.out)}
        assert (told.status, checks["settings"]["verdict"]) == (1, "fail")
        assert "cohort_siz" in checks["settings"]["saw"]
        assert checks["settings"]["remedy"]

"""fedeq data prepare: from an archive to a fleet that the other commands take."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from fedeq_edge.data.archives.kinds import KINDS
from tests.data.archives import cifar10_files, har_files, tarred, wisdm_text, zipped

if TYPE_CHECKING:
    from tests.cli.conftest import Fedeq


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    return tarred(tmp_path / "cifar-10-binary.tar.gz", cifar10_files())


def test_an_archive_becomes_a_fleet_that_inspect_knows_without_options(fedeq: "Fedeq", tmp_path: Path) -> None:
    archive = zipped(tmp_path / "har.zip", har_files(windows=30))
    told = fedeq("data", "prepare", archive, "--out", tmp_path / "har.npz")
    assert (told.status, told.out) == (0, "")
    assert "har, 3 clients with 40 to 40 training samples of shape (9, 128), 6 classes" in told.err
    seen = fedeq("data", "inspect", tmp_path / "har.npz", "--classes", "0,4", "--json")
    assert seen.status == 0, seen.err
    summary = json.loads(seen.out)
    assert summary["clients"]["2"] == {"train": 44, "test": 12, "histogram": [22, 22]}
    assert json.loads(summary["provenance"])["source"] == "har.zip"
    assert "made from" in fedeq("data", "inspect", tmp_path / "har.npz").err


def test_a_partition_is_made_and_told_as_json(fedeq: "Fedeq", cifar: Path, tmp_path: Path) -> None:
    options = ("--partition", "shards", "--clients", "4", "--labels", "5")
    told = fedeq("data", "prepare", cifar, *options, "--out", tmp_path / "c.npz", "--json")
    assert told.status == 0, told.err
    found = json.loads(told.out)
    assert (found["kind"], found["clients"], found["train"], found["fewest"]) == ("cifar10", 4, 180, 45)
    assert list(found["sha256"]) == [cifar.name]


def test_what_was_left_out_is_said(fedeq: "Fedeq", tmp_path: Path) -> None:
    text = wisdm_text(1, "Walking", 5000) + "1,Walking,;\n" + wisdm_text(2, "Walking", 300)
    raw = tmp_path / "WISDM_ar_v1.1_raw.txt"
    raw.write_text(text)
    told = fedeq("data", "prepare", raw, "--out", tmp_path / "w.npz")
    assert told.status == 0, told.err
    assert "1 of 5301 records are not whole, or repeat a moment, and were left out" in told.err
    assert "1 clients have too few samples" in told.err


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ((), 2, "cifar10 does not say whose a sample is; give --partition"),
        (("--kind", "har"), 1, "it looks like --kind cifar10"),
        (("--kind", "imagenet"), 2, "choose har, hapt, wisdm"),
        (("--variant", "fine"), 2, "cifar10 has no such; leave it away"),
        (("--partition", "iid", "--clients", "300"), 1, "take fewer --clients"),
        (("--partition", "magic"), 2, "Invalid value for '--partition'"),
    ],
)
def test_what_cannot_be_made_is_one_line_and_no_file(
    fedeq: "Fedeq", cifar: Path, tmp_path: Path, options: tuple[str, ...], status: int, message: str
) -> None:
    told = fedeq("data", "prepare", cifar, *options, "--out", tmp_path / "c.npz")
    assert told.status == status
    assert message in told.err
    assert not (tmp_path / "c.npz").exists()


def test_the_help_names_every_kind_and_variant(fedeq: "Fedeq") -> None:
    told = " ".join(fedeq("data", "prepare", "--help").out.split())
    for reader in KINDS.values():
        assert reader.kind in told
        assert ", ".join(reader.variants) in told


def test_a_provenance_that_would_change_the_terminal_is_shown_harmless(fedeq: "Fedeq", tmp_path: Path) -> None:
    x, y = np.ones((10, 3)), np.arange(10) % 2
    np.savez(tmp_path / "a.npz", x=x, y=y, provenance=np.array("\x1b]0;evil\x07[bold]"))
    told = fedeq("data", "inspect", tmp_path / "a.npz")
    assert told.status == 0
    assert "?]0;evil?[bold]" in told.err

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedeq_edge.data import prepare as module
from fedeq_edge.data.npz import describe, load_fleet
from fedeq_edge.data.options import Options
from fedeq_edge.data.partition import alike, iid
from fedeq_edge.data.prepare import Prepared, prepare
from fedeq_edge.errors import ConfigError, DataError, StateError
from fedeq_edge.training.holdout import held_out
from tests.data.archives import (
    cifar10_files,
    digit_files,
    hapt_files,
    har_files,
    laid_out,
    leaf,
    pictures,
    speech,
    tarred,
    writer_files,
    zipped,
)


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """CIFAR-10 with 200 images for training and 40 for the test, labels in turn."""
    return tarred(tmp_path / "cifar-10-binary.tar.gz", cifar10_files())


def prepared(path: Path, out: Path, **options: Any) -> tuple[Prepared, dict[str, np.ndarray]]:
    told = prepare(path, out, Options(**options))
    with np.load(out, allow_pickle=False) as file:
        return told, {name: file[name] for name in file.files}


# ---- natural clients ---------------------------------------------------------------------------------------


def test_people_become_clients_with_all_three_parts_and_the_authors_test_people_are_marked(tmp_path: Path) -> None:
    told, file = prepared(zipped(tmp_path / "har.zip", har_files(windows=30)), tmp_path / "har.npz")
    assert (told.kind, told.clients, told.shape, told.classes[0]) == ("har", 3, (9, 128), "WALKING")
    assert (file["official_test"] == (file["client"] == 3)).all()
    for person in (1, 2, 3):
        split = file["split"][file["client"] == person].tolist()
        # 30 windows of each of two activities; one is given up wherever two parts meet
        assert [split.count(part) for part in ("train", "validation", "test")] == [2 * 20, 2 * 2, 2 * 6]
    assert (told.train, told.validation, told.test, told.fewest, told.most) == (120, 12, 36, 40, 40)


def test_a_prepared_file_is_read_by_name_of_its_columns_alone(tmp_path: Path) -> None:
    prepare(zipped(tmp_path / "har.zip", har_files(windows=30)), tmp_path / "har.npz", Options())
    fleet = load_fleet(tmp_path / "har.npz")
    assert describe(fleet).clients["1"].train == 44  # with validation
    assert describe(fleet).clients["1"].test == 12
    assert list(load_fleet(tmp_path / "har.npz", where="official_test")) == ["3"]


def test_settings_can_be_chosen_without_a_look_at_the_test(tmp_path: Path) -> None:
    _, file = prepared(zipped(tmp_path / "har.zip", har_files(windows=30)), tmp_path / "har.npz")
    held = held_out(load_fleet(tmp_path / "har.npz")["2"], 0.5, seed=0, ordered=True)
    mine = file["client"] == 2
    assert (held.x_train == file["x"][mine & (file["split"] == "train")]).all()
    assert (held.x_test == file["x"][mine & (file["split"] == "validation")]).all()


def test_labels_that_are_left_out_make_room_in_the_numbering(tmp_path: Path) -> None:
    path = laid_out(tmp_path / "hapt", hapt_files())
    told, file = prepared(path, tmp_path / "a.npz", classes="3")
    assert told.classes == ("SITTING",)
    assert file["classes"].tolist() == ["SITTING"]
    assert set(file["y"]) == {0}
    with pytest.raises(DataError, match="no sample has class 1; the labels are 0, 3"):
        prepare(path, tmp_path / "a.npz", Options(classes="0-3"))


def test_writers_with_too_few_samples_are_counted_and_left_out(tmp_path: Path) -> None:
    files = {**digit_files(63, 20), **writer_files(63, 20)}  # the fourth writer has 3 digits
    told, file = prepared(laid_out(tmp_path / "mnist", files), tmp_path / "a.npz")
    assert told.left_out == 1
    assert sorted(set(file["client"].tolist())) == [0, 1, 2, 2100]
    told, _ = prepared(tmp_path / "mnist", tmp_path / "a.npz", smallest=3)
    assert (told.left_out, told.clients) == (0, 5)


def test_natural_clients_are_drawn_by_the_seed(tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "mnist", {**digit_files(200, 20), **writer_files(200, 20)})
    drawn = {
        tuple(np.unique(prepared(folder, tmp_path / "a.npz", clients=3, seed=seed)[1]["client"])) for seed in range(5)
    }
    assert all(len(clients) == 3 for clients in drawn)
    assert len(drawn) > 1
    with pytest.raises(DataError, match="12 clients asked for, 11 of 11 have 10 samples"):
        prepare(folder, tmp_path / "a.npz", Options(clients=12))


def test_leafs_parts_are_kept(tmp_path: Path) -> None:
    files = {
        "train/a.json": leaf({name: pictures(20, shade) for name, shade in (("a", 0.0), ("b", 0.5))}),
        "test/a.json": leaf({name: pictures(3, shade=1.0) for name in ("a", "b")}),
    }
    told, file = prepared(laid_out(tmp_path / "data", files), tmp_path / "a.npz")
    assert (told.clients, told.test, told.validation) == (2, 6, 4)
    assert "official_test" not in file
    assert set(file["x"][file["split"] == "test"][:, 0, 0]) == {255}
    assert file["client"].tolist() == ["a"] * 23 + ["b"] * 23


def test_letters_become_channels_where_a_model_wants_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(leaf({"A": speech(20), "B": speech(12)}))
    _, codes = prepared(tmp_path / "a.json", tmp_path / "codes.npz")
    _, onehot = prepared(tmp_path / "a.json", tmp_path / "onehot.npz", variant="onehot")
    assert codes["x"].dtype == np.int16
    assert onehot["x"].shape == (32, 80, 80)
    assert (onehot["x"].argmax(axis=1) == codes["x"]).all()
    assert set(np.unique(onehot["x"].sum(axis=1, dtype=int))) == {255}


def test_texts_letter_by_letter_beyond_the_limit_are_refused_before_they_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.json").write_bytes(leaf({"A": speech(20)}))
    monkeypatch.setattr(module, "LARGEST_ARRAY_BYTES", 100_000)
    with pytest.raises(DataError, match=r"take 128000 bytes, .* --variant codes"):
        prepare(tmp_path / "a.json", tmp_path / "a.npz", Options(variant="onehot"))


# ---- clients that are made ---------------------------------------------------------------------------------


def test_label_shards_have_their_labels_alone_in_every_part_and_equal_shares(cifar: Path, tmp_path: Path) -> None:
    told, file = prepared(cifar, tmp_path / "a.npz", partition="shards", clients=4, labels=5, smallest=5)
    assert (told.train, told.validation, told.test) == (180, 20, 40)
    assert told.fewest == told.most == 45
    for client in range(4):
        held = {
            part: set(file["y"][(file["client"] == client) & (file["split"] == part)]) for part in ("train", "test")
        }
        assert len(held["train"]) == 5
        assert held["test"] <= held["train"]


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    choice=st.one_of(
        st.fixed_dictionaries({"partition": st.just("iid"), "clients": st.integers(1, 8)}),
        st.fixed_dictionaries(
            {"partition": st.just("shards"), "clients": st.integers(5, 8), "labels": st.integers(2, 10)}
        ),
        st.fixed_dictionaries(
            {"partition": st.just("dirichlet"), "clients": st.integers(1, 4), "alpha": st.floats(0.5, 100)}
        ),
    ),
    seed=st.integers(0, 20),
)
def test_made_clients_hold_every_sample_once_and_never_a_test_sample_in_training(
    cifar: Path, tmp_path: Path, choice: dict[str, Any], seed: int
) -> None:
    told, file = prepared(cifar, tmp_path / "a.npz", **choice, seed=seed, smallest=1)
    assert told.clients == choice["clients"]
    images = file["x"].reshape(240, -1)
    assert np.unique(images, axis=0).shape[0] == 240
    # the second pixel says which file an image is of: the last is the official test part
    assert ((images[:, 1] == 5) == (file["split"] == "test")).all()
    assert set(file["client"]) == set(range(choice["clients"]))
    assert (np.diff(file["client"]) >= 0).all()


def test_the_same_seed_gives_the_same_bytes_and_another_another_split(cifar: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare(cifar, tmp_path / name, Options(partition="dirichlet", clients=3, alpha=1.0, seed=seed))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with np.load(tmp_path / "a") as one, np.load(tmp_path / "c") as other:
        assert not np.array_equal(one["client"], other["client"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "shards", "clients": 3, "labels": 3}, "leave some of 10 classes to nobody; take more"),
        ({"partition": "shards", "clients": 40, "labels": 5}, r"label \d has 18 training samples for 20 clients"),
        ({"partition": "shards", "clients": 3, "labels": 11}, "from 1 to 10 labels"),
        ({"partition": "iid", "clients": 30}, r"client \d+ gets 6 train samples, fewer than 10; take fewer --clients"),
        ({"partition": "iid", "clients": 100, "smallest": 1}, r"client \d+ gets 0 test samples, fewer than 1"),
        ({"partition": "dirichlet", "clients": 20, "alpha": 0.01}, "raise alpha or take fewer clients"),
        ({"partition": "dirichlet", "clients": 2, "alpha": 0.0}, "alpha 0.0; give >= 1 and > 0"),
    ],
)
def test_partitions_that_cannot_be_made_are_named_and_nothing_is_written(
    cifar: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message) as refusal:
        prepare(cifar, tmp_path / "a.npz", Options(**options))
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == [cifar.name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "shards", "labels": 5}, "--partition shards needs --clients"),
        ({"partition": "shards", "clients": 5}, "--partition shards needs --labels"),
        ({"partition": "dirichlet", "clients": 5}, "--partition dirichlet needs --alpha"),
        ({"partition": "iid", "clients": 5, "alpha": 0.1}, "--partition iid has no --alpha; leave it away"),
        ({"labels": 2}, "--partition natural has no --labels"),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_anything_is_read(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Options(**options)


def test_a_set_without_people_has_no_natural_partition(cifar: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cifar10 does not say whose a sample is; give --partition shards, dirichlet"):
        prepare(cifar, tmp_path / "a.npz", Options())


def test_windows_of_one_person_in_two_made_clients_never_leak_into_the_test(tmp_path: Path) -> None:
    path = zipped(tmp_path / "har.zip", har_files(windows=30))
    _, file = prepared(path, tmp_path / "a.npz", partition="iid", clients=2)
    assert set(file["split"]) == {"train", "validation", "test"}
    test = set(np.round(file["x"][file["split"] == "test"], 4).ravel().tolist())
    train = set(np.round(file["x"][file["split"] == "train"], 4).ravel().tolist())
    assert not test & train  # every measurement of `har_files` is another number


# ---- provenance and disks ----------------------------------------------------------------------------------


def test_the_file_says_what_it_was_made_of(cifar: Path, tmp_path: Path) -> None:
    told, file = prepared(cifar, tmp_path / "a.npz", partition="iid", clients=2, seed=7)
    provenance = json.loads(str(file["provenance"]))
    assert provenance["source"] == cifar.name
    assert provenance["kind"] == "cifar10"
    assert provenance["options"]["seed"] == 7
    assert provenance["digests"][cifar.name]["sha256"] == told.sha256[cifar.name]
    assert told.official == ()  # it is not the real one


def test_an_output_that_cannot_be_written_is_named_and_leaves_no_part(cifar: Path, tmp_path: Path) -> None:
    options = Options(partition="iid", clients=2)
    with pytest.raises(StateError, match=r"cannot write .*absent/a\.npz"):
        prepare(cifar, tmp_path / "absent" / "a.npz", options)
    with pytest.raises(ConfigError, match="is the archive itself; choose another name"):
        prepare(cifar, cifar, options)
    with pytest.raises(DataError, match="no such file"):
        prepare(tmp_path / "absent.zip", cifar, options)
    assert [path.name for path in tmp_path.iterdir()] == [cifar.name]


# ---- the partitions it adds --------------------------------------------------------------------------------


def test_equal_shares_differ_by_one_at_most_and_hold_everything() -> None:
    parts = iid(np.zeros(103, np.int64), 10, seed=0)
    assert sorted(np.concatenate(parts)) == list(range(103))
    assert {part.size for part in parts} == {10, 11}
    with pytest.raises(DataError, match="give at least 1"):
        iid(np.zeros(3, np.int64), 0, seed=0)


def test_what_a_client_is_tested_on_is_like_what_it_learns() -> None:
    held = np.array([[30, 0, 5], [10, 20, 0], [0, 0, 0]])
    y = np.repeat([0, 1, 2], [40, 10, 7])
    parts = alike(y, held, seed=0)
    assert [np.bincount(y[part], minlength=3).tolist() for part in parts] == [[30, 0, 7], [10, 10, 0], [0, 0, 0]]

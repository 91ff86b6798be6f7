"""MNIST, EMNIST, CIFAR-10, CIFAR-100 and LEAF's FEMNIST and Shakespeare."""

import gzip
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from fedeq_edge.data.archives import Samples, Source, read
from fedeq_edge.data.archives.leaf import LETTERS
from fedeq_edge.errors import ConfigError, DataError
from tests.data.archives import (
    Files,
    cifar10_files,
    cifar100_files,
    digit_files,
    idx,
    laid_out,
    leaf,
    pictures,
    speech,
    tarred,
    writer_files,
    zipped,
)


def samples_of(path: Path, kind: str | None = None, variant: str | None = None) -> Samples:
    with Source(path) as source:
        return read(source, kind, variant)[2]


# ---- MNIST and EMNIST --------------------------------------------------------------------------------------


def test_mnist_is_read_from_its_four_files(tmp_path: Path) -> None:
    samples = samples_of(laid_out(tmp_path, digit_files(train=60, test=20)))
    assert samples.x.shape == (80, 28, 28)
    assert samples.x.dtype == np.uint8
    assert samples.x[59, 1, 0] == 59
    assert samples.x[60, 1, 0] == 0
    assert samples.y[:12].tolist() == [*range(10), 0, 1]
    assert samples.official_test is not None
    assert samples.official_test.sum() == 20
    assert samples.client is None


def test_qmnists_labels_beside_mnist_tell_the_writers(tmp_path: Path) -> None:
    extra = writer_files(train=60, test=50)  # as published, more than MNIST's test part
    samples = samples_of(laid_out(tmp_path, {**digit_files(train=60, test=20), **extra}))
    assert samples.client is not None
    assert samples.client.tolist() == [0] * 20 + [1] * 20 + [2] * 20 + [2100] * 20


def test_writers_of_other_digits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="70 writers for 80 digits"):
        samples_of(laid_out(tmp_path, {**digit_files(60, 20), **writer_files(train=50, test=20)}))


def test_emnist_stands_upright_and_has_its_own_classes(tmp_path: Path) -> None:
    files = {
        **digit_files(52, 26, prefix="gzip/emnist-letters-", classes=26, first=1),
        **digit_files(94, 47, prefix="gzip/emnist-balanced-", classes=47),
    }
    samples = samples_of(zipped(tmp_path / "gzip.zip", files), variant="letters")
    assert samples.classes[0] == "A"
    assert samples.y.min() == 0
    assert samples.y.max() == 25
    # In the file the first row is dark; EMNIST stores images column by column.
    assert samples.x[7, :, 0].tolist() == [0] * 28
    assert samples.x[7, :, 1].tolist() == [7] * 28
    balanced = samples_of(tmp_path / "gzip.zip", variant="balanced")
    assert balanced.classes[36:] == tuple("abdefghnqrt")


def test_an_emnist_set_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    path = laid_out(tmp_path, digit_files(prefix="emnist-digits-"))
    with pytest.raises(DataError, match="no EMNIST byclass in it; choose --variant digits"):
        samples_of(path)
    with pytest.raises(ConfigError, match="--variant greek: emnist has no such; choose byclass, bymerge"):
        samples_of(path, variant="greek")


def _header(kind: int, *shape: int) -> bytes:
    return bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("images-idx3", _header(8, 2**32 - 1, 2**32 - 1, 2**32 - 1), "claims .4294967295, .* has 0 bytes"),
        ("images-idx3", _header(8, 60, 28, 28) + bytes(7), "claims .60, 28, 28., but has 7 bytes"),
        ("images-idx3", _header(8, 60, 28), "is no idx file of 3 dimensions"),
        ("images-idx3", _header(14, 60, 28, 28), "is no idx file"),
        ("images-idx3", b"\x89PNG", "is no idx file"),
        ("images-idx3", b"", "is no idx file"),
        ("images-idx3", gzip.compress(bytes(100))[:-20], "cannot be read"),
        ("images-idx3", idx(np.zeros((59, 28, 28), np.uint8)), r"shape \(59, 28, 28\) and 60 labels"),
        ("images-idx3", idx(np.zeros((60, 8, 8), np.uint8)), "expected 28 x 28 pixels and a label each"),
        ("labels-idx1", idx(np.full(60, 10, np.uint8)), "labels beyond the 10 classes"),
    ],
)
def test_idx_files_that_lie_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    folder = laid_out(tmp_path, {**digit_files(), f"train-{name}-ubyte.gz": content})
    with pytest.raises(DataError, match=message) as refusal:
        samples_of(folder)
    assert "\n" not in str(refusal.value)


def test_one_file_of_mnist_alone_asks_for_its_folder(tmp_path: Path) -> None:
    laid_out(tmp_path, digit_files())
    with pytest.raises(DataError, match="no train-labels-idx1-ubyte in it; give the folder that holds it too"):
        samples_of(tmp_path / "train-images-idx3-ubyte.gz")


# ---- CIFAR -------------------------------------------------------------------------------------------------


def test_cifar10_is_read_from_its_archive_in_the_order_of_its_batches(tmp_path: Path) -> None:
    samples = samples_of(tarred(tmp_path / "cifar-10-binary.tar.gz", cifar10_files()))
    assert samples.x.shape == (240, 3, 32, 32)
    assert samples.x.dtype == np.uint8
    assert samples.x[::40, 0, 0, 1].tolist() == [0, 1, 2, 3, 4, 5]
    assert [samples.classes[label] for label in samples.y[:2]] == ["airplane", "automobile"]
    assert samples.official_test is not None
    assert np.flatnonzero(samples.official_test).tolist() == list(range(200, 240))


def test_cifar100_has_fine_and_coarse_labels(tmp_path: Path) -> None:
    path = tarred(tmp_path / "cifar-100-binary.tar.gz", cifar100_files())
    fine, coarse = samples_of(path), samples_of(path, variant="coarse")
    assert (len(fine.classes), fine.y[:3].tolist()) == (100, [0, 1, 2])
    assert (coarse.classes[3], set(coarse.y)) == ("group3", {3})
    assert fine.x[0, 0, 0, 1] == 0


def test_the_python_version_of_cifar_is_refused_unopened_with_the_remedy(tmp_path: Path) -> None:
    evil = pickle.dumps({"labels": [1]})
    for kind, name in (("10", "cifar-10-batches-py/data_batch_1"), ("100", "cifar-100-python/train")):
        path = tarred(tmp_path / f"cifar-{kind}-python.tar.gz", {name: evil})
        with pytest.raises(DataError, match=f"holds pickles, which could run code; fetch cifar-{kind}-binary.tar.gz"):
            samples_of(path)
    with pytest.raises(DataError, match="holds pickles"):
        samples_of(laid_out(tmp_path / "cifar-10-batches-py", {"data_batch_1": evil}), kind="cifar10")
    with pytest.raises(DataError, match="holds pickles"):
        samples_of(laid_out(tmp_path / "cifar-100-python", {"train": evil}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_2.bin", bytes(3073 * 2 + 1), "6147 bytes, no multiple of 3073"),
        ("data_batch_2.bin", b"", "has 0 bytes"),
        ("data_batch_2.bin", bytes([255] * 3073), "label 255 of 10 classes"),
        ("data_batch_2.bin", None, "4 of the files data_batch_1.bin to _5.bin"),
        ("test_batch.bin", None, r"no test_batch\.bin in it"),
    ],
)
def test_a_damaged_cifar10_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    files = {**cifar10_files(per_batch=3, test=3), f"cifar-10-batches-bin/{name}": content}
    kept = {name: content for name, content in files.items() if content is not None}
    with pytest.raises(DataError, match=message):
        samples_of(laid_out(tmp_path, kept))


# ---- LEAF --------------------------------------------------------------------------------------------------


def femnist(parts: bool = True) -> Files:
    if not parts:
        return {"data/all_data/all_data_0.json": leaf({"f0001_01": pictures(5)}), "data/sampled/x.json": b"{}"}
    return {
        "data/train/a.json": leaf({"f0001_01": pictures(5), "f0002_02": pictures(3, shade=0.0)}),
        "data/test/a.json": leaf({"f0001_01": pictures(2), "f0002_02": pictures(1)}),
        "data/all_data/all_data_0.json": leaf({"f0001_01": pictures(7)}),
    }


def test_femnist_has_its_writers_and_leafs_parts(tmp_path: Path) -> None:
    samples = samples_of(laid_out(tmp_path, femnist()))
    assert samples.x.shape == (11, 28, 28)
    assert samples.x.dtype == np.uint8
    assert samples.x[0, 27, 26:].tolist() == [255, 128]
    assert samples.x[5, 0, 0] == 0
    assert samples.client is not None
    assert samples.client.tolist() == ["f0001_01"] * 5 + ["f0002_02"] * 3 + ["f0001_01"] * 2 + ["f0002_02"]
    assert samples.official_test is not None
    assert samples.official_test.tolist() == [False] * 8 + [True] * 3
    assert len(samples.classes) == 62


def test_femnist_without_parts_is_all_of_it(tmp_path: Path) -> None:
    samples = samples_of(zipped(tmp_path / "leaf.zip", femnist(parts=False)))
    assert samples.official_test is None
    assert len(samples.y) == 5


def test_shakespeare_is_codes_and_the_next_character(tmp_path: Path) -> None:
    path = tmp_path / "all_data.json"
    path.write_bytes(leaf({"HAMLET": speech(4)}))
    samples = samples_of(path)
    assert samples.x.shape == (4, 80)
    assert samples.letters == 0
    text = "".join(LETTERS[int(code)] for code in samples.x[0])
    assert text.startswith("To be, or not to be: that is the question")
    assert samples.x[1, -1] == samples.y[0]
    assert samples_of(path, variant="onehot").letters == 80


def test_characters_beyond_leafs_alphabet_are_spaces(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(leaf({"X": {"x": ["é€" + "a" * 78], "y": ["~"]}}))
    samples = samples_of(tmp_path / "a.json")
    assert [LETTERS[int(code)] for code in samples.x[0, :3]] == [" ", "?", "a"]
    assert LETTERS[int(samples.y[0])] == " "


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (leaf({"u": {"x": [[0.5] * 783], "y": [1]}}), r"images of shape \(1, 783\) for 1 labels"),
        (leaf({"u": {"x": [[0.5] * 784], "y": [1, 2]}}), "for 2 labels"),
        (leaf({"u": {"x": [[0.5] * 784], "y": [62]}}), "labels beyond 0 to 61"),
        (leaf({"u": {"x": [[2.0] * 784], "y": [1]}}), "not 784 values from 0 to 1"),
        (leaf({"u": {"x": [[0.5], [0.5, 1]], "y": [1, 1]}}), "no such LEAF file"),
        (leaf({"u" * 300: pictures(1)}), "a user's name of 300 characters"),
        (leaf({"u": {"x": [[0.5] * 784], "y": [10**30]}}), "no such LEAF file"),
        (b'{"user_data": {"u": {"x": [[' + b"[" * 100_000, "no such LEAF file"),
        (leaf({"u": pictures(2)})[:-5], "no such LEAF file"),
    ],
)
def test_a_damaged_femnist_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=message) as refusal:
        samples_of(tmp_path, kind="femnist")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("x", "y"), [(["short"], ["a"]), (["a" * 80], ["ab"]), (["a" * 80], ["a", "b"]), (["a" * 80], [1])]
)
def test_a_damaged_shakespeare_is_refused(tmp_path: Path, x: list[str], y: list[str]) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"user_data": {"u": {"x": x, "y": y}}}))
    with pytest.raises(DataError, match="make it again with LEAF"):
        samples_of(tmp_path)


def test_a_json_of_something_else_is_no_leaf_file(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"name": "x"}')
    with pytest.raises(DataError, match=r"it holds package\.json, which is none of"):
        samples_of(tmp_path)


def test_femnist_and_shakespeare_are_told_apart_by_their_contents(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(leaf({"u": speech(1)}))
    with pytest.raises(DataError, match="no LEAF's json with images in it; it looks like --kind shakespeare"):
        samples_of(tmp_path, kind="femnist")


def test_a_leaf_file_of_nobody_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(leaf({"u": {"x": [], "y": []}}))
    with pytest.raises(DataError, match="is none of"):
        samples_of(tmp_path)

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedeq_edge.data import npz
from fedeq_edge.data.npz import ClientData, describe, load_client, load_fleet, save_client
from fedeq_edge.errors import DataError

ROWS = 40


def columns(**changes: Any) -> dict[str, Any]:
    """A fleet file: 4 clients with 10 rows each, labels 0 to 3 in turn, every second row a test row."""
    rows = np.arange(ROWS)
    given = {
        "x": np.random.default_rng(0).normal(size=(ROWS, 3)).astype(np.float32),
        "y": (rows % 4).astype(np.uint8),
        "client": (rows // 10).astype(np.int16),
        "local_test": rows % 2 == 1,
        "official": rows >= 30,
    }
    return {name: array for name, array in {**given, **changes}.items() if array is not None}


def written(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def single(**changes: Any) -> dict[str, Any]:
    given = {"x": np.ones((10, 3), np.float32), "y": np.arange(10) % 2, "split": np.arange(10) % 2 == 0}
    return {name: array for name, array in {**given, **changes}.items() if array is not None}


# ---- one device --------------------------------------------------------------------------------------------


def test_what_was_saved_comes_back_even_where_the_name_has_no_ending(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    data = ClientData(
        x_train=rng.random((7, 1, 4, 4), dtype=np.float32),
        y_train=np.arange(7) % 3,
        x_test=rng.random((3, 1, 4, 4), dtype=np.float32),
        y_test=np.arange(3),
    )
    save_client(tmp_path / "pi-0.data", data)
    again = load_client(tmp_path / "pi-0.data")
    for part in ("x_train", "y_train", "x_test", "y_test"):
        assert (getattr(again, part) == getattr(data, part)).all()
        assert getattr(again, part).dtype == getattr(data, part).dtype


def test_a_text_split_marks_its_test_rows(tmp_path: Path) -> None:
    split = np.array(["train"] * 7 + ["test"] * 3)
    data = load_client(written(tmp_path / "a.npz", **single(split=split)))
    assert (data.y_train.size, data.y_test.size) == (7, 3)


def test_without_a_split_every_fifth_row_is_a_test_row(tmp_path: Path) -> None:
    x = np.arange(10, dtype=np.float64)[:, None]
    data = load_client(written(tmp_path / "a.npz", **single(x=x, split=None)))
    assert data.x_test[:, 0].tolist() == [4.0, 9.0]


def test_byte_images_are_scaled_and_get_a_channel_axis(tmp_path: Path) -> None:
    x = np.full((10, 4, 4), 255, np.uint8)
    data = load_client(written(tmp_path / "a.npz", **single(x=x)))
    assert data.x_train.shape == (5, 1, 4, 4)
    assert data.x_train.dtype == np.float32
    assert (data.x_train == 1.0).all()


def test_half_precision_windows_keep_their_shape_and_values(tmp_path: Path) -> None:
    x = np.full((10, 9, 128), 0.5, np.float16)
    data = load_client(written(tmp_path / "a.npz", **single(x=x)))
    assert data.x_train.shape == (5, 9, 128)
    assert data.x_train.dtype == np.float32
    assert (data.x_train == 0.5).all()


# ---- a fleet -----------------------------------------------------------------------------------------------


def test_a_fleet_has_one_client_per_value_and_its_own_test_rows(tmp_path: Path) -> None:
    given = columns()
    fleet = load_fleet(written(tmp_path / "f.npz", **given), test="local_test")
    assert list(fleet) == ["0", "1", "2", "3"]
    assert (fleet["2"].x_train == given["x"][20:30:2]).all()
    assert (fleet["2"].x_test == given["x"][21:30:2]).all()
    assert (fleet["2"].y_test == given["y"][21:30:2]).all()


def test_other_names_for_the_arrays_are_options(tmp_path: Path) -> None:
    given = columns()
    path = written(tmp_path / "f.npz", X=given["x"], label=given["y"], subject=given["client"])
    assert len(load_fleet(path, x="X", y="label", client="subject")) == 4


def test_where_chooses_rows_and_its_negation_the_others(tmp_path: Path) -> None:
    path = written(tmp_path / "f.npz", **columns())
    assert list(load_fleet(path, where="official")) == ["3"]
    assert list(load_fleet(path, where="!official")) == ["0", "1", "2"]


def test_labels_are_renumbered_alike_on_all_clients_although_some_lack_a_class(tmp_path: Path) -> None:
    y = np.where(np.arange(ROWS) < 20, [3, 7] * 20, [7, 9] * 20)
    fleet = load_fleet(written(tmp_path / "f.npz", **columns(y=y)))
    assert set(fleet["0"].y_train) == {0, 1}
    assert set(fleet["3"].y_train) == {1, 2}


@pytest.mark.parametrize("classes", ["1-2", "1,2", "1, 2-2", [2, 1]])
def test_classes_are_chosen_by_range_or_list(tmp_path: Path, classes: str | list[int]) -> None:
    fleet = load_fleet(written(tmp_path / "f.npz", **columns()), classes=classes)
    assert sum(data.y_train.size + data.y_test.size for data in fleet.values()) == ROWS // 2
    assert {int(label) for data in fleet.values() for label in data.y_train} == {0, 1}


def test_the_first_clients_are_those_of_the_rows_that_remain(tmp_path: Path) -> None:
    client = np.repeat([30, 4, 20, 100], 10)
    path = written(tmp_path / "f.npz", **columns(client=client))
    assert list(load_fleet(path, clients=2)) == ["4", "20"]
    assert list(load_fleet(path, clients=2, where="!official")) == ["4", "20"]
    assert list(load_fleet(path, clients=1, where="official")) == ["100"]


def test_clients_that_a_column_sets_apart_come_on_top_of_those_asked_for(tmp_path: Path) -> None:
    # a client with rows of both kinds is one of the others
    path = written(tmp_path / "f.npz", **columns(official=np.arange(ROWS) >= 18))
    fleet = load_fleet(path, clients=1, apart="official")
    assert {name: data.apart for name, data in fleet.items()} == {"0": False, "2": True, "3": True}
    assert not any(data.apart for data in load_fleet(path).values())


def test_clients_drawn_by_lot_are_those_of_their_seed_in_order(tmp_path: Path) -> None:
    path = written(tmp_path / "f.npz", **columns(client=np.arange(ROWS) // 2, local_test=np.arange(ROWS) % 2 == 0))
    first, again, other = (list(load_fleet(path, test="local_test", clients=5, seed=n)) for n in (1, 1, 2))
    assert first == again != other
    assert list(map(int, first)) == sorted(map(int, first))
    assert len(set(first)) == 5


def test_validation_rows_are_training_rows_that_can_be_told(tmp_path: Path) -> None:
    split = np.resize(["train", "validation", "test", "train", "train"], ROWS)
    data = load_fleet(written(tmp_path / "f.npz", **columns(split=split)))["1"]
    assert data.y_train.size == 8
    assert data.validation is not None
    assert data.validation.tolist() == [False, True, False, False] * 2
    plain = written(tmp_path / "g.npz", **columns(split=np.where(split == "test", "test", "train")))
    assert load_fleet(plain)["1"].validation is None
    assert load_fleet(plain, test="local_test")["1"].validation is None


def test_rows_that_are_left_out_may_hold_anything(tmp_path: Path) -> None:
    given = columns()
    given["x"][35] = np.nan
    assert list(load_fleet(written(tmp_path / "f.npz", **given), where="!official")) == ["0", "1", "2"]


# ---- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"client": "clients"}, "no array 'clients', nearest is 'client'; it has x, y, client"),
        ({"x": None}, {}, "no array 'x'"),
        ({"x": np.ones((39, 3))}, {}, r"differ in length \(x 39, y 40, client 40\)"),
        ({"x": np.ones(ROWS)}, {}, r"array 'x' is float64 of shape \(40,\)"),
        ({"x": np.full((ROWS, 2), "a")}, {}, "samples are numbers"),
        ({"x": np.ones((ROWS, 0))}, {}, "samples are numbers"),
        ({"x": np.full((ROWS, 2), 1e300)}, {}, "NaN or infinity in 40 of 40 rows"),
        ({"x": None, "X": np.ones((ROWS, 3)), "exp": np.ones(ROWS)}, {}, "no array 'x', nearest is 'X'"),
        ({"y": np.ones(ROWS)}, {}, r"array 'y' is no labels \(float64\)"),
        ({"y": np.arange(ROWS) - 1}, {}, "give integers from 0"),
        ({"y": np.arange(ROWS) + 5_000_000}, {}, "is no labels"),
        ({"client": np.ones((ROWS, 2))}, {}, r"array 'client' has shape \(40, 2\)"),
        ({}, {"test": "y"}, "array 'y' is uint8 with 40 rows; give bool, or text"),
        ({"local_test": np.ones(39, bool)}, {"test": "local_test"}, "with 39 rows; give bool.*, 40 rows"),
        ({}, {"where": "!y"}, "array 'y' is uint8"),
        ({"local_test": np.arange(ROWS) < 15}, {"test": "local_test"}, "client 0 has no training rows of 10"),
        ({"local_test": np.arange(ROWS) > 15}, {"test": "local_test"}, "client 0 has no test rows of 10"),
        ({}, {"classes": "0-9"}, "no sample has class 4; the labels are 0, 1, 2, 3"),
        ({}, {"classes": "0-"}, "cannot be read at '0-'"),
        ({}, {"classes": "0;1"}, 'cannot be read at .*; write "0-5" or "0,1,4"'),
        ({}, {"classes": "3-1"}, "'3-1' is no range"),
        ({}, {"classes": "0-99999999999"}, "is no range"),
        ({}, {"classes": []}, "no row is left"),
        ({"official": np.zeros(ROWS, bool)}, {"where": "official"}, "no row is left"),
        ({}, {"clients": 5}, "5 clients asked for, it has 4"),
        ({}, {"clients": 0}, "give 1 to 4"),
    ],
)
def test_a_fleet_that_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    path = written(tmp_path / "fleet.npz", **columns(**changes))
    with pytest.raises(DataError, match=message) as refusal:
        load_fleet(path, **options)
    assert "\n" not in str(refusal.value)
    if "classes" not in message and "range" not in message and "cannot be read" not in message:
        assert str(path) in str(refusal.value)


def test_values_that_are_no_numbers_are_counted_and_located_by_their_row_in_the_file(tmp_path: Path) -> None:
    given = columns()
    given["x"][[33, 37], 1] = [np.nan, np.inf]
    with pytest.raises(DataError, match="in 2 of 10 rows, first in row 33"):
        load_fleet(written(tmp_path / "f.npz", **given), where="official")


def test_an_empty_client_file_is_refused_by_name(tmp_path: Path) -> None:
    arrays = {"x": np.ones((0, 3)), "y": np.ones(0, int), "split": np.ones(0, bool)}
    with pytest.raises(DataError, match="client pi-4 has no training rows of 0"):
        load_client(written(tmp_path / "pi-4.npz", **arrays))


def test_object_arrays_are_refused_before_they_are_read(tmp_path: Path) -> None:
    ragged = np.array([[1], [2, 3]], dtype=object)
    with pytest.raises(DataError, match="array 'x' holds Python objects"):
        load_client(written(tmp_path / "a.npz", x=ragged, y=np.arange(2)))


def test_an_array_beyond_the_limit_is_refused_by_its_header_alone(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40, 4)})
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as file:
        file.writestr("x.npy", header.getvalue())
    with pytest.raises(DataError, match=f"has {(1 << 45)} bytes, the limit is {npz.LARGEST_ARRAY_BYTES}"):
        load_client(tmp_path / "bomb.npz")


def test_a_file_that_is_absent_or_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_client(tmp_path / "absent.npz")
    text = tmp_path / "text.npz"
    text.write_text("x,y\n1,2\n")
    with pytest.raises(DataError, match=r"text\.npz: not a readable \.npz"):
        load_client(text)
    with pytest.raises(DataError, match="not a readable"):
        load_client(tmp_path)


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: float) -> None:
    whole = written(tmp_path / "a.npz", **single()).read_bytes()
    (tmp_path / "b.npz").write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(DataError, match="not a readable"):
        load_client(tmp_path / "b.npz")


def test_a_file_with_flipped_bytes_is_refused_by_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    save_client(
        path, load_client(written(tmp_path / "plain.npz", **single(x=np.random.default_rng(2).random((10, 99)))))
    )
    damaged = bytearray(path.read_bytes())
    damaged[400:420] = bytes(20)
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="not a readable"):
        load_client(path)


# ---- tables ------------------------------------------------------------------------------------------------


def test_the_summary_counts_clients_samples_and_labels(tmp_path: Path) -> None:
    summary = describe(load_fleet(written(tmp_path / "f.npz", **columns()), test="local_test"))
    assert summary.shape == (3,)
    assert summary.classes == 4
    assert summary.clients["0"].train == summary.clients["0"].test == 5
    assert summary.clients["0"].histogram == (3, 0, 2, 0)


def one_client(shape: tuple[int, ...], labels: list[int]) -> ClientData:
    x, y = np.zeros((len(labels), *shape), np.float32), np.array(labels)
    return ClientData(x_train=x, y_train=y, x_test=x, y_test=y)


def test_clients_whose_samples_differ_in_shape_are_both_named() -> None:
    with pytest.raises(DataError, match=r"client b: samples of shape \(4,\), but client a has \(3,\)"):
        describe({"a": one_client((3,), [0, 1]), "b": one_client((4,), [0, 1])})


def test_clients_that_number_their_classes_differently_are_noticed_by_the_gap() -> None:
    with pytest.raises(DataError, match="labels reach 7, but no client has label 2"):
        describe({"a": one_client((3,), [0, 1]), "b": one_client((3,), [6, 7])})


def test_a_fleet_without_clients_is_refused() -> None:
    with pytest.raises(DataError, match="no client"):
        describe({})

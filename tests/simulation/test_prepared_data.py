"""Experiments on the files that `fedeq data prepare` writes: their columns, their validation part, unseen people."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedeq_edge.data.npz import ClientData
from fedeq_edge.data.options import Options
from fedeq_edge.data.prepare import prepare as prepare_file
from fedeq_edge.errors import FedEqError
from fedeq_edge.simulation import experiment, run
from fedeq_edge.simulation.collect import collect
from fedeq_edge.simulation.results import read
from fedeq_edge.simulation.scenario import Scenario, Setup, prepare
from tests.data.archives import digit_files, har_files, laid_out, writer_files, zipped
from tests.simulation.test_experiment_files import Nobody


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine writers of MNIST's training part and two of its test part, 20 digits each; image i is all i."""
    folder = tmp_path_factory.mktemp("mnist")
    files = {**digit_files(train=180, test=40), **writer_files(train=180, test=40)}
    prepare_file(laid_out(folder / "mnist", files), folder / "mnist.npz", Options())
    return folder / "mnist.npz"


def scenario(path: Path, *, tuning: bool = False, tables: Any = None, **data: Any) -> Scenario:
    found = experiment.parse({"name": "t", **(tables or {}), "data": {"file": str(path), **data}}, "t")
    return prepare(Setup(experiment=found[0].experiment, seed=0, tuning=tuning))


def shades(data: ClientData, part: str) -> set[int]:
    """Which images those are, by their second row."""
    return set(np.rint(getattr(data, part)[:, 0, 1, 0] * 255).astype(int).tolist())


def test_the_official_tests_writers_are_unseen_and_the_others_drawn_by_lot(writers: Path) -> None:
    made = scenario(writers, clients=4, unseen="official_test")
    assert set(made.unseen) == {"client-2100", "client-2101"}
    assert len(made.fleet) == 4
    draws = {tuple(scenario(writers, clients=4, unseen="official_test", seed=seed).fleet) for seed in (0, 0, 1, 2)}
    assert len(draws) == 3
    assert len(scenario(writers, unseen="official_test").fleet) == 9


def test_samples_as_vectors_are_what_dense_cells_take(writers: Path) -> None:
    images, vectors = scenario(writers), scenario(writers, flat=True, tables={"model": {"cell": "monotone"}})
    for name, data in images.fleet.items():
        for part in ("x_train", "x_test"):
            assert np.array_equal(getattr(vectors.fleet[name], part), getattr(data, part).reshape(-1, 784))
    with pytest.raises(FedEqError, match=r"by data\.flat"):
        scenario(writers, tables={"model": {"cell": "monotone"}})


def test_settings_are_chosen_on_the_files_validation_part_and_trained_on_it_afterwards(writers: Path) -> None:
    with np.load(writers) as file:
        shade, split, client = file["x"][:, 1, 0], file["split"], file["client"]
    tuned, whole = (scenario(writers, tuning=tuning, unseen="official_test") for tuning in (True, False))
    assert not tuned.unseen
    for number, name in enumerate(tuned.fleet):
        parts = {word: set(shade[(client == number) & (split == word)].tolist()) for word in np.unique(split)}
        assert shades(tuned.fleet[name], "x_train") == parts["train"]
        assert shades(tuned.fleet[name], "x_test") == parts["validation"]
        assert shades(whole.fleet[name], "x_train") == parts["train"] | parts["validation"]
        assert shades(whole.fleet[name], "x_test") == parts["test"]


def test_a_study_written_for_other_names_takes_a_prepared_file_as_it_is(tmp_path: Path) -> None:
    prepare_file(zipped(tmp_path / "har.zip", har_files(windows=30)), tmp_path / "own.npz", Options())
    data = {"x": "X", "client": "subject", "test": "local_test", "ordered": True, "unseen": "official_test"}
    made = scenario(tmp_path / "own.npz", tuning=True, **data)
    assert list(made.fleet) == ["client-1", "client-2"]
    assert {len(one.y_test) for one in made.fleet.values()} == {4}  # two of each activity, as the file says


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"unseen": "official"}, "no array 'official', nearest is 'official_test'"),
        ({"unseen": "split"}, "give bool"),
        ({"unseen": "official_test", "clients": 10}, "10 clients asked for, it has 9"),
        ({"unseen": "official_test", "where": "!official_test"}, "'official_test' marks no client"),
        ({"unseen": "official_test", "where": "official_test"}, "no row is left to any client"),
    ],
)
def test_unseen_people_that_cannot_be_kept_out_are_told_in_one_line(
    data: dict[str, Any], said: str, writers: Path
) -> None:
    with pytest.raises(FedEqError) as caught:
        scenario(writers, **data)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_column_says_nothing_of_the_digits() -> None:
    with pytest.raises(FedEqError, match="marks no client of digits"):
        scenario(Path("digits"), unseen="official_test")


def test_a_writer_without_a_validation_part_is_named_before_anything_runs(tmp_path: Path) -> None:
    rows = np.arange(20)
    split = np.where(rows % 5 == 4, "test", np.where(rows == 0, "validation", "train"))
    np.savez(tmp_path / "own.npz", x=np.ones((20, 8, 8), np.uint8), y=rows % 2, client=rows // 10, split=split)
    with pytest.raises(FedEqError, match=r"client client-1 has 8 training samples, 0 of them for validation; mark"):
        scenario(tmp_path / "own.npz", tuning=True)


def test_a_shortened_choice_of_settings_leaves_the_run_its_length(writers: Path, tmp_path: Path) -> None:
    tables = {
        "name": "short",
        "data": {"file": str(writers), "clients": 3, "unseen": "official_test"},
        "model": {"channels": 8, "groups": 4, "stem_width": 4},
        "train": {"rounds": 2, "epochs": 1, "budgets": [2]},
        "evaluation": {"every": 0, "local": False},
        "tune": {"seed": 5, "rounds": 1, "train.learning_rate": [0.01, 0.1]},
    }
    variants, options = experiment.parse(tables, "t"), run.Options(workers=1, out=tmp_path)
    (result,) = run.run(variants, options, Nobody())
    assert result.end["rounds"] == 2
    assert len(result.of_kind("unseen")) == 2
    assert [read(path).end["rounds"] for path in sorted((tmp_path / "tune").glob("*.jsonl"))] == [1, 1]
    found = collect(variants, options)
    assert (len(found.results), len(found.tuning), found.missing) == (1, 2, [])


@pytest.mark.parametrize("rounds", [0, "ten", 1.5])
def test_a_choice_of_settings_by_no_whole_rounds_is_refused(rounds: Any) -> None:
    with pytest.raises(FedEqError, match=r"\[tune\]: rounds is .*; give a whole number"):
        experiment.parse({"name": "t", "tune": {"rounds": rounds, "train.learning_rate": [0.1]}}, "t")

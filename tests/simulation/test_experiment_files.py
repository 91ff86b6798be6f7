"""Experiment files: checked whole before anything runs, each fault in one line."""

from pathlib import Path

import pytest

from fedeq_edge.errors import ConfigError, FedEqError
from fedeq_edge.simulation import experiment
from fedeq_edge.simulation.run import Options, Runs
from fedeq_edge.simulation.scenario import Setup, load_data, prepare

HEAD = 'name = "t"\n'


class Nobody:
    """A view that looks away."""

    def begins(self, name: str, number: int, runs: int, rounds: int) -> None:
        pass

    def line(self, line: object) -> None:
        pass


def refused(text: str, folder: Path) -> str:
    """What is said of this file, before anything runs."""
    path = folder / "experiment.toml"
    path.write_text(text)
    with pytest.raises(FedEqError) as caught:
        Runs(experiment.load(path), Options(), Nobody())
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seeds = [0]\n", "name is missing; add it"),
        (HEAD + "sedes = [0]\n", "unknown key 'sedes'; did you mean 'seeds'?"),
        (HEAD + "seeds = [1, 1]\n", "give different numbers"),
        (HEAD + "[data]\nfiel = 'a'\n", "unknown key 'fiel'; did you mean 'file'?"),
        (HEAD + "[data]\nfile = 'absent.npz'\n", "no such file"),
        (HEAD + "[data]\nvalidation = 1.0\n", "data.validation is 1.0"),
        (HEAD + "[data]\nunseen = 6\n", "keeps all 6 clients out"),
        (HEAD + "[data]\nunseen = ['mars']\n", "there is no client 'mars'"),
        (HEAD + "[train]\nlerning_rate = 1\n", "did you mean 'learning_rate'?"),
        (HEAD + "[train]\nlearning_rate = -1\n", "train.learning_rate is -1"),
        (HEAD + "[train]\ncompute_s = 90.0\n", "must be below schedule.deadline_s"),
        (HEAD + "[method]\npreset = 'fedprx'\n", "nearest is 'fedprox'"),
        (HEAD + "[method]\nrho = 0\n", "rho is 0"),
        (HEAD + "[model]\npreset = 'big'\n", "model.preset is 'big'"),
        (HEAD + "[model]\ngroups = 7\n", "not divisible by groups"),
        (HEAD + "[model]\npreset = 'cnn-fedavg'\nchannels = 3\n", "model: unknown key 'channels'"),
        (HEAD + "[model]\nnetwork = 'mlp'\n", "widths is missing; add it"),
        (HEAD + "[train]\ncompare_local = true\n", "train: unknown key 'compare_local'"),
        (HEAD + "[wire]\ncodec = 'int9'\n", 'codec "int9" is unknown'),
        (HEAD + "[schedule]\nmin_devices = 7\n", "6 clients take part"),
        (HEAD + "[[fleet.groups]]\nprofil = 'x'\n", "did you mean 'profile'?"),
        (HEAD + "[[fleet.groups]]\nprofile = 'raspbery-pi-4'\n", "did you mean 'raspberry-pi-4'?"),
        (HEAD + "[[fleet.groups]]\ndropout = 1.0\n", "dropout below 1"),
        (HEAD + "[fleet]\ngroups = []\n", "fleet.groups is empty"),
        (HEAD + "[evaluation]\nbudgets = [0]\n", "values of K from 1"),
        (HEAD + "variants = [{name = 'a'}, {name = 'a'}]\n", "names of their own"),
        (HEAD + "variants = [{name = 'a', train = {epoch = 1}}]\n", "did you mean 'epochs'?"),
        (HEAD + "[tune]\n'train.learning_rate' = 0.1\n", "give a list of values"),
        (HEAD + "[tune]\n'train.rate' = [0.1]\n", "train: unknown key 'rate'"),
        (HEAD + "[tune]\nrounds = 3\n", "name some, or leave it out"),
        (HEAD + "[tune]\nrounds = 3\n'train.rounds' = [5]\n", "name some, or leave it out"),
        (HEAD + "tune = 3\n", "write a table, [tune]"),
        (HEAD + "fleet = 3\n", "write [[fleet.groups]]"),
        (HEAD + "[fleet.groups]\nshare = 1.0\n", "write [[fleet.groups]]"),
        (HEAD + "[[fleet]]\nshare = 1.0\n", "write [[fleet.groups]]"),
        (HEAD + "[fleet]\ngroups = ['a']\n", "write [[fleet.groups]]"),
        (HEAD + "[data]\nseed = -1\n", "data.seed is -1"),
        (HEAD + "[data]\nclasses = '0-3'\n", "data.classes is about arrays of a file, and the digits have none"),
        (HEAD + "[data]\ntest = 'test'\n", "data.test is about arrays of a file, and the digits have none"),
        (HEAD + "[data]\nx = 'X'\n", "data.x is about arrays of a file, and the digits have none"),
        (HEAD + "[evaluation]\nbudgets = [1000000]\n", "values of K from 1 to"),
        (HEAD + "[evaluation]\ntarget = 97.0\n", "evaluation.target is 97.0"),
        ("name = ", "is not TOML"),
    ],
)
def test_a_fault_is_told_before_anything_runs(text: str, said: str, tmp_path: Path) -> None:
    assert said in refused(text, tmp_path)


def test_a_file_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        experiment.load(tmp_path / "absent.toml")


def test_an_unknown_study_is_told_which_there_are() -> None:
    with pytest.raises(ConfigError, match=r"known are .*digits"):
        experiment.study("dgits")


@pytest.mark.parametrize("name", experiment.studies())
def test_every_study_that_ships_can_be_read(name: str, tmp_path: Path) -> None:
    variants = experiment.study(name, tmp_path / "own.npz")
    assert {variant.experiment.data.file for variant in variants} == {str(tmp_path / "own.npz")}


def test_a_study_on_public_data_says_which_file_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"study har runs on har\.npz; give that file with --data"):
        experiment.study("har")


def test_variants_change_what_they_name_and_nothing_else() -> None:
    tables = {
        "name": "t",
        "train": {"rounds": 3, "epochs": 2},
        "variants": [{"name": "a"}, {"name": "b", "train": {"rounds": 5}, "method": {"preset": "fedavg"}}],
        "tune": {"seed": 7, "train.learning_rate": [0.1, 0.2], "method.rho": [1.0, 2.0]},
    }
    first, second = experiment.parse(tables, "t")
    assert first.experiment.train == {"rounds": 3, "epochs": 2}
    assert second.experiment.train == {"rounds": 5, "epochs": 2}
    assert second.experiment.method == {"preset": "fedavg"}
    assert (second.tune_seed, len(second.choices)) == (7, 4)
    label, choice = second.choices[-1]
    assert label == "train.learning_rate = 0.2, method.rho = 2.0"
    assert choice.method == {"preset": "fedavg", "rho": 2.0}


def test_tuning_sees_no_test_sample() -> None:
    chosen = experiment.parse({"name": "t", "data": {"clients": 4}}, "t")[0].experiment
    whole = load_data(chosen.data)
    tuned = prepare(Setup(experiment=chosen, seed=0, tuning=True))
    for name, data in tuned.fleet.items():
        training = {row.tobytes() for row in whole[name].x_train}
        fitted, held = ({row.tobytes() for row in rows} for rows in (data.x_train, data.x_test))
        assert fitted | held == training
        assert len(data.y_test) + len(data.y_train) == len(whole[name].y_train)
        assert 0.1 < len(data.y_test) / len(whole[name].y_train) < 0.3


def test_groups_share_the_fleet_as_they_ask() -> None:
    groups = [{"share": 1.0, "profile": "raspberry-pi-4"}, {"share": 3.0, "budgets": [2]}]
    tables = {"name": "t", "data": {"clients": 12}, "fleet": {"groups": groups}}
    made = prepare(Setup(experiment=experiment.parse(tables, "t")[0].experiment, seed=3))
    slow = [name for name, board in made.boards.items() if board.group.profile]
    assert (len(slow), len(made.boards)) == (3, 12)
    assert all(board.plan.budgets == (2,) for name, board in made.boards.items() if name not in slow)
    assert made.boards[slow[0]].calibration.evaluation_s > made.reference.evaluation_s

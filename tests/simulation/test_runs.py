"""Whole runs with real training: workers, resuming, results."""

import json
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedeq_edge.errors import ConfigError, StateError
from fedeq_edge.simulation import run
from fedeq_edge.simulation.experiment import Variant, parse
from fedeq_edge.simulation.jobs import Job, Outcome
from fedeq_edge.simulation.results import read
from fedeq_edge.simulation.scenario import Setup, prepare
from fedeq_edge.simulation.summary import summarise
from fedeq_edge.simulation.targets import costs
from fedeq_edge.simulation.workers import Here, Worker
from tests.simulation.test_experiment_files import Nobody

TABLES: dict[str, Any] = {
    "name": "tiny",
    "data": {"file": "digits", "clients": 4, "unseen": 1},
    "model": {"channels": 8, "groups": 4, "stem_width": 4},
    "train": {"rounds": 3, "epochs": 1, "budgets": [2, 3]},
    "schedule": {"fraction": 0.7},
    "evaluation": {"every": 2, "budgets": [1, 3], "target": 0.3},
    "fleet": {"groups": [{"profile": "raspberry-pi-4", "dropout": 0.1, "up_mbit": 1.0}]},
}


def variants(**changes: Any) -> list[Variant]:
    return parse({**TABLES, **changes}, "tiny")


def told(path: Path) -> list[str]:
    """The lines that must be the same on every machine and every attempt."""
    return [line for line in path.read_text().splitlines() if json.loads(line)["kind"] != "wall"]


def play(folder: Path, *, workers: int = 1, **changes: Any) -> Path:
    (result,) = run.run(variants(**changes), run.Options(workers=workers, out=folder), Nobody())
    return result.path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return play(tmp_path_factory.mktemp("whole"))


def test_a_result_tells_what_was_run_and_what_came_of_it(whole: Path) -> None:
    result = read(whole)
    header, end = result.header, result.end
    assert header["experiment"]["name"] == "tiny"
    assert header["plan"]["rounds"] == 3
    assert header["reference_s"]["evaluation_s"] > 0.0
    assert [line["round"] for line in result.of_kind("round")] == [1, 2, 3]
    assert [line["round"] for line in result.of_kind("evaluation")] == [2]
    assert (len(result.of_kind("client")), len(result.of_kind("unseen"))) == (3, 1)
    assert all(0.0 < line["trained"]["backward_residual"] <= 1.0 for line in result.of_kind("client"))
    assert set(end["at"]) == {"1", "3"}
    assert end["personal"] > 0.5
    assert end["unseen"] > 0.3
    assert costs(result)["rounds_to_target"] == 2
    assert not list(whole.parent.glob("*.journal"))


# Ray leaves files and processes of its own to the interpreter's end, and says what its next version will do.
@pytest.mark.filterwarnings("default::ResourceWarning", "default::FutureWarning")
@pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning")
def test_ray_comes_to_the_bytes_of_one(whole: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'fedeq-edge[ray]'")
    options = run.Options(engine="ray", workers=2, out=tmp_path)
    (result,) = run.run(variants(), options, Nobody())
    assert told(result.path) == told(whole)


class Killed(BaseException):
    """As sudden as a kill."""


class Stopped(Here):
    """This process as the worker, killed before its `left`th job."""

    def __init__(self, left: int) -> None:
        self._left = left

    def run(self, wanted: Iterable[Job]) -> Iterator[Outcome]:
        for outcome in super().run(wanted):
            if self._left == 0:
                raise Killed
            self._left -= 1
            yield outcome


@pytest.mark.parametrize("jobs", [0, 4, 9])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    jobs: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "Here", lambda: Stopped(jobs))
    with pytest.raises(Killed):
        play(tmp_path)
    path = tmp_path / whole.name
    with pytest.raises(StateError, match="has not come to its end"):
        read(path)
    with path.with_suffix(".journal").open("ab") as journal:
        journal.write(b"\x40\0\0\0half of")
    monkeypatch.setattr(run, "Here", Here)
    assert told(play(tmp_path)) == told(whole)
    (wall,) = read(path).of_kind("wall")
    assert wall["replayed"] == jobs


def test_a_finished_run_is_not_run_again(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / whole.name).write_bytes(whole.read_bytes())
    monkeypatch.setattr(run, "play", None)
    assert play(tmp_path) == tmp_path / whole.name


def test_results_of_another_experiment_are_not_written_over(whole: Path, tmp_path: Path) -> None:
    (tmp_path / whole.name).write_bytes(whole.read_bytes())
    with pytest.raises(ConfigError, match=r"of another run .*plan"):
        play(tmp_path, train={"rounds": 2, "epochs": 1, "budgets": [2, 3]})


def test_settings_are_chosen_by_validation_parts(tmp_path: Path) -> None:
    grid: dict[str, Any] = {
        "tune": {"train.learning_rate": [1e-6, 0.1]},
        "train": {"rounds": 2, "epochs": 2, "budgets": [2]},
    }
    result = read(play(tmp_path, method={"preset": "fedper", "head_step": "joint"}, **grid))
    tuned = result.header["tuned"]
    assert set(tuned["validation"]) == {"train.learning_rate = 1e-06", "train.learning_rate = 0.1"}
    assert tuned["validation"][tuned["chosen"]] == max(tuned["validation"].values())
    assert len(list((tmp_path / "tune").glob("*.jsonl"))) == 2
    assert all(read(path).header["tuning"] for path in (tmp_path / "tune").glob("*.jsonl"))


def test_a_method_without_exchange_trains_alone(tmp_path: Path) -> None:
    result = read(play(tmp_path, method={"preset": "local"}))
    assert result.end["rounds"] == 0
    assert result.end["personal"] > 0.5


@pytest.mark.parametrize("preset", ["ditto", "fedavg-finetune", "knn-per", "fedavg-momentum"])
def test_every_kind_of_method_runs(preset: str, tmp_path: Path) -> None:
    result = read(play(tmp_path, method={"preset": preset}, train={"rounds": 1, "epochs": 1, "budgets": [2]}))
    assert result.end["personal"] > 0.3
    assert result.of_kind("client")[0]["local"] is not None


def test_an_explicit_network_stands_beside_an_equilibrium_model(tmp_path: Path) -> None:
    small = {"network": "cnn", "widths": [8], "dense": [16], "kernel": 3}
    result = read(play(tmp_path, model=small))
    assert result.header["model"]["network"] == "cnn"
    assert result.header["parameters"]["theta"] == 8 * 9 + 8 + 8 * 16 * 16 + 16
    assert result.end["personal"] > 0.3
    assert result.end["residual"] == 0.0


def test_a_summary_has_mean_and_spread(tmp_path: Path) -> None:
    results = run.run(
        variants(train={"rounds": 1, "epochs": 1, "budgets": [2]}),
        run.Options(seeds=2, workers=1, out=tmp_path),
        Nobody(),
    )
    (variant,) = summarise(results)["variants"].values()
    ends = [result.end["personal"] for result in results]
    assert variant["personal"]["mean"] == pytest.approx(sum(ends) / 2)
    assert variant["personal"]["sd"] == pytest.approx(abs(ends[0] - ends[1]) / 2**0.5)
    assert variant["seeds"] == [0, 1]


# Workers


class Fragile(Worker):
    """A worker process that is killed before some of its jobs."""

    deaths = 0

    def ask(self, setting: list[bytes], job: Job) -> Outcome:
        if job.number == 1 and Fragile.deaths > 0:
            Fragile.deaths -= 1
            os.kill(self.pid, signal.SIGKILL)
        return super().ask(setting, job)


def test_worker_processes_come_to_the_bytes_of_one_though_one_of_them_is_killed(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedeq_edge.simulation.workers.Worker", Fragile)
    Fragile.deaths = 1
    assert told(play(tmp_path, workers=2)) == told(whole)
    assert Fragile.deaths == 0


def test_a_job_that_kills_two_workers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedeq_edge.simulation.workers.Worker", Fragile)
    Fragile.deaths = 2
    with pytest.raises(StateError, match=r"died twice in job 1 \(train, client device-\d, round 0"):
        play(tmp_path, workers=2)


def test_an_outcome_tells_why_a_training_diverged() -> None:
    made = prepare(Setup(experiment=variants(train={"learning_rate": 1e30, "rounds": 1})[0].experiment, seed=0))
    worker = Here()
    worker.begin(made)
    worker.hold(b"z", made.consensus)
    job = Job(number=0, kind="train", device="device-0", round=0, base=b"z", nu=0 * made.consensus)
    (outcome,) = worker.run([job])
    assert outcome.result is None
    assert "lower learning_rate" in outcome.failed

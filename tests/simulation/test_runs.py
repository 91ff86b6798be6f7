"""Whole runs with real training: workers, resuming, results."""

import json
import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedeq_edge.errors import ConfigError, StateError
from fedeq_edge.simulation import run
from fedeq_edge.simulation.collect import collect
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


def test_results_of_boards_whose_budget_differs_by_seed_have_a_summary(whole: Path) -> None:
    result = read(whole)
    other = replace(result, lines=[*result.lines[:-1], {**result.end, "at": {"3": result.end["at"]["3"]}}])
    (variant,) = summarise([result, other])["variants"].values()
    assert set(variant["at"]) == {"3"}


def test_a_model_that_nobody_shares_has_no_consensus_in_the_summary(tmp_path: Path) -> None:
    result = read(play(tmp_path, method={"preset": "local"}, train={"rounds": 1, "epochs": 1, "budgets": [2]}))
    (variant,) = summarise([result])["variants"].values()
    assert variant["consensus"]["mean"] is None
    assert variant["personal"]["mean"] == result.end["personal"]


def test_another_seed_or_a_setting_that_is_new_since_leaves_a_finished_run_as_it_is(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *rest = whole.read_text().splitlines()
    header = json.loads(first)
    del header["experiment"]["data"]["flat"], header["plan"]["unrolled"]
    older = "\n".join([json.dumps(header), *rest, ""])
    (tmp_path / whole.name).write_text(older)
    with monkeypatch.context() as patched:
        patched.setattr(run, "play", None)
        assert (play(tmp_path)).read_text() == older
    results = run.run(variants(seeds=[0, 1]), run.Options(workers=1, out=tmp_path), Nobody())
    assert [result.header["seed"] for result in results] == [0, 1]
    assert results[0].path.read_text() == older
    found = collect(variants(seeds=[0, 1]), run.Options(out=tmp_path))
    assert ([result.header["seed"] for result in found.results], found.missing) == ([0, 1], [])


def test_a_file_of_another_run_is_refused_before_the_first_run(whole: Path, tmp_path: Path) -> None:
    names = [{"name": "first"}, {"name": "second"}]
    (tmp_path / "second-seed0.jsonl").write_bytes(whole.read_bytes())
    with pytest.raises(ConfigError, match=r"second-seed0\.jsonl is of another run"):
        run.run(variants(variants=names), run.Options(workers=1, out=tmp_path), Nobody())
    assert not (tmp_path / "first-seed0.jsonl").exists()


def test_runs_that_were_resolved_into_other_settings_do_not_stand_in_one_mean(whole: Path, tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        first, *rest = whole.read_text().splitlines()
        header = json.loads(first)
        header["plan"]["momentum"] = 0.0 if seed == 1 else header["plan"]["momentum"]
        path = tmp_path / f"base-seed{seed}.jsonl"
        path.write_text("\n".join([json.dumps({**header, "seed": seed}), *rest, ""]))
        os.utime(path, (seed, seed))
    found = collect(variants(), run.Options(seeds=3, out=tmp_path))
    assert [result.header["seed"] for result in found.results] == [0, 2]
    assert [(one.seed, one.reason) for one in found.missing] == [(1, "its settings are not those of the newest run")]


@pytest.mark.parametrize(
    ("changes", "alone"),
    [
        ({"schedule": {"fraction": 0.7}}, 8),  # two of three
        ({"schedule": {"fraction": 0.01}}, 4),  # one, at the least
        ({"schedule": {"mode": "async", "buffer": 2}}, 8),
        ({"train": {"rounds": 12, "alone_rounds": 5}}, 5),
    ],
)
def test_a_model_alone_trains_as_often_as_a_client_is_asked(changes: dict[str, Any], alone: int) -> None:
    changed = {"train": {"rounds": 12, "budgets": [2]}, **changes}
    made = prepare(Setup(experiment=variants(**changed)[0].experiment, seed=0))
    assert {made.plan.alone_rounds, *(board.plan.alone_rounds for board in made.boards.values())} == {alone}


def test_vectors_are_normalised_as_the_channels_that_they_were(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = (np.array([0.0, 1000.0])[None, :, None] + rng.normal(size=(40, 2, 3))).astype(np.float32)
    np.savez(tmp_path / "two.npz", x=x, y=np.arange(40) % 2, client=np.arange(40) // 20)
    chosen = parse({"name": "t", "data": {"file": str(tmp_path / "two.npz"), "flat": True}}, "t")[0].experiment
    spec = prepare(Setup(experiment=chosen, seed=0)).spec
    assert spec.shift == pytest.approx((0.0, 0.0, 0.0, 1000.0, 1000.0, 1000.0), abs=1.0)
    assert spec.scale == pytest.approx((1.0,) * 6, abs=0.3)


def test_what_a_plan_differentiates_beyond_one_evaluation_takes_its_time() -> None:
    plain, unrolled, penalised = (
        prepare(Setup(experiment=variants(train={"budgets": [2], **more})[0].experiment, seed=0)).reference
        for more in ({}, {"unrolled": 3}, {"jacobian_penalty": 0.1})
    )
    assert unrolled.fixed_s == pytest.approx(plain.fixed_s + 4.0 * plain.evaluation_s)
    assert (unrolled.adjoint_s, penalised.adjoint_s) == (0.0, plain.adjoint_s)
    assert penalised.fixed_s > plain.fixed_s + 3.0 * plain.evaluation_s


@pytest.mark.parametrize(
    "wrong", [{"train": {"rounds": 2, "learning_rate": 1e30, "budgets": [2]}}, {"model": {"classes": 5}}]
)
def test_a_fleet_that_cannot_train_ends_and_says_why(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"no client can do its work; the last, device-\d: \S"):
        play(tmp_path, **wrong)


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

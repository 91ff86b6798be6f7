"""All runs of an experiment: every variant tuned and then run with every seed, skipping what has been done before."""

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from fedeq_edge import __version__
from fedeq_edge.simulation.engine import Simulation
from fedeq_edge.simulation.experiment import DataTable, Experiment, Variant
from fedeq_edge.simulation.journal import Journal
from fedeq_edge.simulation.measures import mean, means
from fedeq_edge.simulation.models import check_installed
from fedeq_edge.simulation.results import Line, Result, ResultFile, finished, identity, read
from fedeq_edge.simulation.scenario import Fleet, Scenario, Setup, data_digest, load_data, prepare
from fedeq_edge.simulation.workers import Here, Processes, Workers
from fedeq_edge.storage.files import locked, writing

Engine = Literal["local", "ray"]
_LIBRARIES = ("numpy", "torch", "onnxruntime")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user chooses. workers: how many, None for one per core. seeds: 0 to so many, None as in the file."""

    engine: Engine = "local"
    workers: int | None = None
    seeds: int | None = None
    out: Path | None = None


class View(Protocol):
    """Somebody who watches."""

    def begins(self, name: str, number: int, runs: int, rounds: int) -> None:
        """Run `number` of `runs`, of so many rounds."""
        ...

    def line(self, line: Mapping[str, Any]) -> None:
        """A line of its result."""
        ...


@dataclass(slots=True)
class _Data:
    """Fleets by where they come from: an experiment usually has one."""

    loaded: dict[DataTable, tuple[Fleet, str]] = field(default_factory=dict)

    def scenario(self, setup: Setup) -> tuple[Scenario, str]:
        """A run's parts, and the digest of its data."""
        table = setup.experiment.data
        column = table.unseen if isinstance(table.unseen, str) else 0
        key = msgspec.structs.replace(table, unseen=column, validation=0.5, flat=False)
        if key not in self.loaded:
            loaded = load_data(table)
            self.loaded[key] = loaded, data_digest(loaded)
        fleet, digest = self.loaded[key]
        return prepare(setup, fleet), digest


@dataclass(frozen=True, slots=True)
class _Run:
    name: str
    setup: Setup
    path: Path


def run(variants: Sequence[Variant], options: Options, view: View) -> list[Result]:
    """The results of all variants and seeds, each in its file under `out_of`.

    Raises FedEqError in one line, before anything runs where the experiment or its data is at fault.
    """
    runs = Runs(variants, options, view)
    out = out_of(variants, options)
    workers = open_workers(options)
    try:
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            return runs.all(workers, out)
    finally:
        workers.close()


def out_of(variants: Sequence[Variant], options: Options) -> Path:
    """The folder of the results."""
    return options.out or Path("fedeq-simulation") / variants[0].experiment.name


def path_of(out: Path, variant: str, seed: int) -> Path:
    """The result of one run in this folder."""
    return out / f"{variant}-seed{seed}.jsonl"


def tuning_path(out: Path, variant: str, number: int) -> Path:
    """The result with the variant's choice of this number."""
    return out / "tune" / f"{variant}-{number}.jsonl"


def seeds_of(experiment: Experiment, options: Options) -> Sequence[int]:
    """The seeds that it runs with: those asked for, else its own."""
    return experiment.seeds if options.seeds is None else range(options.seeds)


def open_workers(options: Options) -> Workers:
    """The workers asked for. Raises ConfigError where ray is, and is not installed."""
    count = options.workers or _cores()
    if options.engine == "ray":
        from fedeq_edge.simulation.ray_workers import RayWorkers  # noqa: PLC0415  # an extra

        return RayWorkers(count)
    return Here() if count == 1 else Processes(count)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


class Runs:
    """The runs of an experiment, all of them checked when made."""

    def __init__(self, variants: Sequence[Variant], options: Options, view: View) -> None:
        self._variants, self._options, self._view = variants, options, view
        self._data = _Data()
        self._number = 0
        self._count = 0
        for variant in variants:
            self._count += len(variant.choices) + len(seeds_of(variant.experiment, options))
            check_installed(variant.experiment.model, variant.experiment.backend)
            self._data.scenario(Setup(experiment=variant.experiment, seed=0))
            for _, experiment in variant.choices:
                self._data.scenario(_choosing(variant, experiment))

    def all(self, workers: Workers, out: Path) -> list[Result]:
        """The results, variant by variant and seed by seed."""
        self._check_files(out)
        found = []
        for variant in self._variants:
            chosen, tuned = self._tuned(variant, workers, out)
            for seed in seeds_of(chosen, self._options):
                path = path_of(out, chosen.variant, seed)
                found.append(self._one(_Run(path.stem, Setup(experiment=chosen, seed=seed), path), workers, tuned))
        return found

    def _check_files(self, out: Path) -> None:
        """Files of other runs are refused now, not after hours; with [tune] what a run will be is not known yet."""
        for variant in self._variants:
            if variant.choices:
                continue
            for seed in seeds_of(variant.experiment, self._options):
                path = path_of(out, variant.experiment.variant, seed)
                if path.exists():
                    scenario, digest = self._data.scenario(Setup(experiment=variant.experiment, seed=seed))
                    finished(path, _header(scenario, digest, None))

    def _tuned(self, variant: Variant, workers: Workers, out: Path) -> tuple[Experiment, Line | None]:
        """The experiment with the choice that did best on validation parts, and how all of them did."""
        if not variant.choices:
            return variant.experiment, None
        scores: list[tuple[float, str, Experiment]] = []
        tuning_path(out, variant.experiment.variant, 0).parent.mkdir(exist_ok=True)
        for number, (label, experiment) in enumerate(variant.choices):
            path = tuning_path(out, experiment.variant, number)
            wanted = _Run(f"tune {experiment.variant}: {label}", _choosing(variant, experiment), path)
            result = self._one(wanted, workers, None)
            scores.append((result.end["personal"] or 0.0, label, experiment))
        best = max(scores, key=lambda score: score[0])
        tuned = {"chosen": best[1], "seed": variant.tune_seed, "validation": {label: s for s, label, _ in scores}}
        return best[2], tuned

    def _one(self, wanted: _Run, workers: Workers, tuned: Line | None) -> Result:
        scenario, digest = self._data.scenario(wanted.setup)
        header = _header(scenario, digest, tuned)
        self._number += 1
        self._view.begins(wanted.name, self._number, self._count, scenario.federation.rounds)
        if not finished(wanted.path, header):
            play(scenario, workers, wanted.path, header, self._view.line, engine=self._options.engine)
        return read(wanted.path)


def _choosing(variant: Variant, choice: Experiment) -> Setup:
    """The run that tells how good this choice is."""
    return Setup(experiment=variant.trial(choice), seed=variant.tune_seed, tuning=True)


def play(
    scenario: Scenario,
    workers: Workers,
    path: Path,
    header: Line,
    watch: Callable[[Line], None],
    *,
    engine: Engine = "local",
) -> None:
    """The run's file is whole; what an earlier attempt has come to is not computed again."""
    began, cpu = time.monotonic(), time.process_time()
    began_as = b"FDQJ" + hashlib.sha256(identity(header)).digest()
    workers.begin(scenario)
    journal = Journal(workers, path.with_suffix(".journal"), began_as)
    file = ResultFile(path, header)
    try:
        lines = _Lines(file, watch)
        Simulation(scenario, journal, lines.say, path.parent).run()
        seconds = {
            "seconds": time.monotonic() - began,
            "cpu_s": time.process_time() - cpu,
            "workers_cpu_s": workers.cpu_s,
        }
        file.say({"kind": "wall", **seconds, "workers": workers.count, "engine": engine, "replayed": journal.replayed})
        file.say(lines.end())
    except BaseException:
        journal.close()
        raise
    finally:
        file.close()
    journal.remove()


class _Lines:
    """The lines of a run on their way to its file, and what they come to together."""

    def __init__(self, file: ResultFile, watch: Callable[[Line], None]) -> None:
        self._file, self._watch = file, watch
        self._of: dict[str, list[Line]] = {"round": [], "evaluation": [], "client": [], "unseen": []}

    def say(self, line: Line) -> None:
        self._file.say(line)
        self._watch(line)
        self._of[line["kind"]].append(line)

    def end(self) -> Line:
        rounds, clients, unseen = self._of["round"], self._of["client"], self._of["unseen"]
        return {
            "kind": "end",
            "rounds": len(rounds),
            "virtual_s": rounds[-1]["virtual_s"] if rounds else 0.0,
            "bytes_up": sum(line["bytes_up"] for line in clients),
            "bytes_down": sum(line["bytes_down"] for line in clients),
            **means(clients),
            "unseen": mean([line["personal"] for line in unseen]),
        }


def _header(scenario: Scenario, digest: str, tuned: Line | None) -> Line:
    setup = scenario.setup
    return {
        "kind": "header",
        "format": 1,
        "version": __version__,
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "experiment": msgspec.to_builtins(portable(setup.experiment)),
        "seed": setup.seed,
        "tuning": setup.tuning,
        "tuned": tuned,
        "data": digest,
        "clients": len(scenario.fleet),
        "unseen": len(scenario.unseen),
        "model": msgspec.to_builtins(scenario.spec),
        "parameters": {"theta": scenario.start[0].size, "head": scenario.start[1].size},
        "plan": msgspec.to_builtins(scenario.plan),
        "method": msgspec.to_builtins(scenario.method),
        "schedule": msgspec.to_builtins(scenario.schedule),
        "reference_s": msgspec.to_builtins(scenario.reference),
    }


def portable(experiment: Experiment) -> Experiment:
    """The same with the name alone of its data's file: a digest says which file it was, wherever it lay."""
    return msgspec.structs.replace(
        experiment, data=msgspec.structs.replace(experiment.data, file=Path(experiment.data.file).name)
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

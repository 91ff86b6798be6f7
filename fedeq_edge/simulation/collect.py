"""What of an experiment lies on disk, without running any of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from fedeq_edge.errors import StateError
from fedeq_edge.simulation.experiment import Experiment, Variant
from fedeq_edge.simulation.results import Result, completed, read
from fedeq_edge.simulation.run import Options, out_of, path_of, portable, seeds_of, tuning_path

Reason = Literal[
    "not begun", "not finished", "its file is of another experiment", "its settings are not those of the newest run"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A run that the experiment has and the folder has not."""

    variant: str
    seed: int
    reason: Reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """Finished runs, variant by variant and seed by seed. tuning: those that settings were chosen by."""

    results: list[Result]
    tuning: list[Result]
    missing: list[Missing]

    @property
    def wanted(self) -> int:
        """How many runs the experiment has, those of tuning left out."""
        return len(self.results) + len(self.missing)


def collect(variants: Sequence[Variant], options: Options) -> Collected:
    """The finished runs of an experiment in its folder, and which are missing. Data sets are not read."""
    out = out_of(variants, options)
    found = Collected(results=[], tuning=[], missing=[])
    for variant in variants:
        name = variant.experiment.variant
        candidates = [experiment for _, experiment in variant.choices] or [variant.experiment]
        runs: dict[int, Result | Reason] = {
            seed: _found(path_of(out, name, seed), candidates) for seed in seeds_of(variant.experiment, options)
        }
        for seed, result in _alike(runs).items():
            if isinstance(result, Result):
                found.results.append(result)
            else:
                found.missing.append(Missing(variant=name, seed=seed, reason=result))
        trials = [variant.trial(experiment) for _, experiment in variant.choices]
        tuning = (_found(tuning_path(out, name, number), trials) for number in range(len(trials)))
        found.tuning.extend(result for result in tuning if isinstance(result, Result))
    return found


def _alike(runs: Mapping[int, Result | Reason]) -> dict[int, Result | Reason]:
    """Without those that another version of the package has resolved into other settings than the newest run's."""
    whole = [result for result in runs.values() if isinstance(result, Result)]
    if not whole:
        return dict(runs)
    newest = _resolved(max(whole, key=lambda result: result.path.stat().st_mtime_ns))
    return {
        seed: "its settings are not those of the newest run"
        if isinstance(result, Result) and _resolved(result) != newest
        else result
        for seed, result in runs.items()
    }


def _resolved(result: Result) -> tuple[object, ...]:
    """What all seeds of a variant have in common: with [tune], whichever choice each of them was given."""
    header = completed(result.header)
    return tuple(header[key] for key in ("model", "plan", "method"))


def _found(path: Path, candidates: Sequence[Experiment]) -> Result | Reason:
    if not path.is_file():
        return "not begun"
    try:
        result = read(path)
    except StateError:
        return "not finished"
    wanted = [_unseeded(portable(one)) for one in candidates]
    return result if _experiment_of(result) in wanted else "its file is of another experiment"


def _unseeded(experiment: Experiment) -> Experiment:
    """Without the seeds of other runs."""
    return msgspec.structs.replace(experiment, seeds=(0,))


def _experiment_of(result: Result) -> Experiment | None:
    """As its header has it; what an older file does not say has its default."""
    try:
        return _unseeded(msgspec.convert(result.header["experiment"], Experiment))
    except (KeyError, msgspec.ValidationError):
        return None

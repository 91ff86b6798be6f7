"""What several runs of an experiment come to: mean and spread over the seeds, by variant."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fedeq_edge.simulation import targets
from fedeq_edge.simulation.results import Result
from fedeq_edge.simulation.spread import spread

ACCURACIES = ("personal", "consensus", "refit", "local", "worst_tenth", "unseen")
AMOUNTS = (
    "bytes_up",
    "bytes_down",
    "virtual_s",
    "rounds",
    "rounds_to_target",
    "bytes_to_target",
    "rounds_to_own",
    "bytes_to_own",
)


def summarise(results: Sequence[Result]) -> dict[str, Any]:
    """For `--json` and the table: by variant, each number as mean, sd (sample's, None for one seed) and count."""
    variants: dict[str, list[Result]] = {}
    for result in results:
        variants.setdefault(result.header["experiment"]["variant"], []).append(result)
    return {
        "experiment": results[0].header["experiment"]["name"],
        "variants": {name: _variant(found) for name, found in variants.items()},
    }


def _variant(found: Sequence[Result]) -> dict[str, Any]:
    # the K of a slow board may be another one with every seed
    budgets = [K for K in found[0].end["at"] if all(K in result.end["at"] for result in found)]
    numbers = [{**result.end, **targets.costs(result)} for result in found]
    if not found[0].header["method"]["exchange"]:  # z is as it began
        numbers = [{**told, "consensus": None} for told in numbers]
    return {
        "method": found[0].header["method"]["name"],
        "parameters": found[0].header["parameters"],
        "tuned": found[0].header["tuned"],
        "seeds": [result.header["seed"] for result in found],
        "files": [str(result.path) for result in found],
        **{key: _spread([told[key] for told in numbers]) for key in (*ACCURACIES, *AMOUNTS)},
        "at": {
            K: {name: _spread([result.end["at"][K][name] for result in found]) for name in found[0].end["at"][K]}
            for K in budgets
        },
    }


def _spread(values: Sequence[float | None]) -> dict[str, float | int | None]:
    """Of the runs that have this number."""
    return asdict(spread(values))

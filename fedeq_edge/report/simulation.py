"""The page of a simulation: one HTML file that needs nothing else, out of the result files of its finished runs.

As in page.py, Python computes positions and counts and the template holds words and looks. The same results and the
same command make the same bytes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedeq_edge import __version__
from fedeq_edge.report import simulation_charts as charts
from fedeq_edge.report.page import template
from fedeq_edge.report.variants import WORST, Variant, variants
from fedeq_edge.simulation.collect import Collected
from fedeq_edge.simulation.results import Result
from fedeq_edge.simulation.targets import OWN_SHARE

TEMPLATE = "simulation.html.jinja"
_TITLES: Final[dict[charts.Key, str]] = {
    "personal": "Personal models",
    "consensus": "Consensus as it stands",
    "unseen": "Personal models of unseen clients",
}
_COURSES: Final[tuple[charts.Key, ...]] = ("personal", "consensus")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the runs come from. command: the line that makes the page again; text: of the experiment's file."""

    command: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What runs took on the machine they ran on. cpu_s: None where a run's file does not tell its workers' part."""

    runs: int
    seconds: float
    cpu_s: float | None
    replayed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What all runs have in common, or every value where they have not."""

    versions: list[str]
    libraries: list[str]
    seeds: list[int]
    data: list[str]
    digests: list[str]
    clients: list[int]
    unseen: list[int]
    rounds: list[int]
    every: list[int]
    backends: list[str]
    engines: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """Names by how they stand to the best variant; the best itself first where it is one of them."""

    best: Variant | None
    tied: list[str]
    behind: list[str]
    unknown: list[str]


def page(found: Collected, source: Source) -> str:
    """The page as one HTML document that loads nothing from anywhere; all text is escaped.

    found: at least one finished run. Raises ConfigError without jinja2.
    """
    told = variants(found.results)
    return template(TEMPLATE).render(
        name=found.results[0].header["experiment"]["name"],
        version=__version__,
        source=source,
        found=found,
        variants=told,
        style=charts.styles(told),
        singled_out=charts.SINGLED_OUT,
        verdicts=_verdicts(told),
        fairest=max((v for v in told if v.worst.mean is not None), key=lambda v: v.worst.mean or 0.0, default=None),
        origin=_origin(found.results),
        effort=_effort(found.results),
        tuning_effort=_effort(found.tuning),
        tried=_tried(told),
        dots=_dots(told),
        personal_by_rounds=charts.by_rounds(told, "personal"),
        consensus_by_rounds=charts.by_rounds(told, "consensus"),
        personal_by_bytes=charts.by_bytes(told, "personal"),
        consensus_by_bytes=charts.by_bytes(told, "consensus"),
        grids={key: charts.grid_by_rounds(told, key) for key in _COURSES},
        by_budget=charts.by_budget(told),
        budget_grid=charts.grid_by_budget(told),
        residual_by_budget=charts.residual_by_budget(told),
        by_client=charts.by_client(told),
        worst=WORST,
        own_share=OWN_SHARE,
        given_targets=_given_targets(found.results),
    )


def _verdicts(told: Sequence[Variant]) -> Verdicts:
    def named(verdict: str) -> list[str]:
        return [v.name for v in told if v.standing is not None and v.standing.verdict == verdict]

    best = next((v for v in told if v.standing is not None and v.standing.verdict == "best"), None)
    return Verdicts(best=best, tied=named("tied"), behind=named("behind"), unknown=named("unknown"))


def _dots(told: Sequence[Variant]) -> list[charts.Dots]:
    found = [charts.dots(title, told, key) for key, title in _TITLES.items()]
    return [dots for dots in found if dots is not None]


def _tried(told: Sequence[Variant]) -> list[str]:
    """Every value that [tune] tried, in the order of the file."""
    return list(dict.fromkeys(label for v in told if v.tuned is not None for label in v.tuned.scores))


def _given_targets(results: Sequence[Result]) -> list[float]:
    asked = (result.header["experiment"]["evaluation"]["target"] for result in results)
    return sorted({target for target in asked if target is not None})


def _effort(results: Sequence[Result]) -> Effort:
    walls = [line for result in results for line in result.of_kind("wall")]
    taken = [wall["cpu_s"] + wall["workers_cpu_s"] for wall in walls if wall.get("workers_cpu_s") is not None]
    return Effort(
        runs=len(results),
        seconds=math.fsum(wall["seconds"] for wall in walls),
        cpu_s=math.fsum(taken) if len(taken) == len(walls) else None,
        replayed=any(wall["replayed"] for wall in walls),
    )


def _origin(results: Sequence[Result]) -> Origin:
    headers = [result.header for result in results]
    experiments = [header["experiment"] for header in headers]
    walls = [wall for result in results for wall in result.of_kind("wall")]
    return Origin(
        versions=_values(header["version"] for header in headers),
        libraries=_values(_libraries(header["libraries"]) for header in headers),
        seeds=sorted({header["seed"] for header in headers}),
        data=_values(experiment["data"]["file"] for experiment in experiments),
        digests=_values(header["data"] for header in headers),
        clients=_values(header["clients"] for header in headers),
        unseen=_values(header["unseen"] for header in headers),
        rounds=_values(header["plan"]["rounds"] for header in headers),
        every=_values(experiment["evaluation"]["every"] for experiment in experiments),
        backends=_values(experiment["backend"] for experiment in experiments),
        engines=_values(wall["engine"] for wall in walls),
    )


def _libraries(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)


def _values(told: Iterable[Any]) -> list[Any]:
    """Each value once, in order of appearance."""
    return list(dict.fromkeys(told))

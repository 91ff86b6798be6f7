"""What the page of a simulation says of each variant: every number over its seeds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import quantiles
from typing import Any

from fedeq_edge.simulation import targets
from fedeq_edge.simulation.course import Point, course
from fedeq_edge.simulation.measures import mean
from fedeq_edge.simulation.results import Result
from fedeq_edge.simulation.spread import Spread, Standing, spread, standings

WORST = 5
"""So many clients count as the worst ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """How [tune] chose: accuracy on validation parts by what was tried, and which of them was taken."""

    chosen: str
    seed: int
    scores: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One variant over its finished runs. Accuracies are shares, means over a run's clients; amounts are bytes.

    local: each client's own model after one more round, or trained alone throughout. worst: of the WORST worst clients;
    clients: standard deviation between clients. up, down: a client and round in which it took part. rounds_to,
    bytes_to: to `target`. trained, answered: fewest and most K. clients_of: mean over seeds, by client.
    """

    name: str
    method: str
    exchange: bool
    results: tuple[Result, ...]
    courses: tuple[list[Point], ...]
    standing: Standing | None
    tuned: Tuned | None
    parameters: tuple[int, int]
    personal: Spread
    consensus: Spread
    local: Spread
    worst: Spread
    clients: Spread
    unseen: Spread
    up: Spread
    down: Spread
    total: Spread
    target: Spread
    rounds_to: Spread
    bytes_to: Spread
    trained: tuple[int, int] | None
    answered: tuple[int, int]
    residual: Spread
    virtual_s: Spread
    clients_of: dict[str, float]

    @property
    def seeds(self) -> list[int]:
        """Of its finished runs."""
        return [result.header["seed"] for result in self.results]

    @property
    def quartiles(self) -> list[float]:
        """Lowest, lower quartile, median, upper quartile and highest of its clients."""
        found = sorted(self.clients_of.values())
        inner = quantiles(found, n=4, method="inclusive") if len(found) > 1 else 3 * found
        return [*found[:1], *inner, *found[-1:]]

    @property
    def worst_clients(self) -> list[tuple[str, float]]:
        """The worst three and their accuracy, the worst first."""
        return sorted(self.clients_of.items(), key=lambda item: (item[1], item[0]))[:3]


def variants(results: Iterable[Result]) -> list[Variant]:
    """Every variant of these results, the best mean personal accuracy first."""
    by_name = {name: tuple(found) for name, found in groupby(results, key=_name)}
    scores = {name: [result.end["personal"] for result in found] for name, found in by_name.items()}
    known = {name: [score for score in told if score is not None] for name, told in scores.items()}
    standing = standings({name: told for name, told in known.items() if told})
    found = [_variant(name, runs, standing.get(name)) for name, runs in by_name.items()]
    return sorted(found, key=lambda variant: -(variant.personal.mean or 0.0))


def _name(result: Result) -> str:
    return str(result.header["experiment"]["variant"])


def _variant(name: str, results: tuple[Result, ...], standing: Standing | None) -> Variant:
    header = results[0].header
    courses = tuple(map(course, results))
    exchange = bool(header["method"]["exchange"])
    reached = [_reached(result) for result in results if exchange]  # who sends nothing is there in round 0
    return Variant(
        name=name,
        method=header["method"]["name"],
        exchange=exchange,
        results=results,
        courses=courses,
        standing=standing,
        tuned=_tuned(header["tuned"]),
        parameters=(header["parameters"]["theta"], header["parameters"]["head"]),
        personal=_of_ends(results, "personal"),
        # a method without exchange never moves the consensus: its accuracy is that of the first draw
        consensus=_of_ends(results, "consensus") if exchange else spread([]),
        local=_of_ends(results, "local"),
        worst=spread([_worst(result) for result in results]),
        clients=spread([_between_clients(result) for result in results]),
        unseen=_of_ends(results, "unseen"),
        up=spread([_each_round(result, "bytes_up") for result in results]),
        down=spread([_each_round(result, "bytes_down") for result in results]),
        total=spread([result.end["bytes_up"] + result.end["bytes_down"] for result in results]),
        target=spread([target for target, _, _ in reached]),
        rounds_to=spread([rounds for _, rounds, _ in reached]),
        bytes_to=spread([sent for _, _, sent in reached]),
        trained=_range(k for line in _lines(results, "round") for k in line["forward"]),
        answered=_range(line["own"] for line in _lines(results, "client")) or (0, 0),
        residual=_of_ends(results, "residual"),
        virtual_s=_of_ends(results, "virtual_s"),
        clients_of=_clients(results),
    )


def _reached(result: Result) -> tuple[float | None, int | None, int | None]:
    """(target, rounds, bytes): of the experiment's target, else of a share of the run's own final accuracy."""
    costs, target, final = (
        targets.costs(result),
        result.header["experiment"]["evaluation"]["target"],
        result.end["personal"],
    )
    if target is not None:
        return target, costs["rounds_to_target"], costs["bytes_to_target"]
    return None if final is None else targets.OWN_SHARE * final, costs["rounds_to_own"], costs["bytes_to_own"]


def _tuned(told: dict[str, Any] | None) -> Tuned | None:
    return None if told is None else Tuned(chosen=told["chosen"], seed=told["seed"], scores=told["validation"])


def _of_ends(results: Sequence[Result], key: str) -> Spread:
    return spread([result.end[key] for result in results])


def _lines(results: Sequence[Result], kind: str) -> list[dict[str, Any]]:
    return [line for result in results for line in result.of_kind(kind)]


def _accuracies(result: Result) -> list[float]:
    """Of its clients' personal models, the worst first."""
    return sorted(line["personal"] for line in result.of_kind("client") if line["personal"] is not None)


def _worst(result: Result) -> float | None:
    """None where the worst are most of all clients."""
    found = _accuracies(result)
    return mean(found[:WORST]) if len(found) > 2 * WORST else None


def _between_clients(result: Result) -> float | None:
    return spread(_accuracies(result)).sd


def _each_round(result: Result, key: str) -> float | None:
    """Bytes of all clients from joining to the end, by the rounds in which they took part."""
    clients = result.of_kind("client")
    rounds = sum(line["rounds"] for line in clients)
    return sum(line[key] for line in clients) / rounds if rounds else None


def _range(values: Iterable[int]) -> tuple[int, int] | None:
    found = list(values)
    return (min(found), max(found)) if found else None


def _clients(results: Sequence[Result]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for line in _lines(results, "client"):
        if line["personal"] is not None:
            found.setdefault(line["client"], []).append(line["personal"])
    return {name: sum(told) / len(told) for name, told in found.items()}


def common_rounds(variant: Variant) -> list[int]:
    """Rounds after which every run of the variant was measured."""
    rounds = [{point.round for point in points} for points in variant.courses]
    return sorted(set.intersection(*rounds))


def at_round(variant: Variant, number: int, key: str) -> Spread:
    """A number of `Point` after that round, over the seeds."""
    return spread([getattr(point, key) for points in variant.courses for point in points if point.round == number])

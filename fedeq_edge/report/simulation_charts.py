"""What the page of a simulation draws. Lines are means over seeds, bands and bars one standard deviation about them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedeq_edge.report.axes import (
    Axis,
    Chart,
    Line,
    Tick,
    band_between,
    count_axis,
    doubling_axis,
    line_through,
    linear_axis,
    log_axis,
)
from fedeq_edge.report.numbers import number, percent, percent_mark, significant, size_mark
from fedeq_edge.report.variants import Variant, at_round, common_rounds
from fedeq_edge.simulation.spread import Spread, spread

STYLES = tuple(f"v{place}" for place in range(1, 9))
"""As many as are told apart by colour, dashes and marks."""
SINGLED_OUT = 5
"""Of more variants than there are styles: the best so many have one, the others are grey."""
MOST_CLIENTS = 200  # places on the axis of sorted clients: more than a screen shows, fewer than make a page heavy
MOST_SIZES = 6  # labels such as "500 kB" that fit side by side on a phone

Key = Literal["personal", "consensus", "unseen"]
"""An accuracy: of the personal models, of the consensus as it stands, or the personal one of unseen clients."""
Place = tuple[float, Spread]
"""Where on the axis across, and what is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A variant in a dot plot: mean, from low to high (one standard deviation), and every seed, in percent."""

    variant: Variant
    value: Spread
    at: float
    low: float
    high: float
    seeds: tuple[float, ...]

    @property
    def width(self) -> float:
        """Of the bar."""
        return round(self.high - self.low, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The numbers behind a chart: a row for each place on the axis across, a column for each variant."""

    columns: list[str]
    rows: list[tuple[str, list[Spread]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dots:
    """A dot plot, the best variant first."""

    title: str
    rows: list[Row]
    ticks: list[Tick]


def styles(variants: Sequence[Variant]) -> dict[str, str]:
    """The class of each variant in the style sheet, "rest" for those that no style is left for."""
    told_apart = len(variants) if len(variants) <= len(STYLES) else SINGLED_OUT
    return {v.name: STYLES[place] if place < told_apart else "rest" for place, v in enumerate(variants)}


# Final accuracy


def dots(title: str, variants: Sequence[Variant], key: Key) -> Dots | None:
    """Of this accuracy at the end of the runs: a key of their last line and of Variant. None where nobody has it."""
    found = [(variant, _spread_of(variant, key)) for variant in variants]
    told = [(variant, value) for variant, value in found if value.mean is not None]
    if not told:
        return None
    seeds = {variant.name: [result.end[key] for result in variant.results] for variant, _ in told}
    known = [edge for _, value in told for edge in _edges(value)]
    axis = _accuracy_axis([*known, *(seed for each in seeds.values() for seed in each if seed is not None)])
    rows = [_row(variant, value, seeds[variant.name], axis) for variant, value in told]
    rows.sort(key=lambda row: -row.at)
    return Dots(title=title, rows=rows, ticks=axis.ticks(percent_mark))


def _spread_of(variant: Variant, key: Key) -> Spread:
    found = getattr(variant, key)
    assert isinstance(found, Spread)
    return found


def _row(variant: Variant, value: Spread, seeds: Sequence[float | None], axis: Axis) -> Row:
    low, high = _edges(value)
    return Row(
        variant=variant,
        value=value,
        at=axis.at(value.mean or 0.0),
        low=axis.at(low),
        high=axis.at(high),
        seeds=tuple(axis.at(seed) for seed in seeds if seed is not None),
    )


def _edges(value: Spread) -> tuple[float, float]:
    """One standard deviation about the mean, within what an accuracy can be."""
    mean, sd = value.mean or 0.0, value.sd or 0.0
    return max(0.0, mean - sd), min(1.0, mean + sd)


def _accuracy_axis(known: Sequence[float]) -> Axis:
    return linear_axis(min(known), max(known))


# Accuracy over a run


def by_rounds(variants: Sequence[Variant], key: Key) -> Chart | None:
    """This accuracy by rounds; None where nobody was measured before the end."""
    courses = _courses(variants, key, "round")
    if all(len(places) < 2 for places in courses.values()):
        return None
    rounds = [int(across) for places in courses.values() for across, _ in places]
    x = count_axis(min(rounds), max(rounds))
    return _over_runs(variants, courses, key, x, x.ticks(number))


def by_bytes(variants: Sequence[Variant], key: Key) -> Chart | None:
    """This accuracy by the bytes of all clients until then, logarithmic; None as in `by_rounds`."""
    courses = _courses(variants, key, "bytes")
    if all(len(places) < 2 for places in courses.values()):
        return None
    sent = [across for places in courses.values() for across, _ in places]
    x = log_axis(min(sent), max(sent), MOST_SIZES)
    return _over_runs(variants, courses, key, x, x.ticks(size_mark))


def grid_by_rounds(variants: Sequence[Variant], key: Key) -> Grid:
    """What `by_rounds` draws."""
    return _grid(_courses(variants, key, "round"))


def _grid(courses: Mapping[str, list[Place]]) -> Grid:
    by_place = [dict(places) for places in courses.values()]
    nothing = spread([])
    across = sorted({place for places in by_place for place in places})
    rows = [(number(place), [places.get(place, nothing) for places in by_place]) for place in across]
    return Grid(columns=list(courses), rows=rows)


def _courses(variants: Sequence[Variant], key: Key, across: Literal["round", "bytes"]) -> dict[str, list[Place]]:
    """By variant; those that exchange nothing have no rounds to be drawn by."""
    found = {variant.name: _course(variant, key, across) for variant in variants if variant.exchange}
    return {name: places for name, places in found.items() if places}


def _course(variant: Variant, key: Key, across: Literal["round", "bytes"]) -> list[Place]:
    found = []
    for after in common_rounds(variant):
        where, value = at_round(variant, after, across), at_round(variant, after, key)
        if where.mean and value.mean is not None:
            found.append((where.mean, value))
    return found


def _over_runs(
    variants: Sequence[Variant], courses: Mapping[str, list[Place]], key: Key, x: Axis, ticks: list[Tick]
) -> Chart:
    """Who exchanges nothing is drawn as a level."""
    levels = [(v.name, _spread_of(v, key).mean) for v in variants if not v.exchange]
    told = [(name, mean) for name, mean in levels if mean is not None]
    known = [edge for places in courses.values() for _, value in places for edge in _edges(value)]
    y = _accuracy_axis([*known, *(mean for _, mean in told)])
    style = styles(variants)
    ends = "; ".join(f"{name} {percent(places[-1][1].mean)}" for name, places in courses.items())
    lines = _lines([(name, style[name], places) for name, places in courses.items()], x, y)
    return Chart(
        description=f"{key.capitalize()} accuracy, means over seeds. At the end: {ends}.",
        x=ticks,
        y=y.ticks(percent_mark),
        lines=[*lines, *(_level(name, y.at(mean)) for name, mean in told)],
    )


def _level(name: str, up: float) -> Line:
    return Line(label=f"{name}: nothing exchanged, at the end", style="level", path=f"M0 {100 - up:g}H100")


def _lines(courses: Iterable[tuple[str, str, list[Place]]], x: Axis, y: Axis) -> list[Line]:
    """One of each variant with a style; the others are one grey line with many pieces."""
    found, rest = [], []
    for name, style, places in courses:
        line = line_through(name, style, ((across, value.mean) for across, value in places), x, y)
        if style == "rest":
            rest.append(line.path)
        else:
            found.append(replace(line, band=_band(places, x, y)))
    if rest:
        found.append(Line(label=f"the other {len(rest)}", style="rest", path="".join(rest)))
    return found


def _band(places: Sequence[Place], x: Axis, y: Axis) -> str:
    """None for a single seed, whose spread nobody knows."""
    if any(value.sd is None for _, value in places) or len(places) < 2:
        return ""
    return band_between(((across, *_edges(value)) for across, value in places), x, y)


# Accuracy by K


def by_budget(variants: Sequence[Variant]) -> Chart | None:
    """Accuracy of the consensus with a refitted head by K; None where it was measured at one K alone."""
    courses = _by_budget(variants, "refit")
    if not courses:
        return None
    x = _budget_axis(courses)
    y = _accuracy_axis([edge for _, _, places in courses for _, value in places for edge in _edges(value)])
    ends = "; ".join(
        f"{name} {percent(places[0][1].mean)} to {percent(places[-1][1].mean)}" for name, _, places in courses
    )
    return Chart(
        description=f"Accuracy from the fewest evaluations to the most: {ends}.",
        x=x.ticks(number),
        y=y.ticks(percent_mark),
        lines=_lines(courses, x, y),
    )


def grid_by_budget(variants: Sequence[Variant]) -> Grid:
    """What `by_budget` draws."""
    return _grid({name: places for name, _, places in _by_budget(variants, "refit")})


def residual_by_budget(variants: Sequence[Variant]) -> Chart | None:
    """Residual of the fixed point by K, both logarithmic; None as in `by_budget`, or where there is none to draw."""
    courses = [
        (name, style, [(K, value) for K, value in places if value.mean])
        for name, style, places in _by_budget(variants, "residual")
    ]
    drawn = [course for course in courses if course[2]]
    if not drawn:
        return None
    x, known = _budget_axis(drawn), [value.mean or 0.0 for _, _, places in drawn for _, value in places]
    y = log_axis(min(known), max(known))
    ends = "; ".join(f"{name} {significant(places[-1][1].mean)}" for name, _, places in drawn)
    lines = [replace(line, band="") for line in _lines(drawn, x, y)]  # a spread of tens of times has no place here
    return Chart(
        description=f"Residual at the most evaluations: {ends}.", x=x.ticks(number), y=y.ticks(significant), lines=lines
    )


def _by_budget(variants: Sequence[Variant], key: str) -> list[tuple[str, str, list[Place]]]:
    style, found = styles(variants), []
    for variant in variants:
        ends = [result.end["at"] for result in variant.results]
        budgets = sorted(set.intersection(*(set(map(int, at)) for at in ends)))
        places = [(float(K), spread([at[str(K)][key] for at in ends])) for K in budgets]
        if len(places) > 1 and variant.exchange:
            found.append((variant.name, style[variant.name], [p for p in places if p[1].mean is not None]))
    return [course for course in found if course[2]]


def _budget_axis(courses: Sequence[tuple[str, str, list[Place]]]) -> Axis:
    budgets = [int(K) for _, _, places in courses for K, _ in places]
    return doubling_axis(min(budgets), max(budgets))


# Clients


def by_client(variants: Sequence[Variant]) -> Chart | None:
    """Personal accuracy of every client, the worst of each variant first; None of fewer than two clients."""
    style = styles(variants)
    sorted_ = [
        (v.name, style[v.name], _thinned(sorted(v.clients_of.values()))) for v in variants if len(v.clients_of) > 1
    ]
    if not sorted_:
        return None
    x = linear_axis(0.0, 1.0)
    y = _accuracy_axis([value.mean or 0.0 for _, _, places in sorted_ for _, value in places])
    worst = "; ".join(f"{name} {percent(places[0][1].mean)}" for name, _, places in sorted_)
    return Chart(
        description=f"Personal accuracy of each client, sorted. Worst client: {worst}.",
        x=x.ticks(percent_mark),
        y=y.ticks(percent_mark),
        lines=[replace(line, markers=(), band="") for line in _lines(sorted_, x, y)],
    )


def _thinned(values: Sequence[float]) -> list[Place]:
    """First and last of the sorted values, and as many between as are seen."""
    last = len(values) - 1
    places = sorted({round(place * last / (MOST_CLIENTS - 1)) for place in range(MOST_CLIENTS)})
    return [(place / last, spread([values[place]])) for place in places]

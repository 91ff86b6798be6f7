"""Axes and the lines between them: positions in percent of the plot, from the left and from the bottom."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fedeq_edge.report.numbers import TIE, percent_mark

AXIS_TICKS = 7  # as many labels as fit side by side on a phone
LOG_TICKS = 10  # as many as fit above each other
# On an axis that narrow labels at every power of two begin to touch beyond so many.
MOST_DOUBLINGS = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """One label of an axis."""

    at: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """From values to positions; a low above the high turns it round. log: for values > 0. values: those with a tick."""

    low: float
    high: float
    values: tuple[float, ...]
    log: bool = False

    def at(self, value: float) -> float:
        """Position of a value in percent; the middle of an axis that has one value only."""
        low, high, here = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return 50.0 if high == low else round(100 * (here - low) / (high - low), 2)

    def ticks(self, label: Callable[[float], str]) -> list[Tick]:
        """A tick for each round value of the axis."""
        return [Tick(at=self.at(value), label=label(value)) for value in self.values]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of a chart. style: its class in the style sheet; path: SVG in the 100 x 100 of the plot, y downwards.

    band: path of an area about it, or "".
    """

    label: str
    style: str
    path: str
    markers: tuple[tuple[float, float], ...] = ()
    band: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A line chart. description: what a reader who cannot see it must know."""

    description: str
    x: list[Tick]
    y: list[Tick]
    lines: list[Line]


def linear_axis(low: float, high: float) -> Axis:
    """The shortest axis between multiples of a round step that holds both; half a point wide at least."""
    step = round_step(max(high - low, 0.005), AXIS_TICKS - 1)
    first, last = math.floor(low / step + TIE), math.ceil(high / step - TIE)
    last = max(last, first + 1)
    return Axis(low=first * step, high=last * step, values=tuple(i * step for i in range(first, last + 1)))


def round_step(span: float, at_most: int) -> float:
    """The least of 1, 2, 5 times a power of ten that divides `span` into `at_most` parts or fewer."""
    if span <= 0:
        return 1.0
    scale: float = 10.0 ** math.floor(math.log10(span / at_most))
    return next(factor * scale for factor in (1, 2, 5, 10) if factor * scale * at_most >= span * (1 - TIE))


def count_axis(low: int, high: int) -> Axis:
    """For whole numbers, such as rounds: from the first to the last, a tick at each multiple of a round step."""
    step = max(1, int(round_step(high - low, AXIS_TICKS)))
    return Axis(low=low, high=high, values=tuple(range(low + -low % step, high + 1, step)))


def doubling_axis(low: int, high: int) -> Axis:
    """Logarithmic, for whole numbers from 1, with a label at each doubling."""
    doublings = [float(2**power) for power in range(high.bit_length()) if low <= 2**power <= high]
    values = doublings[:: 1 + len(doublings) // MOST_DOUBLINGS] if len(doublings) > 1 else sorted({low, high})
    return Axis(low=low, high=high, values=tuple(values), log=True)


def log_axis(low: float, high: float, most: int = LOG_TICKS) -> Axis:
    """Between two of 1, 2, 5 times a power of ten; a tick at each of them, or at decades where those exceed `most`."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
    first = max(mark for mark in marks if mark <= low * (1 + TIE))
    last = min(mark for mark in marks if mark >= high * (1 - TIE) and mark > first)
    inside = [mark for mark in marks if first <= mark <= last]
    if len(inside) > most:
        inside = [10.0**decade for decade in decades if first <= 10.0**decade <= last]
    return Axis(low=first, high=last, values=tuple(inside), log=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorAxis:
    """Accuracies by the logarithm of their errors, so that 95 and 99 % stand as far apart as 75 and 95 %.

    On an even axis a federation that starts near chance and ends near 100 % looks like a step, and what it gains over
    training alone vanishes in the upper edge. No errors at all would be infinitely far up: `least` stands for it.
    """

    axis: Axis
    least: float

    @classmethod
    def of(cls, accuracies: Sequence[float]) -> "ErrorAxis":
        """An axis that holds all of them, the best at the top."""
        errors = [1 - value for value in accuracies if value < 1 - TIE] or [0.01]
        inner = log_axis(min(*errors, 0.5), max(errors))  # with 50 % where all do worse: never an error beyond 1
        flawless = max(accuracies) >= 1 - TIE
        best, values = (inner.low / 2, (inner.low / 2, *inner.values)) if flawless else (inner.low, inner.values)
        return cls(axis=Axis(low=inner.high, high=best, values=values, log=True), least=best if flawless else 0.0)

    def error(self, accuracy: float) -> float:
        """Where an accuracy stands on `axis`."""
        return max(1 - accuracy, self.least)

    def label(self, error: float) -> str:
        """The accuracy with that error."""
        return percent_mark(1.0 if error <= self.least else 1 - error)


def line_through(label: str, style: str, values: Iterable[tuple[float, float | None]], x: Axis, y: Axis) -> Line:
    """A line through the values; one that is unknown, or 0 on a logarithmic axis, interrupts it."""
    parts: list[str] = []
    markers: list[tuple[float, float]] = []
    pen = "M"
    for across, up in values:
        if up is None or (y.log and up <= 0):
            pen = "M"
            continue
        markers.append((x.at(across), y.at(up)))
        parts.append(f"{pen}{x.at(across):g} {100 - y.at(up):g}")
        pen = "L"
    return Line(label=label, style=style, path="".join(parts), markers=tuple(markers))


def band_between(ranges: Iterable[tuple[float, float, float]], x: Axis, y: Axis) -> str:
    """SVG path of the area between the two values (low, high) at each place (across, low, high), "" for none."""
    known = list(ranges)
    upper = [f"{x.at(across):g} {100 - y.at(high):g}" for across, _, high in known]
    lower = [f"{x.at(across):g} {100 - y.at(low):g}" for across, low, _ in reversed(known)]
    return f"M{'L'.join(upper + lower)}Z" if known else ""

"""The curve of a trained model, drawn: accuracy, residual and proof, and time against the number of evaluations K.

As a page (HTML with the numbers in a table) or as a drawing (SVG). Both are one file that needs nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

from fedeq_edge import __version__
from fedeq_edge.report.axes import Axis, Chart, Line, doubling_axis, line_through, linear_axis, log_axis
from fedeq_edge.report.numbers import number, percent, percent_mark, significant
from fedeq_edge.report.page import template
from fedeq_edge.training.curve import BATCH, Curve, Point

# A flat curve should look flat: one answer more or less is often a tenth of a point or two.
ACCURACY_MARGIN = 0.02
# Far below the rounding of any state: it would only stretch an axis.
SMALLEST_DRAWN = 1e-30
ENGINE_STYLES = {"torch": "first", "numpy": "second", "onnx": "third", "torch.compile": "fourth"}
NORMS = {"max": "largest component", "rms": "root mean square"}
UNITS = {"state": "", "injection": " times that of the injection u"}

Reading = Callable[[Point], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One chart with its title. unit: what its upward axis shows. own: where the model's own K stands, in percent."""

    title: str
    unit: str
    chart: Chart
    own: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Whose curve it is. name: of the model file; samples: what was asked; own: the K that the model was chosen for."""

    name: str
    samples: str
    own: int


def page(curve: Curve, subject: Subject) -> str:
    """The curve as one HTML document that loads nothing. Raises ConfigError without jinja2."""
    return _render("curve.html.jinja", curve, subject)


def drawing(curve: Curve, subject: Subject) -> str:
    """The curve as one SVG document that loads nothing. Raises ConfigError without jinja2."""
    return _render("curve.svg.jinja", curve, subject)


def _render(name: str, curve: Curve, subject: Subject) -> str:
    return template(name).render(
        curve=curve,
        subject=subject,
        panels=panels(curve, subject.own),
        engines=list(curve.points[0].timings),
        batch=BATCH,
        bound=_bound_in_words(curve),
        version=__version__,
    )


def panels(curve: Curve, own: int) -> list[Panel]:
    """The charts that the curve's numbers allow: accuracy needs labels, residuals need one that is not 0."""
    x = doubling_axis(curve.points[0].evaluations, curve.points[-1].evaluations)
    marked = x.at(own) if x.low <= own <= x.high else None
    distance = "relative" if curve.points[0].certificate is None else "relative; bound: absolute"
    found = (
        ("Accuracy", "right answers", _accuracy(curve.points, x)),
        ("Distance from the fixed point", distance, _distances(curve.points, x)),
        ("Time", "µs per sample", _times(curve.points, x)),
    )
    return [Panel(title=title, unit=unit, chart=chart, own=marked) for title, unit, chart in found if chart is not None]


def _bound_in_words(curve: Curve) -> str:
    proof = curve.points[-1].certificate
    if proof is None:
        return "There is no proof for this model: its cell is not a certified contraction."
    return (
        f"The bound holds for every input: |z_K − z*| ≤ bound{UNITS[proof.unit]}, measured by the {NORMS[proof.norm]} "
        f"of the state; the cell contracts by γ = {significant(proof.gamma)} an evaluation."
    )


def _accuracy(points: Sequence[Point], x: Axis) -> Chart | None:
    known = [point.accuracy for point in points if point.accuracy is not None]
    if not known:
        return None
    y = linear_axis(max(0.0, min(known) - ACCURACY_MARGIN), min(1.0, max(known) + ACCURACY_MARGIN))
    return Chart(
        description=f"Accuracy from {percent(known[0])} at K = {points[0].evaluations} to {percent(known[-1])} at "
        f"K = {points[-1].evaluations}.",
        x=x.ticks(number),
        y=y.ticks(percent_mark),
        lines=[_line("Accuracy", "first", points, lambda point: point.accuracy, x, y)],
    )


def _distances(points: Sequence[Point], x: Axis) -> Chart | None:
    readings: tuple[tuple[str, str, Reading], ...] = (
        ("Residual, mean over samples", "first", lambda point: point.residual_mean),
        ("Residual, worst sample", "first faint", lambda point: point.residual_max),
        ("Bound on |z_K − z*|, proven", "second", lambda point: point.bound),
        (f"Logits, change to K = {points[-1].evaluations}", "third", lambda point: point.change),
    )
    shown = [(label, style, read) for label, style, read in readings if any(_drawn(read(point)) for point in points)]
    known = [value for _, _, read in shown for point in points if (value := _drawn(read(point)))]
    if not known:
        return None
    y = log_axis(min(known), max(known))
    return Chart(
        description="; ".join(f"{label}: {significant(_drawn(read(points[-1])))}" for label, _, read in shown)
        + f" at K = {points[-1].evaluations}.",
        x=x.ticks(number),
        y=y.ticks(significant),
        lines=[_line(label, style, points, read, x, y) for label, style, read in shown],
    )


def _times(points: Sequence[Point], x: Axis) -> Chart:
    readings = [reading for name in points[0].timings for reading in _engine_readings(name)]
    known = [value for _, _, read in readings for point in points if (value := read(point))]
    y = log_axis(min(known), max(known))
    return Chart(
        description="; ".join(f"{label}: {significant(read(points[-1]))} µs" for label, _, read in readings)
        + f" at K = {points[-1].evaluations}.",
        x=x.ticks(number),
        y=y.ticks(significant),
        lines=[_line(label, style, points, read, x, y) for label, style, read in readings],
    )


def _engine_readings(name: str) -> list[tuple[str, str, Reading]]:
    style = ENGINE_STYLES[name]
    return [
        (f"{name}, asked one by one", style, lambda point: point.timings[name].alone_us),
        (f"{name}, {BATCH} at a time", f"{style} faint", lambda point: point.timings[name].batch_us),
    ]


def _drawn(value: float | None) -> float | None:
    """What a logarithmic axis can show of it."""
    return value if value is not None and isfinite(value) and value > SMALLEST_DRAWN else None


def _line(label: str, style: str, points: Sequence[Point], read: Reading, x: Axis, y: Axis) -> Line:
    values = ((float(point.evaluations), _drawn(read(point)) if y.log else read(point)) for point in points)
    return line_through(label, style, values, x, y)

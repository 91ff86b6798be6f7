"""The demo's report: one HTML file that needs nothing else, out of summary.json and rounds.jsonl.

Theory of operation. A chart is positions in percent. Lines and bands are SVG stretched over the plot; text, markers
and bars are HTML placed by the same percentages. So text keeps its size on a phone, colours follow the reader's light
or dark setting by CSS alone, numbers can be selected and read aloud, and the file stays a few tens of kilobytes. A
plotting library's SVG would fix all four. Python computes positions and counts; the template holds words and looks.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import msgspec

from fedeq_edge.errors import ConfigError
from fedeq_edge.storage import finite
from fedeq_edge.training.step import Heads

if TYPE_CHECKING:
    import jinja2

UNKNOWN = "–"
_SPACE = "\N{NO-BREAK SPACE}"  # between a number and its unit
# Two accuracies closer than this come from the same number of right answers: float noise, far below one sample.
TIE = 1e-9
AXIS_TICKS = 7  # as many labels as fit side by side on a phone
LOG_TICKS = 10  # as many as fit above each other
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


# What is read: summary.json and the round lines of rounds.jsonl. A number that nobody measured is None.


class _Data(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    clients: int
    classes: int
    train_samples: int | None = None
    test_samples: int | None = None
    input_shape: tuple[int, ...] = ()


class _Model(msgspec.Struct, frozen=True, kw_only=True):
    cell: str
    channels: int
    theta_parameters: int
    head_parameters: int


class _Broker(msgspec.Struct, frozen=True, kw_only=True):
    kind: str
    version: str | None = None


class _Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    personal: float | None = None
    consensus: float | None = None
    local_only: float | None = None
    worst_five_personal: float | None = None


class _Traffic(msgspec.Struct, frozen=True, kw_only=True):
    up: float | None = None
    down: float | None = None


class _RoundTraffic(_Traffic, frozen=True, kw_only=True):
    float32_full_model: _Traffic = _Traffic()


class _Aggregator(msgspec.Struct, frozen=True, kw_only=True):
    rss_peak_bytes: float | None = None
    cpu_s: float | None = None


class _Budget(msgspec.Struct, frozen=True, kw_only=True):
    forward: int | None = None
    adjoint: int | None = None


class _Onnx(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    max_abs_diff: float | None = None
    iterations: float | None = None
    latency_ms: float | None = None
    accuracy: float | None = None


class _Device(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    profile: str
    emulated: bool
    samples: int | None = None
    budget: _Budget = _Budget()
    residual_mean: float | None = None
    seconds_per_round: float | None = None
    rss_idle_bytes: float | None = None
    rss_peak_bytes: float | None = None
    accuracy: _Accuracy = _Accuracy()
    onnx: _Onnx | None = None


class _Summary(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    command: str
    data: _Data
    model: _Model
    method: str
    codec: str
    heads: Heads
    rounds: int
    broker: _Broker
    accuracy: _Accuracy
    bytes_per_client_round: _RoundTraffic
    devices: tuple[_Device, ...]
    wall_s: float | None = None
    seconds: dict[str, float | None] = {}
    errors_saved: float | None = None
    aggregator: _Aggregator = _Aggregator()


class _DeviceRound(msgspec.Struct, frozen=True, kw_only=True):
    accuracy: float | None = None
    reduced: bool = False


class _Round(msgspec.Struct, frozen=True, kw_only=True):
    round: int
    cohort: int
    contributed: tuple[str, ...]
    late: tuple[str, ...] = ()
    declined: dict[str, str] = {}
    extensions: int = 0
    seconds: float | None = None
    primal_residual: float | None = None
    dual_residual: float | None = None
    devices: dict[str, _DeviceRound] = {}

    @property
    def accuracies(self) -> list[float]:
        """Accuracy of the consensus on the test part of each device that measured it."""
        return [device.accuracy for device in self.devices.values() if device.accuracy is not None]


# What is drawn: positions in percent of the plot, from the left and from the bottom.


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
    """A line of a chart. style: its class in the style sheet; path: SVG in the 100 x 100 of the plot, y downwards."""

    label: str
    style: str
    path: str
    markers: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A line chart over rounds. description: what a reader who cannot see it must know. band: SVG path or ""."""

    description: str
    x: list[Tick]
    y: list[Tick]
    lines: list[Line]
    band: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A number with its length relative to the longest bar beside it, in percent."""

    value: float | None
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """One device's work: K, k and seconds a round; rounds in which it lowered its budget while training."""

    device: _Device
    forward: Bar
    adjoint: Bar
    seconds: Bar
    lowered: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """One device's accuracy after the federation against training alone; `left` and `width` join the two positions."""

    device: _Device
    difference: float
    verdict: str
    alone_at: float
    personal_at: float

    @property
    def left(self) -> float:
        """Where the line between the two begins."""
        return min(self.alone_at, self.personal_at)

    @property
    def width(self) -> float:
        """How long it is."""
        return round(abs(self.alone_at - self.personal_at), 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gains:
    """All devices with both accuracies, the largest gain first; `unknown` devices lack one."""

    rows: list[Gain]
    ticks: list[Tick]
    unknown: int

    def number(self, verdict: str) -> int:
        """How many devices gained, tied or lost."""
        return sum(row.verdict == verdict for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Participation:
    """Contributions over the whole run. asked: sum of the cohorts; late: after their round; declined: with reasons."""

    asked: int
    came: int
    late: int
    declined: list[tuple[int, str, str]]
    extensions: int
    median_s: float | None


def render(summary: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> str:
    """The report as one HTML document that loads nothing from anywhere.

    summary: as in summary.json; history: the lines of rounds.jsonl (others than "round" are passed over). Unknown
    numbers may be None or NaN. All text is escaped. Raises ConfigError without jinja2, msgspec.ValidationError naming
    the field where the input is not the demo's.
    """
    facts = msgspec.convert(finite(summary), _Summary)
    rounds = [msgspec.convert(finite(line), _Round) for line in history if line.get("kind") == "round"]
    return _template().render(
        run=facts,
        rounds=rounds,
        emulated=sum(device.emulated for device in facts.devices),
        accuracy_chart=_accuracy_chart(facts, rounds),
        residual_chart=_residual_chart(rounds),
        participation=_participation(rounds),
        efforts=_efforts(facts.devices, rounds),
        traffic=_traffic(facts.bytes_per_client_round),
        gains=_gains(facts.devices),
    )


def _template() -> "jinja2.Template":
    try:
        import jinja2  # noqa: PLC0415 - of the demo extra; an agent or a gateway has no use for it
    except ImportError:
        raise ConfigError("the report is made with jinja2; run: pip install 'fedeq-edge[demo]'") from None
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedeq_edge"),
        autoescape=True,  # device names and reasons come from other machines
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=percent,
        points=points,
        number=number,
        significant=significant,
        size=size,
        duration=duration,
        plural=plural,
    )
    return environment.get_template("report.html.jinja")


# Axes


def _round_axis(rounds: Sequence[_Round]) -> Axis:
    low, high = rounds[0].round, rounds[-1].round
    step = max(1, int(_round_step(high - low, AXIS_TICKS)))
    return Axis(low=low, high=high, values=tuple(range(low + -low % step, high + 1, step)))


def _linear_axis(low: float, high: float) -> Axis:
    """The shortest axis between multiples of a round step that holds both; half a point wide at least."""
    step = _round_step(max(high - low, 0.005), AXIS_TICKS - 1)
    first, last = math.floor(low / step + TIE), math.ceil(high / step - TIE)
    last = max(last, first + 1)
    return Axis(low=first * step, high=last * step, values=tuple(i * step for i in range(first, last + 1)))


def _round_step(span: float, at_most: int) -> float:
    """The least of 1, 2, 5 times a power of ten that divides `span` into `at_most` parts or fewer."""
    if span <= 0:
        return 1.0
    scale: float = 10.0 ** math.floor(math.log10(span / at_most))
    return next(factor * scale for factor in (1, 2, 5, 10) if factor * scale * at_most >= span * (1 - TIE))


def _log_axis(low: float, high: float) -> Axis:
    """Between two of 1, 2, 5 times a power of ten; a tick at each of them, or at decades where those are too many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
    first = max(mark for mark in marks if mark <= low * (1 + TIE))
    last = min(mark for mark in marks if mark >= high * (1 - TIE) and mark > first)
    inside = [mark for mark in marks if first <= mark <= last]
    if len(inside) > LOG_TICKS:
        inside = [10.0**decade for decade in decades if first <= 10.0**decade <= last]
    return Axis(low=first, high=last, values=tuple(inside), log=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ErrorAxis:
    """Accuracies by the logarithm of their errors, so that 95 and 99 % stand as far apart as 75 and 95 %.

    On an even axis a federation that starts near chance and ends near 100 % looks like a step, and what it gains over
    training alone vanishes in the upper edge. No errors at all would be infinitely far up: `least` stands for it.
    """

    axis: Axis
    least: float

    @classmethod
    def of(cls, accuracies: Sequence[float]) -> "_ErrorAxis":
        """An axis that holds all of them, the best at the top."""
        errors = [1 - value for value in accuracies if value < 1 - TIE] or [0.01]
        inner = _log_axis(min(*errors, 0.5), max(errors))  # with 50 % where all do worse: never an error beyond 1
        flawless = max(accuracies) >= 1 - TIE
        best, values = (inner.low / 2, (inner.low / 2, *inner.values)) if flawless else (inner.low, inner.values)
        return cls(axis=Axis(low=inner.high, high=best, values=values, log=True), least=best if flawless else 0.0)

    def error(self, accuracy: float) -> float:
        """Where an accuracy stands on `axis`."""
        return max(1 - accuracy, self.least)

    def label(self, error: float) -> str:
        """The accuracy with that error."""
        return percent_mark(1.0 if error <= self.least else 1 - error)


# Charts over rounds


def _accuracy_chart(run: _Summary, rounds: Sequence[_Round]) -> Chart | None:
    """Mean and range of the consensus's accuracy, with the two final means to compare it with."""
    measured = [line for line in rounds if line.accuracies]
    if not measured:
        return None
    finals = (("personal", run.accuracy.personal), ("alone", run.accuracy.local_only))
    references = [(style, value) for style, value in finals if value is not None]
    known = [value for line in measured for value in line.accuracies] + [value for _, value in references]
    x, y = _round_axis(rounds), _ErrorAxis.of(known)
    means = [(line.round, y.error(fmean(line.accuracies))) for line in measured]
    ranges = [(line.round, y.error(min(line.accuracies)), y.error(max(line.accuracies))) for line in measured]
    return Chart(
        description=_accuracy_in_words(measured),
        x=x.ticks(number),
        y=y.axis.ticks(y.label),
        lines=[
            _line("Consensus, mean over devices", "mean", means, x, y.axis),
            *(_level(style, value, y) for style, value in references),
        ],
        band=_band(ranges, x, y.axis),
    )


def _accuracy_in_words(measured: Sequence[_Round]) -> str:
    first, last = measured[0], measured[-1]
    return (
        f"Accuracy of the consensus by round: mean over devices {percent(fmean(first.accuracies))} in round "
        f"{first.round}, {percent(fmean(last.accuracies))} in round {last.round}, there between "
        f"{percent(min(last.accuracies))} and {percent(max(last.accuracies))}."
    )


def _level(style: str, accuracy: float, y: _ErrorAxis) -> Line:
    names = {"personal": "Personal models, after the last round", "alone": "Each device alone"}
    up = y.axis.at(y.error(accuracy))
    return Line(label=f"{names[style]}: {percent(accuracy)}", style=style, path=f"M0 {100 - up:g}H100")


def _residual_chart(rounds: Sequence[_Round]) -> Chart | None:
    """Primal and dual residual of the consensus, logarithmic."""
    primal = [(float(line.round), line.primal_residual) for line in rounds]
    dual = [(float(line.round), line.dual_residual) for line in rounds]
    known = [value for _, value in primal + dual if value]
    if not known:
        return None
    x, y = _round_axis(rounds), _log_axis(min(known), max(known))
    return Chart(
        description=f"Consensus residuals by round, logarithmic: {_course('primal', primal)}; {_course('dual', dual)}.",
        x=x.ticks(number),
        y=y.ticks(significant),
        lines=[_line("Primal residual", "primal", primal, x, y), _line("Dual residual", "dual", dual, x, y)],
    )


def _course(name: str, values: Sequence[tuple[float, float | None]]) -> str:
    known = [value for _, value in values if value]
    return f"{name} from {significant(known[0])} to {significant(known[-1])}" if known else f"{name} unknown"


def _line(label: str, style: str, values: Iterable[tuple[float, float | None]], x: Axis, y: Axis) -> Line:
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


def _band(ranges: Sequence[tuple[int, float, float]], x: Axis, y: Axis) -> str:
    upper = [f"{x.at(across):g} {100 - y.at(high):g}" for across, _, high in ranges]
    lower = [f"{x.at(across):g} {100 - y.at(low):g}" for across, low, _ in reversed(ranges)]
    return f"M{'L'.join(upper + lower)}Z"


# Devices, bytes, rounds


def _efforts(devices: Sequence[_Device], rounds: Sequence[_Round]) -> list[Effort]:
    """The largest budget first: what the fleet's boards differ in."""
    ordered = sorted(devices, key=lambda device: (-(device.budget.forward or 0), -(device.budget.adjoint or 0)))
    forward = _bars([device.budget.forward for device in ordered])
    adjoint = _bars([device.budget.adjoint for device in ordered])
    seconds = _bars([device.seconds_per_round for device in ordered])
    return [
        Effort(device=device, forward=k, adjoint=terms, seconds=time, lowered=_lowered(device.id, rounds))
        for device, k, terms, time in zip(ordered, forward, adjoint, seconds, strict=True)
    ]


def _lowered(device: str, rounds: Sequence[_Round]) -> int:
    return sum(device in line.devices and line.devices[device].reduced for line in rounds)


def _traffic(traffic: _RoundTraffic) -> dict[str, Bar]:
    """Bytes per device and round on one scale: ours and the whole model's as float32, both ways."""
    whole = traffic.float32_full_model
    values = {"up": traffic.up, "down": traffic.down, "whole_up": whole.up, "whole_down": whole.down}
    return dict(zip(values, _bars(list(values.values())), strict=True))


def _bars(values: Sequence[float | None]) -> list[Bar]:
    longest = max((value for value in values if value is not None), default=0.0)
    return [Bar(value=v, share=round(100 * v / longest, 2) if v and longest else 0.0) for v in values]


def _gains(devices: Sequence[_Device]) -> Gains:
    pairs = [
        (device, device.accuracy.local_only, device.accuracy.personal)
        for device in devices
        if device.accuracy.local_only is not None and device.accuracy.personal is not None
    ]
    if not pairs:
        return Gains(rows=[], ticks=[], unknown=len(devices))
    known = [value for _, *both in pairs for value in both]
    axis = _linear_axis(min(known), max(known))
    rows = [_gain(device, alone, personal, axis) for device, alone, personal in pairs]
    rows.sort(key=lambda row: -row.difference)
    return Gains(rows=rows, ticks=axis.ticks(percent_mark), unknown=len(devices) - len(rows))


def _gain(device: _Device, alone: float, personal: float, axis: Axis) -> Gain:
    difference = personal - alone
    verdict = "tied" if abs(difference) <= TIE else "gained" if difference > 0 else "lost"
    return Gain(
        device=device,
        difference=difference,
        verdict=verdict,
        alone_at=axis.at(alone),
        personal_at=axis.at(personal),
    )


def _participation(rounds: Sequence[_Round]) -> Participation:
    times = [line.seconds for line in rounds if line.seconds is not None]
    return Participation(
        asked=sum(line.cohort for line in rounds),
        came=sum(len(line.contributed) for line in rounds),
        late=sum(len(line.late) for line in rounds),
        declined=[(line.round, device, reason) for line in rounds for device, reason in line.declined.items()],
        extensions=sum(line.extensions for line in rounds),
        median_s=median(times) if times else None,
    )


# Numbers as text


def _if_known(text: Callable[[float], str]) -> Callable[[float | None], str]:
    """The same, with a dash for a number that nobody knows."""

    @wraps(text)
    def written(value: float | None) -> str:
        return UNKNOWN if value is None else text(value).replace("-", "−")

    return written


@_if_known
def percent(share: float) -> str:
    """A share with one decimal: 0.9754 -> "97.5 %"."""
    return f"{100 * share:.1f}{_SPACE}%"


@_if_known
def percent_mark(share: float) -> str:
    """A share on an axis: 0.9 -> "90 %"."""
    return f"{round(100 * share, 4):g}{_SPACE}%"


@_if_known
def points(difference: float) -> str:
    """A difference of two shares in percentage points with its sign: 0.0241 -> "+2.4"; no sign for a tie."""
    return "0.0" if abs(difference) <= TIE else f"{100 * difference:+.1f}"


@_if_known
def number(value: float) -> str:
    """A count: 21500 -> "21,500"."""
    return f"{value:,.0f}"


@_if_known
def significant(value: float) -> str:
    """Two digits that count: 0.0123 -> "0.012", 3.2e-06 -> "3.2 × 10⁻⁶"."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{float(f'{value:.2g}'):,g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    power = f"10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return power if mantissa == "1.0" else f"{mantissa.removesuffix('.0')}{_SPACE}×{_SPACE}{power}"


@_if_known
def size(count: float) -> str:
    """Bytes in decimal units with three digits that count: 45210000 -> "45.2 MB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{_three_digits(count / scale)}{_SPACE}{unit}"
    return f"{count:.0f}{_SPACE}B"


@_if_known
def duration(seconds: float) -> str:
    """Seconds with three digits that count, milliseconds below 0.1 s, minutes from 10 min on."""
    if seconds >= 600:
        return f"{seconds / 60:,.0f}{_SPACE}min"
    return (
        f"{_three_digits(seconds)}{_SPACE}s"
        if seconds >= 0.1 or seconds == 0
        else f"{_three_digits(1000 * seconds)}{_SPACE}ms"
    )


def _three_digits(value: float) -> str:
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def plural(count: int, noun: str) -> str:
    """1 -> "1 device", 6 -> "6 devices"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"

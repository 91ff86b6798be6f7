"""What the demo's report draws."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from fedeq_edge.report.axes import (
    Axis,
    Chart,
    ErrorAxis,
    Line,
    Tick,
    band_between,
    count_axis,
    line_through,
    linear_axis,
    log_axis,
)
from fedeq_edge.report.facts import Device, Round, RoundTraffic, Summary
from fedeq_edge.report.numbers import TIE, number, percent, percent_mark, significant


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A number with its length relative to the longest bar beside it, in percent."""

    value: float | None
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """One device's work: K, k and seconds a round; rounds in which it lowered its budget while training."""

    device: Device
    forward: Bar
    adjoint: Bar
    seconds: Bar
    lowered: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """One device's accuracy after the federation against training alone; `left` and `width` join the two positions."""

    device: Device
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


# Charts over rounds


def _round_axis(rounds: Sequence[Round]) -> Axis:
    return count_axis(rounds[0].round, rounds[-1].round)


def accuracy_chart(run: Summary, rounds: Sequence[Round]) -> Chart | None:
    """Mean and range of the consensus's accuracy, with the two final means to compare it with."""
    measured = [line for line in rounds if line.accuracies]
    if not measured:
        return None
    finals = (("personal", run.accuracy.personal), ("alone", run.accuracy.local_only))
    references = [(style, value) for style, value in finals if value is not None]
    known = [value for line in measured for value in line.accuracies] + [value for _, value in references]
    x, y = _round_axis(rounds), ErrorAxis.of(known)
    means = [(line.round, y.error(fmean(line.accuracies))) for line in measured]
    ranges = [(line.round, y.error(min(line.accuracies)), y.error(max(line.accuracies))) for line in measured]
    consensus = line_through("Consensus, mean over devices", "mean", means, x, y.axis)
    return Chart(
        description=_accuracy_in_words(measured),
        x=x.ticks(number),
        y=y.axis.ticks(y.label),
        lines=[
            replace(consensus, band=band_between(ranges, x, y.axis)),
            *(_level(style, value, y) for style, value in references),
        ],
    )


def _accuracy_in_words(measured: Sequence[Round]) -> str:
    first, last = measured[0], measured[-1]
    return (
        f"Accuracy of the consensus by round: mean over devices {percent(fmean(first.accuracies))} in round "
        f"{first.round}, {percent(fmean(last.accuracies))} in round {last.round}, there between "
        f"{percent(min(last.accuracies))} and {percent(max(last.accuracies))}."
    )


def _level(style: str, accuracy: float, y: ErrorAxis) -> Line:
    names = {"personal": "Personal models, after the last round", "alone": "Each device alone"}
    up = y.axis.at(y.error(accuracy))
    return Line(label=f"{names[style]}: {percent(accuracy)}", style=style, path=f"M0 {100 - up:g}H100")


def residual_chart(rounds: Sequence[Round]) -> Chart | None:
    """Primal and dual residual of the consensus, logarithmic."""
    primal = [(float(line.round), line.primal_residual) for line in rounds]
    dual = [(float(line.round), line.dual_residual) for line in rounds]
    known = [value for _, value in primal + dual if value]
    if not known:
        return None
    x, y = _round_axis(rounds), log_axis(min(known), max(known))
    return Chart(
        description=f"Consensus residuals by round, logarithmic: {_course('primal', primal)}; {_course('dual', dual)}.",
        x=x.ticks(number),
        y=y.ticks(significant),
        lines=[
            line_through("Primal residual", "primal", primal, x, y),
            line_through("Dual residual", "dual", dual, x, y),
        ],
    )


def _course(name: str, values: Sequence[tuple[float, float | None]]) -> str:
    known = [value for _, value in values if value]
    return f"{name} from {significant(known[0])} to {significant(known[-1])}" if known else f"{name} unknown"


# Devices, bytes, rounds


def efforts(devices: Sequence[Device], rounds: Sequence[Round]) -> list[Effort]:
    """The largest budget first: what the fleet's boards differ in."""
    ordered = sorted(devices, key=lambda device: (-(device.budget.forward or 0), -(device.budget.adjoint or 0)))
    forward = _bars([device.budget.forward for device in ordered])
    adjoint = _bars([device.budget.adjoint for device in ordered])
    seconds = _bars([device.seconds_per_round for device in ordered])
    return [
        Effort(device=device, forward=k, adjoint=terms, seconds=time, lowered=_lowered(device.id, rounds))
        for device, k, terms, time in zip(ordered, forward, adjoint, seconds, strict=True)
    ]


def _lowered(device: str, rounds: Sequence[Round]) -> int:
    return sum(device in line.devices and line.devices[device].reduced for line in rounds)


def traffic(traffic: RoundTraffic) -> dict[str, Bar]:
    """Bytes per device and round on one scale: ours and the whole model's as float32, both ways."""
    whole = traffic.float32_full_model
    values = {"up": traffic.up, "down": traffic.down, "whole_up": whole.up, "whole_down": whole.down}
    return dict(zip(values, _bars(list(values.values())), strict=True))


def _bars(values: Sequence[float | None]) -> list[Bar]:
    longest = max((value for value in values if value is not None), default=0.0)
    return [Bar(value=v, share=round(100 * v / longest, 2) if v and longest else 0.0) for v in values]


def gains(devices: Sequence[Device]) -> Gains:
    """Who gained against training alone, the largest gain first."""
    pairs = [
        (device, device.accuracy.local_only, device.accuracy.personal)
        for device in devices
        if device.accuracy.local_only is not None and device.accuracy.personal is not None
    ]
    if not pairs:
        return Gains(rows=[], ticks=[], unknown=len(devices))
    known = [value for _, *both in pairs for value in both]
    axis = linear_axis(min(known), max(known))
    rows = [_gain(device, alone, personal, axis) for device, alone, personal in pairs]
    rows.sort(key=lambda row: -row.difference)
    return Gains(rows=rows, ticks=axis.ticks(percent_mark), unknown=len(devices) - len(rows))


def _gain(device: Device, alone: float, personal: float, axis: Axis) -> Gain:
    difference = personal - alone
    verdict = "tied" if abs(difference) <= TIE else "gained" if difference > 0 else "lost"
    return Gain(
        device=device,
        difference=difference,
        verdict=verdict,
        alone_at=axis.at(alone),
        personal_at=axis.at(personal),
    )


def participation(rounds: Sequence[Round]) -> Participation:
    """Who was asked, who came, who declined and why."""
    times = [line.seconds for line in rounds if line.seconds is not None]
    return Participation(
        asked=sum(line.cohort for line in rounds),
        came=sum(len(line.contributed) for line in rounds),
        late=sum(len(line.late) for line in rounds),
        declined=[(line.round, device, reason) for line in rounds for device, reason in line.declined.items()],
        extensions=sum(line.extensions for line in rounds),
        median_s=median(times) if times else None,
    )

"""Numbers as text, for people: units, digits that count, a dash for what nobody knows."""

import math
from collections.abc import Callable
from functools import wraps

UNKNOWN = "–"
_SPACE = "\N{NO-BREAK SPACE}"  # between a number and its unit
# Two accuracies closer than this come from the same number of right answers: float noise, far below one sample.
TIE = 1e-9
_SIZES = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


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
def hundredths(share: float) -> str:
    """A share for a column of percents: 0.9754 -> "97.54"."""
    return f"{100 * share:.2f}"


@_if_known
def tenths(value: float) -> str:
    """A mean of counts: 15.333 -> "15.3", 20.0 -> "20"."""
    return f"{value:,.1f}".removesuffix(".0")


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
    for unit, scale in _SIZES:
        if count >= scale:
            return f"{_three_digits(count / scale)}{_SPACE}{unit}"
    return f"{count:.0f}{_SPACE}B"


@_if_known
def size_mark(count: float) -> str:
    """Bytes on an axis: 2000000 -> "2 MB"."""
    unit, scale = next((unit for unit in _SIZES if count >= unit[1]), ("B", 1.0))
    return f"{count / scale:g}{_SPACE}{unit}"


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

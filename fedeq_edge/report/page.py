"""The demo's report: one HTML file that needs nothing else, out of summary.json and rounds.jsonl.

Theory of operation. A chart is positions in percent. Lines and bands are SVG stretched over the plot; text, markers
and bars are HTML placed by the same percentages. So text keeps its size on a phone, colours follow the reader's light
or dark setting by CSS alone, numbers can be selected and read aloud, and the file stays a few tens of kilobytes. A
plotting library's SVG would fix all four. Python computes positions and counts; the template holds words and looks.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from fedeq_edge.errors import ConfigError
from fedeq_edge.report import charts, numbers
from fedeq_edge.report.facts import Round, Summary
from fedeq_edge.storage import finite

if TYPE_CHECKING:
    import jinja2


def render(summary: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> str:
    """The report as one HTML document that loads nothing from anywhere.

    summary: as in summary.json; history: the lines of rounds.jsonl (others than "round" are passed over). Unknown
    numbers may be None or NaN. All text is escaped. Raises ConfigError without jinja2, msgspec.ValidationError naming
    the field where the input is not the demo's.
    """
    facts = msgspec.convert(finite(summary), Summary)
    rounds = [msgspec.convert(finite(line), Round) for line in history if line.get("kind") == "round"]
    return template("report.html.jinja").render(
        run=facts,
        rounds=rounds,
        emulated=sum(device.emulated for device in facts.devices),
        accuracy_chart=charts.accuracy_chart(facts, rounds),
        residual_chart=charts.residual_chart(rounds),
        participation=charts.participation(rounds),
        efforts=charts.efforts(facts.devices, rounds),
        traffic=charts.traffic(facts.bytes_per_client_round),
        gains=charts.gains(facts.devices),
    )


def template(name: str) -> "jinja2.Template":
    """A template of this package with the filters for numbers. Raises ConfigError without jinja2."""
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
        percent=numbers.percent,
        percent_mark=numbers.percent_mark,
        hundredths=numbers.hundredths,
        tenths=numbers.tenths,
        points=numbers.points,
        number=numbers.number,
        significant=numbers.significant,
        size=numbers.size,
        duration=numbers.duration,
        plural=numbers.plural,
    )
    return environment.get_template(name)

"""How a run went: accuracy by rounds and by bytes, as its result file tells."""

from dataclasses import dataclass

from fedeq_edge.simulation.results import Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What was measured after a round. bytes: of all clients until then, both ways, as on the wire."""

    round: int
    bytes: int
    personal: float | None
    consensus: float | None


def course(result: Result) -> list[Point]:
    """A point for every evaluation, and the end as the last: with all that the delivery of personal models took."""
    points, sent = [], 0
    for line in result.lines:
        if line["kind"] == "round":
            sent += line["bytes_up"] + line["bytes_down"]
        elif line["kind"] == "evaluation":
            points.append(_point(line, line["round"], sent))
    end = result.end
    before = [point for point in points if point.round < end["rounds"]]
    return [*before, _point(end, end["rounds"], end["bytes_up"] + end["bytes_down"])]


def _point(line: dict[str, float | None], number: int, sent: int) -> Point:
    return Point(round=number, bytes=sent, personal=line["personal"], consensus=line["consensus"])

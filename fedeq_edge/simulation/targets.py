"""What a run took to come to an accuracy: rounds, and bytes of all clients in both directions.

Personal accuracy is looked at after the rounds that were evaluated and at the end, so a target that is reached between
two of them counts from the second. Bytes are those from the first message of the run to the end of that round.
"""

from collections.abc import Mapping
from typing import Final

from fedeq_edge.simulation.results import Result

OWN_SHARE: Final = 0.95
"""Part of its own final accuracy that a run is asked for, so that those which end at unlike ones can be compared."""


def costs(result: Result) -> Mapping[str, int | None]:
    """To evaluation.target, and to `OWN_SHARE` of what the run itself came to; None where it was not reached.

    A method without exchange has neither rounds nor bytes.
    """
    names = ("rounds_to_target", "bytes_to_target", "rounds_to_own", "bytes_to_own")
    if not result.header["method"]["exchange"]:
        return dict.fromkeys(names)
    target, final = result.header["experiment"]["evaluation"]["target"], result.end["personal"]
    given, own = _first(result, target), _first(result, None if final is None else OWN_SHARE * final)
    return dict(zip(names, (*given, *own), strict=True))


def _first(result: Result, target: float | None) -> tuple[int | None, int | None]:
    """(round, bytes until its end) with which this accuracy was there, (None, None) where it never was."""
    at_end = {"round": result.end["rounds"], "personal": result.end["personal"]}
    for line in (*result.of_kind("evaluation"), at_end):
        if target is not None and line["personal"] is not None and line["personal"] >= target:
            return line["round"], _bytes(result, line["round"])
    return None, None


def _bytes(result: Result, last: int) -> int:
    rounds = [line for line in result.of_kind("round") if line["round"] <= last]
    return sum(line["bytes_up"] + line["bytes_down"] for line in rounds)

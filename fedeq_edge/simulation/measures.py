"""The numbers of many clients as the lines of a result: by client, and their means."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from fedeq_edge.simulation.evaluation import Evaluation

Line = dict[str, Any]


def measured(found: Evaluation) -> Line:
    """One client's: personal is what its method delivers; consensus, refit, local are those of its own K."""
    point = found.at(found.own)
    return {
        "samples": found.training,
        "own": found.own,
        "personal": found.delivered,
        "consensus": point.consensus,
        "refit": point.refit,
        "local": point.local,
        "residual": point.residual,
        "neighbour_share": found.neighbour_share,
        "trained": msgspec.to_builtins(found.trained),
        "curve": [msgspec.to_builtins(at) for at in found.curve],
    }


def means(lines: Sequence[Mapping[str, Any]]) -> Line:
    """Means over clients' lines, None where nobody has the number; of the worst tenth; and of the curve, by K."""
    personal = sorted(line["personal"] for line in lines)
    points: dict[int, list[Mapping[str, Any]]] = {}
    for line in lines:
        for point in line["curve"]:
            points.setdefault(point["evaluations"], []).append(point)
    common = {K: found for K, found in points.items() if len(found) == len(lines)}  # a K of some is no mean of all
    return {
        "clients": len(lines),
        **{key: mean([line[key] for line in lines]) for key in ("personal", "consensus", "refit", "local", "residual")},
        "worst_tenth": mean(personal[: max(1, len(personal) // 10)]),
        "at": {
            str(K): {key: mean([point[key] for point in common[K]]) for key in ("refit", "consensus", "residual")}
            for K in sorted(common)
        },
    }


def mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there, None of none."""
    told = [value for value in values if value is not None]
    return float(np.mean(told)) if told else None

"""What `fedeq aggregator status` shows of a private federation."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedeq_edge.storage import AggregatorFolder, locked

if TYPE_CHECKING:
    from tests.cli.conftest import Fedeq

STATUS: dict[str, Any] = {
    "run": "r",
    "status": "running",
    "round": 1,
    "rounds": 2,
    "online": [],
    "members": 0,
    "denied": [],
    "refusals": {},
    "counters": {},
    "broker": "connected",
    "pid": 2**22 + 1,
}
NOBODY: dict[str, Any] = {"cohort": 0, "contributed": [], "late": [], "devices": {}, "seconds": 0.5}


def test_it_tells_what_is_spent_and_what_the_whole_federation_will_spend(fedeq: "Fedeq", place: Path) -> None:
    with locked(place / "state") as folder:
        spent = {"epsilon": 1.25, "planned": 4.5, "delta": 1e-5}
        AggregatorFolder(folder).write_status({**STATUS, "privacy": spent})
    assert "epsilon 1.25, planned 4.5 at delta 1e-05" in fedeq("aggregator", "status").err


def test_it_shows_a_round_for_which_nobody_was_drawn(fedeq: "Fedeq", place: Path) -> None:
    with locked(place / "state") as folder:
        line = {"kind": "round", "round": 1, "primal_residual": math.nan, "dual_residual": 0.25, **NOBODY}
        AggregatorFolder(folder).record(line)
        AggregatorFolder(folder).write_status({**STATUS, "privacy": None})
    told = fedeq("aggregator", "status")
    assert told.status == 0, told.err
    assert "0/0" in told.err
    assert "epsilon" not in told.err

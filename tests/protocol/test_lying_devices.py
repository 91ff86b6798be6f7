"""A quarter of the fleet lies, end to end through the machines: what the bounds and the robust methods make of it."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from fedeq_edge.consensus.methods import METHODS, Method
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.training.step import LocalTask
from tests.protocol.fleet import ADMM, Fleet, Quadratics

EIGHT = Quadratics.drawn(8)
LIARS = (2, 5)
MEAN = msgspec.structs.replace(METHODS["fedeq-published"], rho=1.0)


class Lying(Quadratics):
    """Two of eight send their difference the wrong way and ten times as large."""

    def difference(self, device: int, task: LocalTask) -> NDArray[np.float32]:
        honest = super().difference(device, task)
        return honest if device not in LIARS else (-10.0 * honest).astype(np.float32)


def distance(method: Method, problem: Quadratics, folder: Path | None = None, rounds: int = 40) -> float:
    """How far the consensus ends from where an honest fleet with the same method ends."""
    schedule = Schedule(min_devices=8, deadline_s=40.0)
    honest = Fleet(EIGHT, rounds=rounds, method=msgspec.structs.replace(method, robust="none"), schedule=schedule)
    honest.run()
    fleet = Fleet(problem, rounds=rounds, method=method, schedule=schedule, folder=folder)
    fleet.run()
    if method.server == "fresh":
        fleet.check_duals()
    return float(np.abs(fleet.aggregator.consensus.z_hat - honest.aggregator.consensus.z_hat).max())


LIARS_OF_EIGHT = Lying(EIGHT.curvature, EIGHT.centre, EIGHT.samples)


@pytest.mark.parametrize("robust", ["trimmed", "median"])
def test_a_robust_mean_stays_where_the_honest_are(robust: str, tmp_path: Path) -> None:
    bare = distance(MEAN, LIARS_OF_EIGHT)
    guarded = distance(msgspec.structs.replace(MEAN, robust=robust), LIARS_OF_EIGHT, tmp_path)
    assert guarded < 1.0
    assert not bare < 20 * guarded  # not a number, for all we know


def test_clipping_bounds_what_liars_do_to_duals_and_both_sides_hold_the_same() -> None:
    bare = distance(ADMM, LIARS_OF_EIGHT, rounds=12)
    clipped = distance(msgspec.structs.replace(ADMM, robust="clip"), LIARS_OF_EIGHT, rounds=12)
    assert not bare < 5 * clipped


def test_a_norm_bound_refuses_the_liars_by_name() -> None:
    method = msgspec.structs.replace(ADMM, norm_limit=4.0)
    fleet = Fleet(LIARS_OF_EIGHT, rounds=12, method=method, schedule=Schedule(min_devices=8, deadline_s=40.0))
    fleet.run()
    refused = {note.facts["device"] for note in fleet.notes if note.facts.get("code") == "norm_bound"}
    assert {"d2", "d5"} <= refused
    assert fleet.devices["d2"].client.refusals["norm_bound"] >= 1
    assert "d2" in fleet.devices["d2"].client.last_refusal
    fleet.check_duals()

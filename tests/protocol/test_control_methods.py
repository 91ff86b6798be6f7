"""Servers that remember more than H and R: running sums and momentum, in the real protocol."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedeq_edge.consensus.methods import METHODS
from fedeq_edge.errors import ConfigError
from tests.protocol.fleet import Fleet, Quadratics

THREE = Quadratics.drawn(3)
NAMES = ("admm-sums", "fedper-momentum")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("boundary", [20, 33, 47])
def test_a_kill_between_two_actions_leaves_what_the_server_remembers(name: str, boundary: int, tmp_path: Path) -> None:
    undisturbed = Fleet(THREE, rounds=4, method=METHODS[name])
    undisturbed.run()
    killed = Fleet(THREE, rounds=4, method=METHODS[name], folder=tmp_path, kill_after=boundary)
    killed.run()
    assert killed.kills == 1
    assert np.array_equal(killed.aggregator.consensus.z_hat, undisturbed.aggregator.consensus.z_hat)


def test_running_sums_solve_the_problem_as_the_default_does() -> None:
    ends = []
    for name in ("admm", "admm-sums"):
        fleet = Fleet(THREE, rounds=60, method=METHODS[name])
        fleet.run()
        ends.append(fleet.aggregator.consensus.z)
    assert ends[1] == pytest.approx(ends[0], abs=1e-2)


@pytest.mark.parametrize("name", NAMES)
def test_a_history_that_does_not_hold_what_the_server_remembers_is_not_promised(name: str) -> None:
    federation = replace(Fleet(THREE).federation(), method=METHODS[name])
    with pytest.raises(ConfigError, match=f"audit: method {name} has server_momentum or running sums"):
        replace(federation, audit=True)

"""A device that cannot keep a plan's limit in joules says so, and one that can does not."""

import logging
from pathlib import Path

import msgspec
import pytest

from fedeq_edge import settings
from fedeq_edge.agent import Agent
from fedeq_edge.consensus.methods import method
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.protocol.actions import Configure
from fedeq_edge.settings import AgentSettings
from fedeq_edge.training.step import Plan
from fedeq_edge.wire.messages import Manifest


def notices(folder: Path, profile: str, plan: Plan, caplog: pytest.LogCaptureFixture) -> list[str]:
    chosen = AgentSettings(device="a", federation="test", data="data.npz", profile=profile)
    path = folder / "agent.toml"
    path.write_text(settings.to_toml(chosen))
    (folder / "state").mkdir()
    manifest = Manifest(
        run="run",
        status="running",
        model=msgspec.to_builtins(ModelSpec(input_shape=(4,), classes=2)),
        plan=msgspec.to_builtins(plan),
        method=msgspec.to_builtins(method("admm")),
        seed=0,
    )
    agent = Agent(path, chosen, samples=1, slowdown=1.0)
    with caplog.at_level(logging.WARNING, logger="fedeq_edge.agent"):
        agent._carry_out([Configure(manifest=manifest)])
    return [record.message for record in caplog.records if "joules" in record.message]


@pytest.mark.parametrize("profile", ["", "x86-64"])
def test_joules_without_known_watts_are_declared_unkept_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, profile: str
) -> None:
    assert len(notices(tmp_path, profile, Plan(energy_j=5.0), caplog)) == 1


@pytest.mark.parametrize(("profile", "energy_j"), [("raspberry-pi-4", 5.0), ("x86-64", None), ("", None)])
def test_nothing_is_said_where_the_plan_can_be_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, profile: str, energy_j: float | None
) -> None:
    assert notices(tmp_path, profile, Plan(energy_j=energy_j), caplog) == []

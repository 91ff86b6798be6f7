"""Applications on a device ask a real agent while it trains for a real federation."""

import msgspec
import pytest

from fedeq_edge import settings
from fedeq_edge.serving.address import Address
from fedeq_edge.settings import AgentSettings
from tests.conftest import RealMosquitto, until
from tests.serving.asking import Application, answering, gone, keep, personal, samples
from tests.system.conftest import Fleet, MakeFleet

pytestmark = pytest.mark.broker
DEVICE = "a"


@pytest.fixture
def fleet(make_fleet: MakeFleet, shared_mosquitto: RealMosquitto) -> Fleet:
    """One device, whose personal model is of an earlier federation, and which answers at infer.sock."""
    made = make_fleet(shared_mosquitto.url, devices=(DEVICE,), rounds=2)
    config = made.folder / DEVICE / "agent.toml"
    serving = msgspec.structs.replace(settings.load(config, AgentSettings), serve="infer.sock")
    config.write_text(settings.to_toml(serving))
    keep(made.folder / DEVICE / "state", personal())
    return made


@pytest.fixture
def application(fleet: Fleet) -> Application:
    return Application(Address(fleet.folder / DEVICE / "infer.sock", None))


def test_applications_are_answered_while_a_round_trains_and_by_the_new_model_after_it(
    fleet: Fleet, application: Application
) -> None:
    fleet.start_aggregator()
    fleet.start_agents()
    trainer = fleet.trainer(DEVICE)
    trainer.suspend()  # in the middle of its work, which cannot end before the answers below
    for _ in range(3):
        reply = application.infer(samples(2))
        assert (reply.status, reply.body["model"]["run"]) == (200, "r")
    assert fleet.rounds() == []
    trainer.resume()
    fleet.finish()
    until(lambda: bool(application.health().body["model"]["run"] != "r"), "the new model answers")
    assert application.infer(samples(2)).body["model"]["round"] == 2
    assert fleet.dismiss() == {DEVICE: 0}


def test_a_killed_agent_takes_its_answering_process_along(fleet: Fleet, application: Application) -> None:
    fleet.start_agent(DEVICE)
    until(application.address.path.exists if application.address.path else lambda: False, "the agent listens")
    assert application.health().status == 200
    (process,) = answering(fleet.agents[DEVICE].pid)
    fleet.kill_agent(DEVICE)
    until(lambda: gone(process), "the answering process leaves")
    fleet.start_agent(DEVICE)  # over the socket that the killed one has left
    until(lambda: _healthy(application), "the next one answers")


def _healthy(application: Application) -> bool:
    try:
        return application.health().status == 200
    except OSError:
        return False

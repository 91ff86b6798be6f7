"""Agents of this version train, certify and serve a model of which their program has never heard."""

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest

from fedeq_edge import modelfile, settings
from fedeq_edge.deq.wellposed import proven
from fedeq_edge.errors import ConfigError
from fedeq_edge.serving.address import Address
from fedeq_edge.settings import AgentSettings
from tests.conftest import until
from tests.serving.asking import Application, samples
from tests.system import later_gateway
from tests.system.later_gateway import DESCRIPTION, MODEL, states

if TYPE_CHECKING:
    from tests.conftest import RealMosquitto
    from tests.system.conftest import Fleet, MakeFleet

pytestmark = pytest.mark.broker


@pytest.fixture(scope="module")
def past(make_fleet: "MakeFleet", shared_mosquitto: "RealMosquitto") -> "Fleet":
    """A finished federation of two agents and a gateway of a later version; the agents are still there, a serves."""
    fleet = make_fleet(shared_mosquitto.url, devices=("a", "b"), by_graph=("a", "b"), rounds=2)
    config = fleet.folder / "a" / "agent.toml"
    serving = msgspec.structs.replace(settings.load(config, AgentSettings), serve="infer.sock")
    config.write_text(settings.to_toml(serving))
    fleet.start_gateway(Path(later_gateway.__file__))
    fleet.start_agents()
    fleet.finish()
    return fleet


def personal(fleet: "Fleet", device: str) -> modelfile.ModelFile:
    return modelfile.read(fleet.folder / device / "state" / "personal.fedeq")


def test_every_round_has_what_both_devices_trained_and_the_model_learns(past: "Fleet") -> None:
    assert [line["contributed"] for line in past.rounds()] == [["a", "b"]] * 2
    assert min(report["accuracy_personal"] for report in past.reports().values()) > 0.8  # a third is guessing


def test_the_certificate_that_a_device_reports_is_that_of_the_described_layer(past: "Fleet") -> None:
    for device, report in past.reports().items():
        found = personal(past, device)
        rate = proven(found.theta, DESCRIPTION)
        assert rate is not None
        assert report["certificate"] == msgspec.to_builtins(rate.certificate(found.budget.forward))
        assert rate.gamma < 0.9  # near the radius of 0.8: the consensus travels rounded


def test_the_personal_model_keeps_its_name_though_nobody_here_can_build_it(past: "Fleet") -> None:
    found = personal(past, "a")
    assert found.model == MODEL
    with pytest.raises(ConfigError, match=r"this version does not know it: .*update fedeq-edge"):
        _ = found.spec


def test_applications_on_the_device_are_answered_by_the_formula(past: "Fleet") -> None:
    found, x = personal(past, "a"), samples(4)
    application = Application(Address(past.folder / "a" / "infer.sock", None))
    until(lambda: application.health().status == 200, "the personal model answers")
    weight, bias = (slot.view(found.head) for slot in DESCRIPTION.head_layout)

    answers = application.infer(x, "?budget=5").body["answers"]

    expected = states(x, found.theta, 5) @ weight.T + bias
    np.testing.assert_allclose([answer["logits"] for answer in answers], expected, atol=1e-4)
    assert all(answer["certificate"]["evaluations"] == 5 for answer in answers)

"""The settings of a flashed device: what trains there is what its release brings."""

import tomllib

import msgspec
import pytest

from fedeq_edge.provision.agentfile import agent_toml, agrees
from fedeq_edge.provision.fleet import Device, FleetSettings
from fedeq_edge.settings import AgentSettings

SETTINGS = FleetSettings(name="plant", broker="mqtts://g", service="https://g", federation="plant")
DEVICE = Device(profile="raspberry-pi-4", added="2026-01-01")


def written(*, torch: bool) -> bytes:
    return agent_toml(SETTINGS, "pi-01", DEVICE, torch=torch)


@pytest.mark.parametrize(("torch", "backend"), [(False, "onnx"), (True, "torch")])
def test_a_device_trains_by_onnxruntime_unless_its_bundle_brings_torch(torch: bool, backend: str) -> None:
    found = msgspec.convert(tomllib.loads(written(torch=torch).decode()), AgentSettings)
    assert found.backend == backend
    assert found.graphs == ("/opt/fedeq-edge/current/models", "/var/lib/fedeq-edge/models")


def test_settings_that_the_release_can_carry_out_stay_as_they_are() -> None:
    assert agrees(written(torch=False), SETTINGS, "pi-01", torch=False)
    assert agrees(written(torch=False), SETTINGS, "pi-01", torch=True)
    assert agrees(written(torch=True), SETTINGS, "pi-01", torch=True)


def test_settings_that_want_torch_of_a_release_without_it_are_written_anew() -> None:
    older = b"\n".join(line for line in written(torch=True).splitlines() if not line.startswith(b"backend"))
    for found in (written(torch=True), older):
        assert not agrees(found, SETTINGS, "pi-01", torch=False)

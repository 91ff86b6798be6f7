"""agent.toml of a flashed device: what the fleet knows of it, and where things are on a board."""

import hashlib

import msgspec

from fedeq_edge.errors import Exit, ProvisionError
from fedeq_edge.provision.archive import Manifest
from fedeq_edge.provision.fleet import Device, FleetSettings

# The unit hands agent.toml, key and certificates to the agent as credentials, in one folder: names without a path.
_IDENTITY = {"ca": "ca.crt", "certificate": "device.crt", "key": "device.key"}


# Where a release and an update put models: a training graph that lies there is not fetched over the broker.
_GRAPHS = ("/opt/fedeq-edge/current/models", "/var/lib/fedeq-edge/models")


class _Broker(msgspec.Struct, frozen=True):
    url: str = ""


class _Known(msgspec.Struct, frozen=True):
    device: str = ""
    federation: str = ""
    backend: str = "torch"
    broker: _Broker = _Broker()


def agent_toml(fleet: FleetSettings, device: str, known: Device, *, torch: bool) -> bytes:
    """The settings of this device. torch: whether its release brings torch, to train by it."""
    broker = {"url": fleet.broker, **(_IDENTITY if fleet.broker.startswith("mqtts://") else {})}
    settings = {
        "device": device,
        "federation": fleet.federation,
        "profile": known.profile,
        "backend": "torch" if torch else "onnx",
        "graphs": list(_GRAPHS),
        "data": "/var/lib/fedeq-edge/data.npz",
        "state": "/var/lib/fedeq-edge/state",
        "broker": broker,
    }
    return (
        b"# Written by fedeq flash. What you add stays, as long as device, federation and broker are the fleet's.\n"
        + (msgspec.toml.encode(settings))
    )


def is_made_for(manifest: Manifest, fleet: FleetSettings, device: str, known: Device) -> bool:
    """Whether a bundle has no agent.toml, being for any device of its board, or just this device's as it is now."""
    built = manifest.files.get("config/agent.toml")
    wanted = agent_toml(fleet, device, known, torch="torch" in manifest.packages)
    return built is None or built.sha256 == hashlib.sha256(wanted).hexdigest()


def agrees(found: bytes, fleet: FleetSettings, device: str, *, torch: bool) -> bool:
    """Whether a board's agent.toml joins this fleet as this device, and trains by what its release brings.

    Raises ProvisionError where it is another device.
    """
    try:
        said = msgspec.toml.decode(found, type=_Known)
    except msgspec.DecodeError:
        return False
    if said.device != device:
        raise ProvisionError(
            Exit.OTHER_DEVICE,
            f"the board is device {said.device}, not {device}; flash it as --device {said.device}, or remove its "
            "/etc/fedeq-edge to make it another one",
        )
    joins = (said.federation, said.broker.url) == (fleet.federation, fleet.broker)
    return joins and (torch or said.backend != "torch")

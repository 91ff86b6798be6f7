"""The topic tree, at most seven levels, so that it also fits cloud brokers.

    fedeq/v1/<federation>/global/manifest     retained   aggregator -> all
    fedeq/v1/<federation>/global/model        retained   aggregator -> all: the last step of the consensus
    fedeq/v1/<federation>/agg/state           retained   aggregator's birth and last will
    fedeq/v1/<federation>/dev/<id>/state      retained   device's birth and last will
    fedeq/v1/<federation>/dev/<id>/up         device -> aggregator
    fedeq/v1/<federation>/dev/<id>/down       aggregator -> device
    fedeq/v1/<federation>/worker/<name>/up    worker -> root: sums over the devices of federation <name>
    fedeq/v1/<federation>/worker/<name>/down  root -> worker: the consensus

The device a message comes from is read from the topic, which the broker's ACL has checked, never from the payload.
"""

import re
from dataclasses import dataclass
from typing import Literal

from fedeq_edge.errors import ConfigError

# No wildcard, slash or upper case: an id is also a file name, a certificate's CN and an MQTT user name.
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}\Z")


def check_identifier(value: str, what: str) -> str:
    """`value`, if it can stand in a topic. Raises ConfigError naming `what`."""
    if not _IDENTIFIER.match(value):
        raise ConfigError(
            f"{what} {value!r} cannot stand in a topic: use 1 to 63 of a-z 0-9 - _, a letter or digit first"
        )
    return value


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics of one federation."""

    federation: str

    def __post_init__(self) -> None:
        check_identifier(self.federation, "federation name")

    @property
    def root(self) -> str:
        """Common prefix of all topics."""
        return f"fedeq/v1/{self.federation}"

    @property
    def manifest(self) -> str:
        """Retained: what the federation trains and where it stands."""
        return f"{self.root}/global/manifest"

    @property
    def model(self) -> str:
        """Retained: the last step of the consensus, where most of the fleet takes part in every round."""
        return f"{self.root}/global/model"

    @property
    def aggregator(self) -> str:
        """Retained: the aggregator's birth and last will."""
        return f"{self.root}/agg/state"

    def state(self, device: str) -> str:
        """Retained: a device's birth and last will."""
        return f"{self.root}/dev/{device}/state"

    def up(self, device: str) -> str:
        """From a device to the aggregator."""
        return f"{self.root}/dev/{device}/up"

    def down(self, device: str) -> str:
        """From the aggregator to a device."""
        return f"{self.root}/dev/{device}/down"

    def worker_up(self, worker: str) -> str:
        """From a worker to the root."""
        return f"{self.root}/worker/{worker}/up"

    def worker_down(self, worker: str) -> str:
        """From the root to a worker."""
        return f"{self.root}/worker/{worker}/down"

    def worker_of(self, topic: str) -> str | None:
        """The worker that publishes on this topic, None for any other topic."""
        worker = topic.removeprefix(f"{self.root}/worker/").removesuffix("/up")
        return worker if _IDENTIFIER.match(worker) and topic == self.worker_up(worker) else None

    def device_of(self, topic: str) -> tuple[str, Literal["state", "up"]] | None:
        """(device, "state" or "up") of a topic that a device publishes on, None for any other."""
        parts = topic.removeprefix(f"{self.root}/dev/").split("/")
        if not topic.startswith(f"{self.root}/dev/") or len(parts) != 2 or not _IDENTIFIER.match(parts[0]):
            return None
        if parts[1] == "state":
            return parts[0], "state"
        return (parts[0], "up") if parts[1] == "up" else None

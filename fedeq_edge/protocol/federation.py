"""What is fixed for the life of a federation."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from fedeq_edge.consensus.methods import Method
from fedeq_edge.consensus.privacy import Privacy
from fedeq_edge.errors import ConfigError
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.wire.coding import Codec
from fedeq_edge.wire.topics import Topics


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """Settings of one federation. model, plan and seed travel in the manifest as they are.

    up: codecs of contributions in the order of preference; a device gets the first that it speaks. down: codec of the
    consensus' steps, one for all, as all must decode the same numbers; who does not speak it gets whole values.
    privacy: what the released consensus keeps of a single device (consensus/privacy.py), None for no such promise.
    Raises ConfigError where method or schedule cannot keep it.
    audit: whether the history of rounds holds what it takes to compute every consensus again (audit.py).
    root: topics of the federation whose root closes our rounds, None where we do (tree.py).
    """

    topics: Topics
    model: Mapping[str, object]
    plan: Mapping[str, object]
    seed: int
    rounds: int
    method: Method
    schedule: Schedule
    up: tuple[Codec, ...]
    down: Codec
    privacy: Privacy | None = None
    audit: bool = False
    root: Topics | None = None

    def __post_init__(self) -> None:
        if self.privacy is None:
            return
        self.privacy.check(self.method)
        if self.schedule.mode == "async":
            raise ConfigError(
                'privacy: schedule.mode = "async" asks whoever is idle, and a device may count twice in one sum; '
                'set mode = "rounds"'
            )

    @property
    def digest(self) -> bytes:
        """sha256 of what a root and its workers must have in common."""
        shared = (self.model, self.method, self.seed, self.rounds, self.down)
        return hashlib.sha256(msgspec.json.encode(shared, order="deterministic")).digest()

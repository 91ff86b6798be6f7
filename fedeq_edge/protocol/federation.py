"""What is fixed for the life of a federation."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from fedeq_edge.consensus.masked import MEMBERS_LEAST, Masking
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
    masking: the aggregator sees no single contribution, only their sum (protocol/masked.py), None for open rounds.
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
    masking: Masking | None = None
    audit: bool = False
    root: Topics | None = None

    def __post_init__(self) -> None:
        if self.privacy is not None:
            self._check_privacy(self.privacy)
        if self.masking is not None:
            self._check_masking(self.masking)
        if self.audit and self.method.remembers:
            raise ConfigError(
                f"audit: method {self.method.name} has server_momentum or running sums, and the history of a round "
                "does not hold them; leave out audit"
            )

    def _check_privacy(self, privacy: Privacy) -> None:
        privacy.check(self.method)
        if self.schedule.mode == "async":
            raise ConfigError(
                'privacy: schedule.mode = "async" asks whoever is idle, and a device may count twice in one sum; '
                'set mode = "rounds"'
            )

    def _check_masking(self, masking: Masking) -> None:
        masking.check(self.method)
        if self.schedule.mode == "async":
            raise ConfigError('masking: schedule.mode = "async" has no cohort to add up; set mode = "rounds"')
        if self.schedule.min_devices < MEMBERS_LEAST:
            raise ConfigError(
                f"masking: schedule.min_devices is {self.schedule.min_devices}; give at least {MEMBERS_LEAST}, "
                "as the sum of two tells each of them the other's"
            )
        if self.audit or self.root is not None:
            raise ConfigError("masking: audit and root need every contribution by itself; leave them out, or [masking]")
        if self.privacy is not None:
            raise ConfigError(
                "masking: privacy bounds each contribution where it is seen, and nobody sees it here; "
                "choose [privacy] or [masking]"
            )

    @property
    def digest(self) -> bytes:
        """sha256 of what a root and its workers must have in common."""
        shared = (self.model, self.method, self.seed, self.rounds, self.down)
        return hashlib.sha256(msgspec.json.encode(shared, order="deterministic")).digest()

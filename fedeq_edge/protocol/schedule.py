"""When a round opens, whom it asks, and when it closes: pure decisions of the aggregator."""

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import msgspec

from fedeq_edge.errors import ConfigError


class Schedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The rhythm of a federation. Durations are seconds from an event, never times of a wall clock.

    min_devices: the first round waits for as many. fraction: of the devices that are online, asked in a round
    (at least one). quorum: share of a cohort that must have contributed when the deadline passes; with fewer the round
    stays open for another deadline and asks every device that is online. deadline_s: of a round.
    late_rounds: a contribution that answers a task so many rounds old is still taken.
    final_s: how long the aggregator waits after the last round for the
    reports of its members, also of those that are away. samples_limit: a device that claims more
    training samples stays out, as its claim is its weight in the consensus.
    """

    min_devices: int = 1
    fraction: float = 1.0
    quorum: float = 0.5
    deadline_s: float = 60.0
    late_rounds: int = 3
    final_s: float = 120.0
    samples_limit: int = 1_000_000  # sixteen times MNIST: more than a board trains on in a round's minute
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("fraction", "quorum"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(f"schedule.{name} is {getattr(self, name)}; give a share above 0 and up to 1")
        for name in ("deadline_s", "final_s"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigError(f"schedule.{name} is {getattr(self, name)}; give a finite number of seconds above 0")
        for name, least in (("min_devices", 1), ("late_rounds", 0), ("samples_limit", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"schedule.{name} is {getattr(self, name)}; give at least {least}")

    def cohort(self, online: Sequence[str], round_number: int) -> tuple[str, ...]:
        """Whom to ask: a random `fraction` of those online, the same for the same seed, round and fleet."""
        size = max(1, round(self.fraction * len(online)))
        chosen = random.Random(f"{self.seed}/{round_number}").sample(sorted(online), min(size, len(online)))
        return tuple(sorted(chosen))


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far an open round is. late contributions do not count towards the quorum of this cohort."""

    cohort: Collection[str]
    contributed: Collection[str]
    declined: Collection[str]
    deadline_passed: bool

    def closes(self, quorum: float) -> bool:
        """Whether the round is over: everybody has answered, or enough have when the deadline passes."""
        answered = set(self.contributed) & set(self.cohort)
        if not answered:
            return False
        if answered | set(self.declined) >= set(self.cohort):
            return True
        return self.deadline_passed and len(answered) >= math.ceil(quorum * len(self.cohort))

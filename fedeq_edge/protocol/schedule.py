"""When a round opens, whom it asks, and when it closes: pure decisions of the aggregator."""

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from fedeq_edge.errors import ConfigError
from fedeq_edge.wire.messages import Birth


class Schedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The rhythm of a federation. Durations are seconds from an event, never times of a wall clock.

    mode: "rounds" ask a cohort and close when it has answered; "async" keeps every device at work and moves the
    consensus after every `buffer` contributions, whatever version they started from (FedBuff, Nguyen et al., AISTATS
    2022), so that nobody waits for the slowest. There a round is a version of the consensus.
    min_devices: the first round waits for as many. fraction: of the devices that may be asked, asked in a round
    (at least one). quorum: share of a cohort that must have contributed when the deadline passes; with fewer the round
    stays open for another deadline and asks everybody who may be asked. deadline_s: of a round.
    late_rounds: a contribution that answers a task so many rounds old is still taken (the version window).
    profiles, battery_percent, data_age_s: only devices of these board profiles (all if empty), on mains or with at
    least so much charge, and with data at most so old when their agent started (None: any) are asked.
    final_s: how long the aggregator waits after the last round for the reports of its members, also of those that are
    away. samples_limit: a device that claims more training samples stays out, as its claim is its weight.
    """

    mode: Literal["rounds", "async"] = "rounds"
    buffer: int = 1
    min_devices: int = 1
    fraction: float = 1.0
    quorum: float = 0.5
    deadline_s: float = 60.0
    late_rounds: int = 3
    profiles: tuple[str, ...] = ()
    battery_percent: float = 0.0
    data_age_s: float | None = None
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
        for name, least in (("min_devices", 1), ("buffer", 1), ("late_rounds", 0), ("samples_limit", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"schedule.{name} is {getattr(self, name)}; give at least {least}")
        if not 0.0 <= self.battery_percent <= 100.0:
            raise ConfigError(f"schedule.battery_percent is {self.battery_percent}; give 0 to 100")
        if self.data_age_s is not None and not self.data_age_s > 0.0:
            raise ConfigError(f"schedule.data_age_s is {self.data_age_s}; give seconds above 0, or leave it out")
        if self.mode == "async" and self.fraction != 1.0:
            raise ConfigError('schedule.fraction has no meaning with mode = "async", which asks whoever is idle')

    @property
    def selects(self) -> bool:
        """Whether anything but chance decides who is asked."""
        return bool(self.profiles) or self.battery_percent > 0.0 or self.data_age_s is not None

    def may_be_asked(self, birth: Birth, battery: float | None) -> bool:
        """Whether this device takes part as it is now. battery: percent as last heard, None on mains or unknown."""
        if self.profiles and birth.profile not in self.profiles:
            return False
        if battery is not None and battery < self.battery_percent:
            return False
        # a device that cannot say how old its data is does not pass a limit on its age
        return self.data_age_s is None or (birth.data_age_s is not None and birth.data_age_s <= self.data_age_s)

    def cohort(self, devices: Sequence[str], round_number: int, least: int = 1) -> tuple[str, ...]:
        """Whom to ask: a random `fraction` of the devices, the same for the same seed, round and fleet.

        least: how many at least, if there are so many.
        """
        size = self._size(len(devices), least)
        chosen = random.Random(f"{self.seed}/{round_number}").sample(sorted(devices), size)
        return tuple(sorted(chosen))

    def share(self, devices: int) -> float:
        """Part of so many devices that a round asks, or whose contributions it waits for in mode "async"."""
        return (min(self.buffer, devices) if self.mode == "async" else self._size(devices, 1)) / devices

    def _size(self, devices: int, least: int) -> int:
        return min(max(least, round(self.fraction * devices)), devices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far an open round is. contributed: to this round; late: to earlier ones, since the last close."""

    cohort: Collection[str]
    contributed: Collection[str]
    late: Collection[str]
    declined: Collection[str]
    deadline_passed: bool

    def closes(self, schedule: Schedule) -> bool:
        """Whether the round is over: everybody has answered, or enough have when the deadline passes.

        Late contributions do not count towards the quorum of a cohort; in "async" mode every contribution counts.
        """
        if schedule.mode == "async":
            arrived = len(self.contributed) + len(self.late)
            return arrived >= schedule.buffer or (self.deadline_passed and arrived > 0)
        if not self.deadline_passed and len(self.contributed) + len(self.declined) < len(self.cohort):
            return False  # asked after every message, so without a set of a thousand devices
        answered = set(self.contributed) & set(self.cohort)
        if not answered:
            return False
        if answered | set(self.declined) >= set(self.cohort):
            return True
        return self.deadline_passed and len(answered) >= math.ceil(schedule.quorum * len(self.cohort))

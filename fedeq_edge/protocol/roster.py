"""Who is here, and who may be asked."""

from dataclasses import dataclass, field

from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.wire.messages import Birth, Metrics


@dataclass(slots=True)
class Roster:
    """The devices that are online, with what they said last of themselves. denied: shared with the state on disk."""

    schedule: Schedule
    denied: set[str]
    _births: dict[str, Birth] = field(default_factory=dict)
    _battery: dict[str, float | None] = field(default_factory=dict)

    def __contains__(self, device: str) -> bool:
        return device in self._births

    def __len__(self) -> int:
        return len(self._births)

    @property
    def online(self) -> list[str]:
        """All that are here, in alphabetical order."""
        return sorted(self._births)

    def birth(self, device: str) -> Birth | None:
        """What an online device said when it started."""
        return self._births.get(device)

    def welcome(self, device: str, birth: Birth) -> bool:
        """This device is here; whether its program has started anew (or we hear of it for the first time)."""
        known = self._births.get(device)
        self._births[device] = birth
        self._battery[device] = birth.battery
        return known is None or known.boot != birth.boot

    def heard(self, device: str, metrics: Metrics) -> None:
        """What it says of its battery now."""
        self._battery[device] = metrics.battery

    def leave(self, device: str) -> None:
        """It is gone."""
        self._births.pop(device, None)
        self._battery.pop(device, None)

    def askable(self) -> list[str]:
        """The devices online that the schedule lets take part as they are now."""
        return [
            device
            for device in self.online
            if device not in self.denied and self.schedule.may_be_asked(self._births[device], self._battery.get(device))
        ]

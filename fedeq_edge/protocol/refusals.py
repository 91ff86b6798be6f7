"""What is refused: counted, named in the log, and answered while it pays."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from fedeq_edge.protocol.outlet import Outlet
from fedeq_edge.protocol.state import AggregatorState

# A device that is refused again and again is counted, but fills no log and gets no more answers until the next round.
PATIENCE: Final = 20


@dataclass(slots=True)
class Refusals:
    """Refusals of one aggregator. counts: by code, since its start."""

    state: AggregatorState
    out: Outlet
    counts: Counter[str]
    _troubles: Counter[str] = field(default_factory=Counter)  # of each device in this round

    def refuse(self, code: str, device: str, reason: str) -> bool:
        """Count it; whether it is also worth a line and an answer."""
        self.counts[code] += 1
        self._troubles[device] += 1
        if self._troubles[device] > PATIENCE:
            return False
        last = "; further ones are counted only" if self._troubles[device] == PATIENCE else ""
        self.out.note("refused", device=device, round=self.state.round, code=code, reason=reason + last)
        return True

    def forget(self) -> None:
        """Another round: everybody is listened to again."""
        self._troubles.clear()

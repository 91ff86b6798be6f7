"""Whether mosquitto on this machine takes the fleet's list of revoked certificates by itself: fedeq-revoked.path does.

Nothing here needs a right: the units of broker/ do the work as root, and systemd tells everybody what runs.
"""

import time
from pathlib import Path
from typing import Final

from fedeq_edge.provision.findings import said

# Beside crl.pem: as long as nobody takes the list, and while the broker is given it.
MARK: Final = "crl.new"
TAKEN: Final = "crl.taken"
WATCHER: Final = "fedeq-revoked.path"
_BROKER: Final = "mosquitto.service"
_RESTART_S: Final = 20.0  # mosquitto takes less than one, unless it has much to write first
_POLL_S: Final = 0.1


class BrokerHere:
    """The broker beside the fleet's folder as it is now, before there is a new list."""

    def __init__(self, folder: Path) -> None:
        self._mark = folder.resolve() / "gateway" / MARK
        self._marks = (self._mark, self._mark.with_name(TAKEN))
        shown = said(["systemctl", "show", WATCHER, "--property=ActiveState", "--property=Paths"])
        self._is_watched = "ActiveState=active" in shown and str(self._mark) in shown
        self._before = _shown()

    def took_list(self, seconds: float = _RESTART_S) -> bool:
        """It has started again, with the new list and without its old connections; waited for where it will."""
        until = time.monotonic() + seconds
        while self._is_watched and time.monotonic() < until:
            if (now := _shown()) != self._before and "ActiveState=active" in now and not self._waits():
                return True
            time.sleep(_POLL_S)
        return False

    def _waits(self) -> bool:
        return any(mark.exists() for mark in self._marks)


def _shown() -> str:
    """What tells one run of the broker from another."""
    return said(["systemctl", "show", _BROKER, "--property=ActiveState", "--property=InvocationID"])

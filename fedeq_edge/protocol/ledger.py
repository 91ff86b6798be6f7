"""What a device remembers of its federation, and which of its changes go on the disk."""

from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np

from fedeq_edge.protocol.actions import Keep, Save, Settle
from fedeq_edge.protocol.device_outlet import DeviceOutlet
from fedeq_edge.protocol.state import ClientState, Pending, settled
from fedeq_edge.training.step import Vector

# Contributions that a start decodes to have nu again; and the whole state is written once in as many rounds.
SETTLED_A_SAVE: Final = 16


@dataclass(slots=True)
class Ledger:
    """The state of one client: whatever changes it is here, and says to `out` what the disk must know of it."""

    state: ClientState
    out: DeviceOutlet
    _unfolded: int = 0  # verdicts since the state was written whole

    def begin(self, run: str) -> None:
        """A federation of which nothing is known yet."""
        self.state = ClientState(run=run)
        self.out.append(Save(state=self.state))

    def stand(self, z: Vector, digest: bytes) -> None:
        """We hold the consensus z, (s,) float32."""
        nu = self.state.nu if self.state.nu.size == z.size else np.zeros(z.size, np.int64)
        # Not saved: after a crash we ask for it again, which costs less than writing it in every round.
        self.state = msgspec.structs.replace(self.state, z=z, base=digest, nu=nu)

    def hold(self, pending: Pending, head: Vector) -> None:
        """This contribution waits for its verdict, and survives a crash."""
        self.state = msgspec.structs.replace(self.state, pending=pending, head=head)
        self.out.append(Keep(pending=pending, head=head))

    def settle(self, *, accepted: bool, factor: int) -> None:
        """The pending contribution is, on the disk by a word; now and then the whole state is written instead."""
        self.state = settled(self.state, accepted=accepted, factor=factor)
        self._unfolded += 1
        if self._unfolded >= SETTLED_A_SAVE:
            self.keep()
        else:
            self.out.append(Settle(accepted=accepted, factor=factor))

    def keep(self, **changes: object) -> None:
        """The whole state with these changes, in memory and on the disk."""
        self._unfolded = 0
        self.state = msgspec.structs.replace(self.state, **changes)
        self.out.append(Save(state=self.state))

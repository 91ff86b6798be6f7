"""What a device remembers of its federation, and which of its changes go on the disk."""

from dataclasses import dataclass, field
from typing import Final
from weakref import WeakValueDictionary

import msgspec
import numpy as np

from fedeq_edge.protocol.actions import Keep, Save, Settle
from fedeq_edge.protocol.device_outlet import DeviceOutlet
from fedeq_edge.protocol.state import NO_DUAL, NOTHING, ClientState, Pending, counted, settled
from fedeq_edge.training.step import Vector
from fedeq_edge.wire import messages
from fedeq_edge.wire.messages import Received

# Contributions that a start decodes to have nu again; and the whole state is written once in as many rounds.
SETTLED_A_SAVE: Final = 16


@dataclass(frozen=True, slots=True)
class Shared:
    """What the clients of one process hold together, a simulation's thousand for example.

    Then a client holds no vector of its own: nu and head are kept by whoever runs it, who also puts them into its
    tasks, and what one of them has decoded is the others' as well. consensus: z_hat by its digest, as long as some
    client holds it.
    """

    consensus: "WeakValueDictionary[bytes, Vector]" = field(default_factory=WeakValueDictionary)
    _told: dict[str, tuple[bytes, Received]] = field(default_factory=dict)  # the last payload of a topic, decoded

    def decode(self, topic: str, payload: bytes) -> Received:
        """The message in a payload that all of them get. Raises RemoteWireError as `messages.decode` does."""
        known = self._told.get(topic)
        if known is None or known[0] is not payload:
            known = self._told[topic] = payload, messages.decode(payload)
        return known[1]


@dataclass(slots=True)
class Ledger:
    """The state of one client: whatever changes it is here, and says to `out` what the disk must know of it.

    shared: where vectors are kept, None for a client that keeps its own.
    """

    state: ClientState
    out: DeviceOutlet
    shared: Shared | None = None
    _unfolded: int = 0  # verdicts since the state was written whole

    def begin(self, run: str) -> None:
        """A federation of which nothing is known yet."""
        self.state = ClientState(run=run)
        self.out.append(Save(state=self.state))

    def stand(self, z: Vector, digest: bytes) -> None:
        """We hold the consensus z, (s,) float32."""
        nu = self.state.nu
        if self.shared is not None:
            self.shared.consensus[digest] = z
        elif nu.size != z.size:
            nu = np.zeros(z.size, np.int64)
        # Not saved: after a crash we ask for it again, which costs less than writing it in every round.
        self.state = msgspec.structs.replace(self.state, z=z, base=digest, nu=nu)

    def hold(self, pending: Pending, head: Vector) -> None:
        """This contribution waits for its verdict, and survives a crash."""
        kept = head if self.shared is None else NOTHING
        self.state = msgspec.structs.replace(self.state, pending=pending, head=kept)
        self.out.append(Keep(pending=pending, head=head))

    def settle(self, *, accepted: bool, factor: int) -> None:
        """The pending contribution is, on the disk by a word; now and then the whole state is written instead."""
        pending = self.state.pending
        if self.shared is not None and pending is not None and accepted:
            self.state = counted(self.state, pending, factor)
        else:
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
        if self.shared is not None:
            self.state = msgspec.structs.replace(self.state, nu=NO_DUAL, head=NOTHING)
        self.out.append(Save(state=self.state))

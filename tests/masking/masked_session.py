"""A whole masked sum over encoded messages, with devices that drop out at chosen steps."""

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.masking import (
    Delivery,
    Keys,
    Masked,
    MaskedSum,
    MaskingDevice,
    MaskingServer,
    Message,
    Reveal,
    Roster,
    Shares,
    Survivors,
    Terms,
    decode,
    encode,
)
from fedeq_edge.masking.server import Phase

BOUND = 1000


def terms(*, length: int = 5, bound: int = BOUND, bits: int | None = None, threshold: float = 2 / 3) -> Terms:
    return Terms(session=bytes(range(32)), length=length, bound=bound, bits=bits, threshold=threshold)


def vectors(members: int, length: int = 5, bound: int = BOUND) -> dict[str, NDArray[np.int64]]:
    drawn = np.random.default_rng(members).integers(-bound, bound, (members, length), endpoint=True)
    return {f"d{number}": vector for number, vector in enumerate(drawn)}


def give(server: MaskingServer, device: str, message: Message) -> None:
    """The server gets the message, through its encoding."""
    content = encode(message)
    match message:
        case Keys():
            server.add_keys(device, decode(content, Keys))
        case Shares():
            server.add_shares(device, decode(content, Shares))
        case Masked():
            server.add_masked(device, decode(content, Masked))
        case Reveal():
            server.add_reveal(device, decode(content, Reveal))


class Session:
    """A server and its devices; each method is one step, taken by all devices but those named.

    `log` holds what the server was given and which steps were closed, in order.
    """

    def __init__(self, agreed: Terms, data: dict[str, NDArray[np.int64]]) -> None:
        self.data = data
        self.server = MaskingServer(agreed)
        self.devices = {name: MaskingDevice(name, agreed) for name in data}
        self.log: list[tuple[str, Message] | Phase] = []

    def keys(self) -> Roster:
        for name, device in self.devices.items():
            self._give(name, device.keys())
        self.log.append("keys")
        return decode(encode(self.server.close_keys()), Roster)

    def shares(self, *, without: Collection[str] = ()) -> dict[str, Delivery]:
        roster = self.keys()
        for name in self.devices.keys() - without:
            self._give(name, self.devices[name].share(roster))
        self.log.append("shares")
        return {name: decode(encode(delivery), Delivery) for name, delivery in self.server.close_shares().items()}

    def masked(self, deliveries: dict[str, Delivery], *, without: Collection[str] = ()) -> Survivors:
        for name in deliveries.keys() - without:
            self._give(name, self.devices[name].mask(deliveries[name], self.data[name]))
        self.log.append("masked")
        return decode(encode(self.server.close_masked()), Survivors)

    def revealed(self, survivors: Survivors, holders: Collection[str]) -> None:
        for name in holders:
            self._give(name, self.devices[name].reveal(survivors))

    def run(
        self, *, shared_nothing: Collection[str] = (), masked_nothing: Collection[str] = (), mute: Collection[str] = ()
    ) -> MaskedSum:
        deliveries = self.shares(without=shared_nothing)
        survivors = self.masked(deliveries, without=masked_nothing)
        self.revealed(survivors, deliveries.keys() - {*masked_nothing, *mute})
        return self.server.unmask()

    def plain(self, names: Collection[str]) -> NDArray[np.int64]:
        """The sum made in the open."""
        total: NDArray[np.int64] = np.sum([self.data[name] for name in names], axis=0)
        return total

    def _give(self, device: str, message: Message) -> None:
        self.log.append((device, message))
        give(self.server, device, message)

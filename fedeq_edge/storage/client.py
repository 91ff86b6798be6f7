"""A device's memory of its federation: one sealed file."""

from pathlib import Path

from fedeq_edge.protocol.state import ClientState
from fedeq_edge.storage.files import load, save


class ClientFolder:
    """A device's memory of its federation, one file."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "client.state"

    def load(self) -> ClientState:
        """What was saved last, or a state without a federation."""
        return load(self._path, ClientState) or ClientState()

    def save(self, state: ClientState) -> None:
        """Keep this state."""
        save(self._path, state)

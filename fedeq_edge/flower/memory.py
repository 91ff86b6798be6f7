"""What a client keeps between two messages of Flower, which starts a new process for each.

In Flower's own state of the run (`Context.state`), which dies with the SuperNode, or in a folder, which does not.
"""

# pyright: reportMissingImports=false
# Flower is not in the environment in which types are checked (pyproject.toml, flower).

from dataclasses import dataclass
from pathlib import Path

import msgspec
from flwr.app import ArrayRecord, Context

from fedeq_edge import modelfile, storage, structs
from fedeq_edge.flower.content import RECORD, array
from fedeq_edge.protocol.state import ClientState
from fedeq_edge.training.step import Calibration

_MEMORY = "memory"


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """state: of the client in the algorithm. calibration: measured cost of this model here, None before."""

    state: ClientState = msgspec.field(default_factory=ClientState)
    calibration: Calibration | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeper:
    """Where one client's memory of one run lies. folder: None for Flower's own state."""

    context: Context
    device: str
    folder: Path | None

    def load(self) -> Memory:
        """What was saved last; an empty memory before. Raises StateError where the file is damaged."""
        if self.folder is not None:
            return storage.load(self._path("state"), Memory) or Memory()
        record = self.context.state.array_records.get(RECORD)
        return Memory() if record is None else structs.unpack(record[_MEMORY].data, Memory)

    def save(self, memory: Memory) -> None:
        """This is what the next message finds."""
        if self.folder is not None:
            storage.save(self._path("state"), memory)
        else:
            self.context.state[RECORD] = ArrayRecord({_MEMORY: array(structs.pack(memory))})

    def keep_model(self, model: modelfile.ModelFile) -> None:
        """The personal model is a file, where there is a folder for it."""
        if self.folder is not None:
            modelfile.write(self._path("fedeq"), model)

    def _path(self, suffix: str) -> Path:
        """By run, as another run's dual and head would be those of another federation."""
        assert self.folder is not None
        place = self.folder / f"{self.context.run_id:x}"
        place.mkdir(parents=True, exist_ok=True)
        return place / f"{self.device}.{suffix}"

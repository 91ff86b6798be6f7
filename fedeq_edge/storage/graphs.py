"""A device's training graphs: the one that came over the broker, and those that came with a bundle or an update."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedeq_edge.storage.files import write_atomically


class GraphFolder:
    """Graphs by their sha256. own: the file for the one of the federation; folders: where others may lie as *.onnx.

    limit_bytes: larger files there are models of another kind.
    """

    def __init__(self, own: Path, folders: Sequence[Path], *, limit_bytes: int) -> None:
        self._own, self._folders, self._limit_bytes = own, tuple(folders), limit_bytes

    def find(self, sha256: bytes) -> Path | None:
        """The file whose content has this digest now, None where there is none."""
        return next((path for path in self._candidates() if _digest(path, self._limit_bytes) == sha256), None)

    def keep(self, graph: bytes) -> None:
        """The graph is on the disk, and the one before it no longer; a kill leaves one of the two, whole."""
        write_atomically(self._own, graph)

    def _candidates(self) -> Iterator[Path]:
        yield self._own
        for folder in self._folders:
            yield from sorted(folder.glob("*.onnx"))


def _digest(path: Path, limit_bytes: int) -> bytes:
    """sha256 of a file that may be a graph, else nothing: one that cannot be read is as good as absent."""
    try:
        return hashlib.sha256(path.read_bytes()).digest() if path.stat().st_size <= limit_bytes else b""
    except OSError:
        return b""

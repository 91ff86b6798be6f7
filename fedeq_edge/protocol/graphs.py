"""The training graph on its way to devices whose trainer computes with onnxruntime.

The manifest names it by its sha256, and by that of the deflated blob in which it travels (a sixth of its size): so what
has come is known to be what was announced before anybody parses a byte of it.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fedeq_edge.errors import RemoteWireError
from fedeq_edge.protocol.actions import KeepGraph
from fedeq_edge.protocol.device_outlet import DeviceOutlet
from fedeq_edge.wire import chunks, messages

GRAPH_LIMIT_BYTES: Final = 2**20  # the largest of ours has a tenth of it, as no weights are inside
_SMALLEST: Final = 9  # once in a federation, so that a slow link carries less

HoldsGraph = Callable[[bytes], bool]
"""Whether a graph of this sha256 lies on the device's disk."""


def packed(graph: bytes) -> tuple[messages.GraphName | None, bytes]:
    """(its name in the manifest, the blob in which it travels) of a graph; (None, nothing) of no graph."""
    if not graph:
        return None, b""
    blob = zlib.compress(graph, _SMALLEST)
    return messages.GraphName(sha256=chunks.digest(graph), transfer=chunks.digest(blob)), blob


def unpacked(name: messages.GraphName, blob: bytes) -> bytes:
    """The graph in a blob. Raises RemoteWireError where it is not the one of that name."""
    try:
        graph = zlib.decompressobj().decompress(blob, GRAPH_LIMIT_BYTES)
    except zlib.error:
        graph = b""
    if chunks.digest(graph) != name.sha256:
        raise RemoteWireError(_differs(name))
    return graph


@dataclass(slots=True)
class GraphFetching:
    """How one device comes by its training graph. holds: None where the trainer needs none.

    wanted: the one that is waited for.
    """

    holds: HoldsGraph | None
    out: DeviceOutlet
    wanted: messages.GraphName | None = None
    _kept: bytes = b""  # just given to the shell, which has it on the disk before it does what comes after
    _incoming: chunks.Incoming | None = None

    def lacks(self, manifest: messages.Manifest) -> bool:
        """Whether nothing can be trained here before a graph has come."""
        if self.holds is None:
            return False
        kept, self._kept = self._kept, b""  # asked again, the disk says what it holds
        name = manifest.graph
        return name is None or (name.sha256 != kept and not self.holds(name.sha256))

    def ask(self, manifest: messages.Manifest, now: float) -> str | None:
        """The graph is asked for, once; why it cannot be, where it cannot."""
        if manifest.graph is None:
            return (
                "this device trains by a graph and the federation has none; install onnx beside the aggregator "
                "(pip install 'fedeq-edge[onnx]') and restart it, or set backend = \"torch\" on the device"
            )
        if self.wanted != manifest.graph:
            self.wanted = manifest.graph
            self.out.moved_at = now
            self.out.send(messages.Fetch(run=manifest.run, model=manifest.graph.transfer))
        return None

    def stop(self) -> None:
        """Nothing is waited for. What has come of a graph is kept, as that of a consensus is."""
        self.wanted = None

    def awaits(self, chunk: messages.Chunk) -> bool:
        """Whether this is a part of the graph that is waited for."""
        return self.wanted is not None and chunk.transfer == self.wanted.transfer

    def chunk(self, chunk: messages.Chunk, body: memoryview, now: float) -> bool:
        """Keep a run of blocks of the graph and acknowledge it; whether it was the last, and the graph is ours.

        Raises RemoteWireError for a run that does not fit, and where the whole is not what was announced; what lies on
        the disk stays.
        """
        if chunk.size > GRAPH_LIMIT_BYTES:
            raise RemoteWireError(f"training graph of {chunk.size} bytes is over the limit of {GRAPH_LIMIT_BYTES}")
        if self._incoming is None or (self._incoming.name, self._incoming.size) != (chunk.transfer, chunk.size):
            self._incoming = chunks.Incoming(chunk.transfer, chunk.size)
        self._incoming.add(chunk.index, body)
        self.out.moved_at = now
        self.out.send(messages.ChunkAck(transfer=chunk.transfer, bitmap=self._incoming.bitmap))
        if self._incoming.complete:
            self._keep(self._incoming)
            return True
        return False

    def _keep(self, incoming: chunks.Incoming) -> None:
        name, self._incoming = self.wanted, None
        self.stop()
        assert name is not None  # or the chunk was not awaited
        try:
            blob = incoming.blob()
        except RemoteWireError as error:
            raise RemoteWireError(_differs(name)) from error
        self.out.append(KeepGraph(graph=unpacked(name, blob)))
        self._kept = name.sha256


def _differs(name: messages.GraphName) -> str:
    return (
        f"training graph: what came has another sha256 than {name.sha256.hex()[:12]}..., which the manifest announces; "
        "restart the aggregator, which makes it anew"
    )

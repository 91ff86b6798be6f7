"""A look at ONNX bytes from somebody else before onnxruntime parses them: bounded, and without the onnx package.

onnxruntime reads files that a tensor names (external data) and runs whatever operator sets it was built with. A graph
from a broker needs neither: this walks the protobuf message, wire format only, and refuses both by name. Field numbers
are those of onnx.proto3, which never change.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from fedeq_edge.errors import ExportError
from fedeq_edge.onnx.contract import IR_VERSION, OPSET, SCHEMA, SCHEMA_VERSION, refuse_newer

LARGEST_GRAPH_BYTES = 1 << 20
"""Of a graph without weights: ours have 15 to 80 KB; it travels as one message of the broker."""
# Ours nest model > graph > node > attribute > body > node > attribute > tensor.
_DEEPEST = 16
_MOST_FIELDS = 200_000

# Message kinds, and by field number what lies inside: another kind, or None where it is refused.
_INSIDE: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 8: "opset"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph"},
}
_REFUSED: Mapping[tuple[str, int], str] = {
    ("model", 20): "training info",
    ("model", 25): "functions of its own",
    ("graph", 15): "sparse tensors",
    ("attribute", 22): "sparse tensors",
    ("attribute", 23): "sparse tensors",
    ("tensor", 13): "external data",
}
_OURS = ("", "ai.onnx")
_NOTHING = memoryview(b"")


@dataclass(slots=True)
class Facts:
    """What a file says of itself: its versions and its metadata. opset: of ONNX's own operators."""

    ir_version: int = 0
    opset: int = 0
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def newer(self) -> bool:
        """Whether it is of a later format than this program writes."""
        return self.ir_version > IR_VERSION or self.opset > OPSET


def scan(content: bytes, name: str) -> Facts:
    """Facts of the model in `content`. Raises ExportError, `name` in front, for what no graph of ours holds."""
    if len(content) > LARGEST_GRAPH_BYTES:
        raise ExportError(
            f"{name}: {len(content)} bytes, more than the {LARGEST_GRAPH_BYTES} of a training graph; refused"
        )
    found = facts(content, name)
    if not found.ir_version:
        raise ExportError(f"{name}: no ONNX model; build one with fedeq_edge.onnx.training.build_training")
    # First of all: what a later version may hold is no fault of the file.
    refuse_newer(name, found.metadata.get(SCHEMA, SCHEMA_VERSION))
    if found.newer:
        raise ExportError(
            f"{name}: written in opset {found.opset} and IR version {found.ir_version}, this program reads up to "
            f"{OPSET} and {IR_VERSION}; update fedeq-edge"
        )
    _Walk(name).message(memoryview(content), "model", 0)
    return found


def facts(content: bytes, name: str) -> Facts:
    """What the outermost fields say. Raises ExportError, `name` in front, where they are no protobuf."""
    walk, found = _Walk(name), Facts()
    for number, value in walk.fields(memoryview(content)):
        if number == 1 and isinstance(value, int):
            found.ir_version = value
        elif number == 8 and walk.text_in(value, 1) in _OURS:
            found.opset = walk.number_in(value, 2)
        elif number == 14:
            found.metadata[walk.text_in(value, 1)] = walk.text_in(value, 2)
    return found


class _Walk:
    def __init__(self, name: str) -> None:
        self._name = name
        self._left = _MOST_FIELDS

    def message(self, data: memoryview, kind: str, depth: int) -> None:
        """Every field of one message, and of those inside that can hold what is refused."""
        if depth > _DEEPEST:
            self._refuse("graphs nested too deeply")
        for number, value in self.fields(data):
            if (kind, number) in _REFUSED:
                self._refuse(_REFUSED[kind, number])
            self._judge(kind, number, value)
            inside = _INSIDE.get(kind, {}).get(number)
            if inside is not None and not isinstance(value, int):
                self.message(value, inside, depth + 1)

    def _judge(self, kind: str, number: int, value: int | memoryview) -> None:
        if (kind, number) == ("tensor", 14) and value != 0:
            self._refuse("external data")
        elif (kind, number) in (("node", 7), ("opset", 1)):
            domain = self._text(value)
            if domain not in _OURS:
                self._refuse(f"operators of the domain {domain!r}")

    def fields(self, data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
        """(number, value) of each field: an integer, or bytes."""
        at = 0
        while at < len(data):
            self._left -= 1
            if self._left < 0:
                self._refuse(f"more than {_MOST_FIELDS} fields")
            tag, at = self._varint(data, at)
            number, wire = tag >> 3, tag & 7
            if wire == 0:
                value, at = self._varint(data, at)
                yield number, value
                continue
            length, at = self._varint(data, at) if wire == 2 else ({1: 8, 5: 4}.get(wire, len(data) + 1), at)
            if length > len(data) - at:
                self._refuse_damage()
            yield number, data[at : at + length]
            at += length

    def _varint(self, data: memoryview, at: int) -> tuple[int, int]:
        value = 0
        for place, byte in enumerate(data[at : at + 10]):
            value |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                return value, at + place + 1
        return self._refuse_damage()

    def text_in(self, message: int | memoryview, number: int) -> str:
        """The field of that number inside a message, as text; empty where it has none."""
        return self._text(dict(self._inside(message)).get(number, _NOTHING))

    def number_in(self, message: int | memoryview, number: int) -> int:
        """The field of that number inside a message, 0 where it has none."""
        value = dict(self._inside(message)).get(number, 0)
        return value if isinstance(value, int) else self._refuse_damage()

    def _inside(self, message: int | memoryview) -> Iterator[tuple[int, int | memoryview]]:
        return self._refuse_damage() if isinstance(message, int) else self.fields(message)

    def _text(self, value: int | memoryview) -> str:
        if isinstance(value, int):
            return self._refuse_damage()
        try:
            return str(value, "utf-8")
        except UnicodeDecodeError:
            return self._refuse_damage()

    def _refuse(self, what: str) -> NoReturn:
        raise ExportError(f"{self._name}: holds {what}, which no graph of a federation needs; refused")

    def _refuse_damage(self) -> NoReturn:
        raise ExportError(f"{self._name}: not an ONNX model, or a truncated one; fetch it again")

"""A training graph from somebody else is looked through before onnxruntime sees it."""

import contextlib
from collections.abc import Callable

import msgspec
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from fedeq_edge.deq.description import describe
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ExportError
from fedeq_edge.onnx.scan import LARGEST_GRAPH_BYTES, scan
from fedeq_edge.onnx.trainer import TrainingGraph
from fedeq_edge.onnx.training import build_training

SPEC = ModelSpec(input_shape=(6,), classes=3, channels=4)
CONTENT = build_training(SPEC)
DISC = {"kind": "disc", "parameter": "cell.weight", "radius": 0.5}  # no set that this version knows


def changed(change: Callable[[onnx.ModelProto], None]) -> bytes:
    model = onnx.load_model_from_string(CONTENT)
    change(model)
    content: bytes = model.SerializeToString()
    return content


def body(model: onnx.ModelProto) -> onnx.GraphProto:
    graph: onnx.GraphProto = next(node for node in model.graph.node if node.op_type == "Loop").attribute[0].g
    return graph


def external(tensor: TensorProto) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")


def prop(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        next(entry for entry in model.metadata_props if entry.key == key).value = value

    return change


def description(**fields: object) -> Callable[[onnx.ModelProto], None]:
    told = {**msgspec.to_builtins(describe(SPEC)), **fields}
    return prop("fedeq.description", msgspec.json.encode(told).decode())


def without_description(model: onnx.ModelProto) -> None:
    kept = [entry for entry in model.metadata_props if entry.key != "fedeq.description"]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)


def foreign_node(model: onnx.ModelProto) -> None:
    body(model).node[0].domain = "com.evil"


def foreign_opset(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))


def located_constant(model: onnx.ModelProto) -> None:
    tensor = TensorProto(data_location=TensorProto.EXTERNAL)
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def sparse(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add()


def function(model: onnx.ModelProto) -> None:
    model.functions.add(name="f", domain="ours")


def newer_ir(model: onnx.ModelProto) -> None:
    model.ir_version = 10


def newer_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 99


def newer_in_all(model: onnx.ModelProto) -> None:
    """As a later version might write it, with things that no graph of today may hold."""
    for change in (newer_ir, newer_opset, function, foreign_opset, prop("fedeq.schema_version", "2.1")):
        change(model)


def other_weights(model: onnx.ModelProto) -> None:
    next(value for value in model.graph.input if value.name == "w").type.tensor_type.shape.dim[0].dim_value = 7


def other_duals(model: onnx.ModelProto) -> None:
    next(value for value in model.graph.input if value.name == "offset").type.tensor_type.shape.dim[0].dim_value = 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (changed(lambda model: external(model.graph.initializer[0])), "external data"),
        (changed(lambda model: external(body(model).node[0].attribute.add(name="t", type=4).t)), "external data"),
        (changed(located_constant), "external data"),
        (changed(foreign_node), "operators of the domain 'com.evil'"),
        (changed(foreign_opset), "operators of the domain 'ai.onnx.ml'"),
        (changed(sparse), "sparse tensors"),
        (changed(function), "functions of its own"),
        (changed(newer_ir), "opset 18 and IR version 10, this program reads up to 18 and 8; update fedeq-edge"),
        (changed(newer_opset), "opset 99 and IR version 8, this program reads up to 18 and 8; update fedeq-edge"),
        (changed(newer_in_all), "schema version 2.1, this program reads 1; update fedeq-edge"),
        (changed(prop("fedeq.schema_version", "2")), "schema version 2, this program reads 1; update fedeq-edge"),
        (changed(prop("fedeq.kind", "inference")), "no training graph of fedeq-edge"),
        (changed(without_description), "does not describe its model; let the gateway build it anew"),
        (
            changed(description(bounds=[{"kind": "disc", "parameter": "cell.weight", "radius": 0.5}])),
            "update fedeq-edge",
        ),
        (changed(description(head=[])), "its model cannot be read"),
        (changed(description(input_shape=[2**40])), "its model cannot be read"),
        (changed(description(step_size="cell.weight")), "its solver is of another model"),
        (changed(prop("fedeq.description", "{")), "its model cannot be read"),
        (changed(prop("fedeq.optimizer", "lion")), "optimiser 'lion' is unknown here"),
        (changed(prop("fedeq.solver_graph", "!")), "its solver is damaged"),
        (changed(prop("fedeq.solver_graph", "")), "its solver: no ONNX model"),
        (changed(other_weights), "onnxruntime .* cannot load it"),
        (changed(other_duals), "offset is .* the model needs float32"),
        (b"", "no ONNX model"),
        (b"no such thing", "not an ONNX model"),
        (CONTENT[:-40], "truncated"),
        (CONTENT + bytes(LARGEST_GRAPH_BYTES), "more than the 1048576 of a training graph"),
    ],
)
def test_what_no_graph_of_ours_holds_is_refused_in_one_line(content: bytes, message: str) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        TrainingGraph(content)

    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("training graph")


def test_a_later_minor_version_is_read_but_for_what_it_adds() -> None:
    def later(model: onnx.ModelProto) -> None:
        prop("fedeq.schema_version", "1.1")(model)
        description(symmetries=["none"], proof={"kind": "rows", "parameter": "cell.weight", "by": "us"})(model)

    assert TrainingGraph(changed(later)).description == describe(SPEC)


def test_bodies_nested_without_end_are_refused() -> None:
    content = b""
    # From inside: a graph is field 6 of an attribute, that is 5 of a node, that is 1 of a graph, that is 7 of a model.
    for number in (6, 5, 1) * 40:
        content = bytes([number << 3 | 2]) + length(content) + content
    content = b"\x08\x08" + bytes([7 << 3 | 2]) + length(content) + content

    with pytest.raises(ExportError, match="nested too deeply"):
        scan(content, "graph")


def length(content: bytes) -> bytes:
    return bytes([len(content) & 0x7F | 0x80, len(content) >> 7])


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_damage_anywhere_is_an_error_of_ours_or_harmless(data: st.DataObject) -> None:
    spoilt = bytearray(CONTENT)
    for _ in range(data.draw(st.integers(1, 4))):
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(spoilt[: data.draw(st.integers(0, len(spoilt)))])
    with contextlib.suppress(ExportError):
        scan(content, "graph")

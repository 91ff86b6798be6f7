"""Files like the example that runners of today have to refuse, or to take otherwise."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import onnx

from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.onnx.export import export

EXAMPLE: Final = Path(__file__).parents[2] / "export" / "example"


def newer_model(folder: Path) -> str:
    """The example as a later fedeq-edge might write it: a file in `folder` whose metadata has major version 2."""
    return other_model(folder, {"fedeq.schema_version": "2.0"})


def other_model(folder: Path, changes: Mapping[str, str]) -> str:
    """The example in `folder` with other metadata."""
    model = onnx.load(EXAMPLE / "model.onnx")
    told = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, {**told, **changes})
    onnx.save(model, path := folder / "other.onnx")
    return str(path)


def unrolled_model(folder: Path) -> str:
    """A file in `folder` that takes the example's samples alone and always makes 4 iterations."""
    spec = ModelSpec(input_shape=_sample_shape(), classes=10, channels=8, pool=2)
    export(spec, *initial(spec, 0), path := folder / "unrolled.onnx", budget=4, recipe="unrolled")
    return str(path)


def _sample_shape() -> tuple[int, ...]:
    dimensions = onnx.load(EXAMPLE / "model.onnx").graph.input[0].type.tensor_type.shape.dim
    return tuple(dimension.dim_value for dimension in dimensions[1:])

"""The example as a later fedeq-edge might write it, which no runner of today may answer with."""

from pathlib import Path
from typing import Final

import onnx

EXAMPLE: Final = Path(__file__).parents[2] / "export" / "example"


def newer_model(folder: Path) -> str:
    """A file in `folder` whose metadata has major version 2."""
    model = onnx.load(EXAMPLE / "model.onnx")
    told = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, told | {"fedeq.schema_version": "2.0"})
    onnx.save(model, path := folder / "newer.onnx")
    return str(path)

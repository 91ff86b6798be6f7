"""Models and training graphs on their way to boards: loaded here first, for a board that cannot has nobody to tell."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedeq_edge import modelfile
from fedeq_edge.errors import ConfigError, ExportError, StateError

SUFFIXES: Final = (".fedeq", ".onnx")


def check_model(path: Path) -> None:
    """The file is a model that this version loads. Raises ConfigError; ExportError where onnxruntime is not here."""
    if path.suffix not in SUFFIXES or not path.is_file():
        what = "is no .fedeq or .onnx file" if path.exists() else "does not exist"
        raise ConfigError(f"model {path} {what}; name a device's personal.fedeq, or what `fedeq model export` writes")
    load = _loader(path.suffix)
    try:
        load(path)
    except (ConfigError, ExportError, StateError) as error:
        reason = str(error).partition("; ")[0]
        raise ConfigError(
            f"model {path} cannot be loaded, so that no board gets it ({reason}); take a device's personal.fedeq, or "
            "what `fedeq model export` writes"
        ) from error


def _loader(suffix: str) -> Callable[[Path], object]:
    if suffix == ".fedeq":
        return modelfile.read
    from fedeq_edge.onnx.runtime import Predictor  # noqa: PLC0415  # onnxruntime, only where there is a graph
    from fedeq_edge.onnx.trainer import TrainingGraph  # noqa: PLC0415  # as above

    def load(path: Path) -> object:
        content = path.read_bytes()
        return TrainingGraph(content) if _is_training(content) else Predictor(path)

    return load


def _is_training(content: bytes) -> bool:
    """Whether it says that it is a training graph; what cannot be read is not, and whoever loads it says why."""
    from fedeq_edge.onnx.scan import scan  # noqa: PLC0415  # with the package that needs it

    with contextlib.suppress(ExportError):
        return scan(content, "model").metadata.get("fedeq.kind") == "training"
    return False

"""Models on their way to boards: loaded here first, for a board that cannot load one has nobody to tell."""

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
    except (ExportError, StateError) as error:
        reason = str(error).partition("; ")[0]
        raise ConfigError(
            f"model {path} cannot be loaded, so that no board gets it ({reason}); take a device's personal.fedeq, or "
            "what `fedeq model export` writes"
        ) from error


def _loader(suffix: str) -> Callable[[Path], object]:
    if suffix == ".fedeq":
        return modelfile.read
    from fedeq_edge.onnx.runtime import Predictor  # noqa: PLC0415  # onnxruntime, only where there is a graph

    return Predictor

"""What `fedeq model export --recipe NAME` writes: `export/NAME/recipe.toml`, or `export/NAME.toml` beside the folders.

A folder is a target runtime, with the least program that runs a file there; a lone TOML is another form of the file
for any of them.
"""

from pathlib import Path
from typing import Literal

import msgspec

from fedeq_edge.errors import ConfigError
from fedeq_edge.kit import folder

DEFAULT = "onnxruntime"


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """opset, ir_version: of the file. solver: the iteration inside it.

    form: loop: stops by tolerance and budget, both inputs of the graph. unrolled: a fixed number of evaluations, no
    control flow. precision: of the weights in the file; int8 also multiplies in it, after calibration.
    tol: default relative residual at which a sample stops; 0 in an unrolled file, which never stops early.
    max_abs_diff: largest difference of a logit from torch with the parameters in the file; None where the file's own
    rounding makes that meaningless. max_logit_error, min_agreement: largest relative L2 error of logits, and least
    share of samples with the same answer, against torch with the model's own parameters.
    """

    opset: int
    ir_version: int
    solver: Literal["picard"]
    precision: Literal["float32", "float16", "int8"]
    tol: float
    form: Literal["loop", "unrolled"] = "loop"
    max_abs_diff: float | None = None
    max_logit_error: float = 1e-2
    min_agreement: float = 0.99


def load_recipe(name: str = DEFAULT) -> Recipe:
    """The recipe of that name. Raises ConfigError naming the ones there are, or the file and its fault."""
    path = _paths().get(name)
    if path is None:
        raise ConfigError(f"{folder('export')}: no recipe {name!r}; choose from {', '.join(recipes())}")
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Recipe)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a recipe: {error}") from error


def recipes() -> tuple[str, ...]:
    """Names of all recipes of this installation."""
    return tuple(sorted(_paths()))


def _paths() -> dict[str, Path]:
    place = folder("export")
    found = {path.parent.name: path for path in place.glob("*/recipe.toml")}
    return found | {path.stem: path for path in place.glob("*.toml")}

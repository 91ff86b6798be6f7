"""What an exported file promises a target runtime: read from `export/<target>/recipe.toml`."""

from typing import Literal

import msgspec

from fedeq_edge.errors import ConfigError
from fedeq_edge.kit import folder


class Recipe(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """opset, ir_version: of the file. solver, precision: the forms that we can write today.

    tol: default relative residual at which a sample stops. max_abs_diff: largest difference of a logit from torch's.
    """

    opset: int
    ir_version: int
    solver: Literal["picard"]
    precision: Literal["float32"]
    tol: float
    max_abs_diff: float


def load_recipe(target: str = "onnxruntime") -> Recipe:
    """The recipe of one target. Raises ConfigError naming the file and its fault."""
    path = folder("export") / target / "recipe.toml"
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Recipe)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no recipe for target {target!r}; the folders beside it are the targets") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a recipe: {error}") from error

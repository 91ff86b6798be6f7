"""What a training graph and the program that runs it agree on: names of inputs, outputs and metadata.

A change here is a new `SCHEMA_VERSION`: graphs travel to devices that are not updated at the same time.
"""

from collections.abc import Mapping
from typing import Literal

Optimizer = Literal["sgd", "adam"]

SCHEMA_VERSION = "1"
IR_VERSION = 8
"""Of the files, and the newest that is read: our oldest onnxruntime knows no later one."""
MOMENTS: Mapping[str, tuple[str, ...]] = {"sgd": ("velocity",), "adam": ("first", "second")}
"""What each optimiser remembers between steps: inputs (p + h,), and outputs with `_next` behind the name."""
FOUND = ("loss", "gradient_norm", "residual", "backward_residual")
"""Outputs that are numbers."""
STEP_SIZE = "step_size"
"""Input of a monotone model's graphs: a of `wellposed.step_size`, chosen for the W of this step."""
SOLVER_GRAPH = "fedeq.solver_graph"
"""Metadata that holds the solver, a graph of its own, in base64."""

"""What a file and the program that runs it agree on: the version of the metadata; names in a training graph.

A change here is a new `SCHEMA_VERSION`: files travel to devices that are not updated at the same time.
"""

from collections.abc import Mapping
from typing import Literal

from fedeq_edge.errors import ExportError

Optimizer = Literal["sgd", "adam"]

SCHEMA_VERSION = "1"
"""Major version of the metadata: a reader knows all files of its own, whatever a minor version (1.1) added."""
SCHEMA = "fedeq.schema_version"
"""Metadata that says it, in every file of ours."""
IR_VERSION = 8
"""Of the files, and the newest that is read: our oldest onnxruntime knows no later one."""
OPSET = 18
"""Of the files: in it, ReduceMean and its like take their axes as an input, and nothing here needs a later one."""
MOMENTS: Mapping[str, tuple[str, ...]] = {"sgd": ("velocity",), "adam": ("first", "second")}
"""What each optimiser remembers between steps: inputs (p + h,), and outputs with `_next` behind the name."""
FOUND = ("loss", "gradient_norm", "residual", "backward_residual")
"""Outputs that are numbers."""
SMALLEST_CLIPPED = 1e-12
"""Below it the norm of a gradient counts as zero in the clip, as in training/torch_step.py."""
STEP_SIZE = "step_size"
"""Input of a monotone model's graphs: a of `wellposed.step_size`, chosen for the W of this step."""
DESCRIPTION = "fedeq.description"
"""Metadata of a training or solver graph: `deq/description.Description` in JSON, all that a device needs to know."""
SOLVER_GRAPH = "fedeq.solver_graph"
"""Metadata that holds the solver, a graph of its own, in base64."""


def refuse_newer(name: str, version: str) -> None:
    """Raises ExportError, `name` in front, for a file of another major version."""
    if version.partition(".")[0] != SCHEMA_VERSION:
        raise ExportError(
            f"{name}: has schema version {version}, this program reads {SCHEMA_VERSION}; update fedeq-edge"
        )

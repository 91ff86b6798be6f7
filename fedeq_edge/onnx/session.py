"""Where onnxruntime is imported, and sessions are opened.

Version 1.29 and later report to their maker over the network, and write a device id to disk, unless
ORT_DISABLE_TELEMETRY is set before the import.
"""

import os
from pathlib import Path
from typing import Any

from fedeq_edge.errors import ExportError

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
try:
    import onnxruntime  # after the line above, see the module's docstring
except ImportError as missing:
    raise ExportError("onnxruntime is not installed; run pip install 'fedeq-edge[device]'") from missing

# onnxruntime warns about unused initializers and unknown hardware; 3 keeps errors only.
ERRORS_ONLY = 3


def open_session(model: Path | bytes, threads: int, name: str = "the model") -> Any:  # onnxruntime ships no types
    """A session on the CPU; name: what errors call bytes, a file goes by its own.

    Raises ExportError where the file is missing or onnxruntime refuses it.
    """
    if isinstance(model, Path) and not model.is_file():
        raise ExportError(f"{model}: no such file; export a model with fedeq model export")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class below Exception
        reason = str(error).splitlines()[0]
        label = name if isinstance(model, bytes) else model
        remedy = "is it truncated, or for a newer onnxruntime? export it again"
        raise ExportError(
            f"{label}: onnxruntime {onnxruntime.__version__} cannot load it ({reason}); {remedy}"
        ) from error

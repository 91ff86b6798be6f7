"""Where onnxruntime is imported, and sessions are opened.

Version 1.29 and later report to their maker over the network, and write a device id to disk, unless
ORT_DISABLE_TELEMETRY is set before the import.
"""

import os
from pathlib import Path
from typing import Any

from fedeq_edge.errors import ExportError
from fedeq_edge.onnx.contract import IR_VERSION, OPSET, SCHEMA, SCHEMA_VERSION, refuse_newer

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
try:
    import onnxruntime  # after the line above, see the module's docstring
except ImportError as missing:
    raise ExportError("onnxruntime is not installed; run pip install 'fedeq-edge[device]'") from missing

# onnxruntime warns about unused initializers and unknown hardware; 3 keeps errors only.
ERRORS_ONLY = 3
# How onnxruntime 1.15 to 1.31 put it.
_SIGNS_OF_A_NEWER_FORMAT = ("Unsupported model IR version", "official released onnx opset", "No Op registered for")
_SIGNS_OF_AN_UNKNOWN_OPERATOR = ("is not a registered function/op", "NOT_IMPLEMENTED", "No Op registered for")


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
        label = name if isinstance(model, bytes) else str(model)
        _refuse_newer_format(model, label, str(error))
        reason = str(error).splitlines()[0]
        unknown = any(sign in reason for sign in _SIGNS_OF_AN_UNKNOWN_OPERATOR)
        remedy = "export it with fedeq model export" if unknown else "is it truncated? export it again"
        raise ExportError(
            f"{label}: onnxruntime {onnxruntime.__version__} cannot load it ({reason}); {remedy}"
        ) from error


def _refuse_newer_format(model: Path | bytes, name: str, reason: str) -> None:
    """Raises ExportError where a later version explains why onnxruntime refuses a file."""
    from fedeq_edge.onnx.scan import facts  # noqa: PLC0415  # each import counts in the start of a program that answers

    try:
        found = facts(model if isinstance(model, bytes) else model.read_bytes(), name)
    except (ExportError, OSError):
        return  # damaged, or gone: onnxruntime's reason stands
    refuse_newer(name, found.metadata.get(SCHEMA, SCHEMA_VERSION))
    if found.newer and any(sign in reason for sign in _SIGNS_OF_A_NEWER_FORMAT):
        raise ExportError(
            f"{name}: written in opset {found.opset} and IR version {found.ir_version}, newer than onnxruntime "
            f"{onnxruntime.__version__} reads; update it, or export with opset {OPSET} and IR version {IR_VERSION}"
        )

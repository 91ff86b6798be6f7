"""A second, independent way from a model to ONNX: torch's exporter over torch's own loop. For comparison only.

Nothing is shared with graph.py and wrap.py: torch traces `deq/model.py`, and its while_loop becomes a Loop. What both
ways compute alike is hardly a mistake of either. The exporter needs onnxscript and takes seconds.
"""

import contextlib
import copy
import importlib.util
import inspect
import io
import logging
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

# torch has no public name for it.
from torch._higher_order_ops.while_loop import while_loop

from fedeq_edge.deq.model import DEQ
from fedeq_edge.deq.spec import SMALLEST_NORM
from fedeq_edge.errors import ExportError

# What to do where the second way itself breaks.
REMEDY = "report this as a defect, or leave the comparison out with --no-cross-check"

Samples = NDArray[np.float32]


class UnsupportedError(Exception):
    """torch's exporter does not know an operator or a construct of this model; the text says which, in one line."""


def missing() -> str | None:
    """What torch's exporter lacks here, None where it can be asked."""
    if importlib.util.find_spec("onnxscript") is None:
        return "onnxscript is not installed"
    if "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters:
        return f"torch {torch.__version__} has no exporter for loops"
    return None


def second_model(model: DEQ, example: Samples) -> bytes:
    """x (batch, *input_shape), tol (), max_iter () -> logits, evaluations of the batch; any batch size above 1.

    The batch stops together, once its worst residual is at tol. example: (B, *input_shape), B >= 2.
    Raises UnsupportedError where torch has no way to write this model, ExportError where it fails on the way.
    """
    try:
        return _written(model, example)
    except Exception as error:  # whatever happens in there: it must not pass for a comparison that agreed
        cause = _root(error)
        if _unsupported(error, cause):
            raise UnsupportedError(f"torch {torch.__version__} cannot export it ({_told(cause)})") from error
        raise ExportError(f"torch's own exporter fails ({_told(cause)}); {REMEDY}") from error


def _unsupported(error: Exception, cause: BaseException) -> bool:
    """The exporter says what it does not know by errors of torch's own, and a fault of the model keeps its type."""
    own = type(cause).__module__.startswith("torch.") or isinstance(cause, NotImplementedError)
    return isinstance(error, ImportError) or (isinstance(error, torch.onnx.OnnxExporterError) and own)


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _told(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _written(model: DEQ, example: Samples) -> bytes:
    inputs = (torch.from_numpy(example), torch.tensor(1e-3), torch.tensor(8))
    batch = torch.export.Dim("batch", min=2)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _silent():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Solve(_apart(model)).eval(),
            inputs,
            dynamo=True,
            verbose=False,
            opset_version=18,
            input_names=["x", "tol", "max_iter"],
            output_names=["logits", "evaluations"],
            dynamic_shapes=({0: batch}, None, None),
        )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def _apart(model: DEQ) -> DEQ:
    """A copy whose parameters have memory of their own: while_loop refuses views of one vector."""
    twin = copy.deepcopy(model)
    for name, parameter in list(twin.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(owner), leaf, nn.Parameter(parameter.detach().clone()))
    return twin


class _Solve(nn.Module):
    """The solve as torch's exporter can read it: tensors and a while_loop, no decision in Python."""

    def __init__(self, model: DEQ) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, tol: Tensor, max_iter: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, evaluations made)."""
        injection = self.model.inject(x)
        cell = self.model.cell

        def going(count: Tensor, z: Tensor, residual: Tensor) -> Tensor:
            del z
            return torch.logical_not(residual <= tol) & (count < max_iter)

        def evaluation(count: Tensor, z: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            del residual
            image = cell.step(z, injection)
            change, length = ((value.flatten(1) ** 2).sum(1).sqrt() for value in (image - z, image))
            return count + 1, image, (change / length.clamp_min(SMALLEST_NORM)).max()

        # A residual cell starts from the injection itself, and while_loop refuses a state that it also reads.
        begin = (torch.zeros((), dtype=torch.int64), cell.start(injection).clone(), torch.full((), torch.inf))
        count, z, _ = while_loop(going, evaluation, begin)  # type: ignore[no-untyped-call]  # as torch has it
        return self.model.head(self.model.features(z)), count


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the exporter's remarks on operators that we do not use."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)

"""The library that trains on this machine, loaded when it is asked for: torch, or onnxruntime on a training graph."""

import contextlib
from collections.abc import Iterator

from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError, ExportError
from fedeq_edge.training.backend import Backend
from fedeq_edge.training.step import BackendName, Plan


def open_backend(name: BackendName, spec: ModelSpec, plan: Plan) -> Backend:
    """A model of this spec on that backend (`open_torch`; `open_onnx` on a graph that is built here)."""
    return open_torch(spec, plan) if name == "torch" else open_onnx(build_graph(spec), plan)


def open_torch(spec: ModelSpec, plan: Plan) -> Backend:
    """A model of this spec in torch, which computes on one thread from here on.

    Raises ConfigError where torch is not installed.
    """
    try:
        import torch  # noqa: F401, PLC0415  # hundreds of megabytes, where it is the chosen backend
    except ImportError as error:
        raise ConfigError(
            'backend "torch" is not installed; run pip install \'fedeq-edge[torch]\', or set backend = "onnx"'
        ) from error
    from fedeq_edge.training.torch_step import TorchBackend  # noqa: PLC0415  # as torch

    one_thread()
    return TorchBackend(spec, plan)


def one_thread() -> None:
    """torch computes on one thread: models of this size lose by more, and a device has other work."""
    import torch  # noqa: PLC0415  # as in `open_torch`

    torch.set_num_threads(1)


def open_onnx(graph: bytes, plan: Plan) -> Backend:
    """The model that a training graph (onnx/training.py) describes, on one thread of onnxruntime.

    Raises ConfigError for a plan that graphs cannot carry out, ExportError without onnxruntime or for another file.
    """
    if plan.jacobian_penalty:
        raise ConfigError(
            f"train.jacobian_penalty is {plan.jacobian_penalty:g}, and training graphs have no such term; "
            'set it to 0 in the federation, or backend = "torch" on this device'
        )
    if plan.unrolled:
        raise ConfigError(
            f"train.unrolled is {plan.unrolled}, and training graphs keep one evaluation; "
            'set it to 0 in the federation, or backend = "torch" on this device'
        )
    from fedeq_edge.onnx.backend import OnnxBackend  # noqa: PLC0415  # onnxruntime, where it is the chosen backend

    return OnnxBackend(graph, plan)


def dedicate_process(name: BackendName) -> None:
    """This process trains and nothing else: torch counts denormal numbers, which take it a hundred times as long, as 0.

    Other code of a process would find its arithmetic changed, so a backend does not do this by itself.
    """
    if name == "torch":
        with contextlib.suppress(ImportError):  # said when it is opened
            import torch  # noqa: PLC0415  # as in `open_torch`

            torch.set_flush_denormal(True)


@contextlib.contextmanager
def dedicated(name: BackendName) -> Iterator[None]:
    """This process trains for a while, with the arithmetic of one that does nothing else (`dedicate_process`)."""
    dedicate_process(name)
    try:
        yield
    finally:
        if name == "torch":
            with contextlib.suppress(ImportError):
                import torch  # noqa: PLC0415  # as in `open_torch`

                torch.set_flush_denormal(False)


def build_graph(spec: ModelSpec) -> bytes:
    """The training graph of this model; no torch is needed. Raises ExportError where onnx is not installed."""
    try:
        from fedeq_edge.onnx.training import build_training  # noqa: PLC0415  # onnx, where a graph is made
    except ImportError as error:
        raise ExportError("onnx is not installed; run pip install 'fedeq-edge[onnx]'") from error
    return build_training(spec)

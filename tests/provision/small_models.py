"""Models as a device writes them, small; no torch."""

from pathlib import Path

from msgspec import to_builtins

from fedeq_edge import modelfile
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.training.step import Budget

SPEC = ModelSpec(input_shape=(6,), classes=2, channels=8)


def personal(path: Path, seed: int = 0) -> Path:
    """`path` (.fedeq) is a model as it begins with this seed."""
    theta, head = initial(SPEC, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    modelfile.write(
        path, modelfile.ModelFile(model=to_builtins(SPEC), theta=theta, head=head, budget=Budget(forward=6, adjoint=2))
    )
    return path

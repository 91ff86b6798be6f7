"""One way to ask a trained model, numpy arrays in and out, whichever library computes. Plain iteration (Picard)."""

import numpy as np
import torch
from numpy.typing import NDArray

from fedeq_edge.deq.method import Picard
from fedeq_edge.deq.model import DEQ
from fedeq_edge.deq.numeric import Inference
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import DataError


class TorchEngine:
    """Every kind of model, by torch on the CPU; the same interface as `numeric.NumpyDEQ`.

    From its making on, torch computes on one thread in this process: models of our size gain nothing from a second.
    compiled: the cell goes through torch.compile, on its first answer; that takes a C++ compiler and many seconds.
    """

    def __init__(
        self, spec: ModelSpec, theta: NDArray[np.float32], head: NDArray[np.float32], *, compiled: bool = False
    ) -> None:
        torch.set_num_threads(1)
        self._model = DEQ(spec)
        self._model.load(theta, head)
        if compiled:
            # The solver decides on the host, so the loop around the cell stays in Python. Compiled once.
            self._model.cell.__dict__["step"] = torch.compile(self._model.cell.step, dynamic=True)

    def infer(self, x: NDArray[np.float32], *, budget: int, tol: float | None = None) -> Inference:
        """Answers for x (B, *input_shape) with at most `budget` evaluations per sample; tol None spends all of them.

        Raises DataError for another shape.
        """
        expected = self._model.spec.input_shape
        if x.shape[1:] != expected:
            raise DataError(f"infer: x has shape {x.shape}, expected (batch, {', '.join(map(str, expected))})")
        # Samples stop where the exported loop stops them; without a tolerance the last residual alone is of interest.
        solver = Picard(check_every=budget if tol is None else 1)
        with torch.no_grad():
            found = self._model.solve(torch.from_numpy(x), budget=budget, tol=tol, solver=solver)
            logits = self._model.head(self._model.features(found.value))
        return Inference(logits=logits.numpy(), evaluations=found.evaluations.numpy(), residual=found.residual.numpy())

"""An exported model behind the interface of `deq/engine.py`, so that libraries can be compared."""

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.deq.numeric import Inference
from fedeq_edge.onnx.runtime import Predictor


class OnnxEngine:
    """A model file, by onnxruntime on one thread."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def infer(self, x: NDArray[np.float32], *, budget: int, tol: float | None = None) -> Inference:
        """Answers for x (B, *input_shape) with at most `budget` evaluations per sample; tol None spends all of them.

        Raises DataError for another shape, ConfigError for a budget that an unrolled file does not have.
        """
        found = self._predictor.infer(x, budget=budget, tol=tol or 0.0)
        return Inference(logits=found.logits, evaluations=found.iterations, residual=found.residual)

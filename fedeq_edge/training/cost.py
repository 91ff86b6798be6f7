"""What a training step of a model costs on this machine, without anybody's data."""

import numpy as np
import torch

from fedeq_edge.consensus.methods import METHODS
from fedeq_edge.data.npz import ClientData
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.training.step import Calibration, Plan
from fedeq_edge.training.torch_step import TorchLearner


def calibrate_model(spec: ModelSpec, plan: Plan) -> Calibration:
    """The measured cost of one batch, on samples made of noise: the arithmetic does not depend on what they show."""
    torch.set_num_threads(1)  # as the trainer does
    rng = np.random.default_rng(0)
    x = rng.standard_normal((plan.batch, *spec.input_shape), dtype=np.float32)
    y = rng.integers(0, spec.classes, plan.batch)
    data = ClientData(x_train=x, y_train=y, x_test=x[:0], y_test=y[:0])
    return TorchLearner(spec, data, plan, METHODS["admm"], start=initial(spec, 0)).calibrate()

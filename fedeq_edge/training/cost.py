"""What a training step of a model costs on this machine, without anybody's data."""

import numpy as np

from fedeq_edge.consensus.methods import METHODS
from fedeq_edge.data.npz import ClientData
from fedeq_edge.deq.initial import start
from fedeq_edge.training.backend import Backend
from fedeq_edge.training.learner import Learner
from fedeq_edge.training.step import Calibration, Plan


def calibrate_model(backend: Backend, plan: Plan) -> Calibration:
    """The measured cost of one batch, on samples made of noise: the arithmetic does not depend on what they show."""
    described, rng = backend.description, np.random.default_rng(0)
    x = rng.standard_normal((plan.batch, *described.input_shape), dtype=np.float32)
    y = rng.integers(0, described.classes, plan.batch)
    data = ClientData(x_train=x, y_train=y, x_test=x[:0], y_test=y[:0])
    return Learner(backend, data, plan, METHODS["admm"], start=start(described, 0)).calibrate()

"""The start of a federation: parameters drawn from a seed by numpy, so that a gateway without torch can make them."""

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.consensus.constraint import project
from fedeq_edge.deq.layout import Layout, Slot, constraints, head_layout, size, theta_layout
from fedeq_edge.deq.spec import ModelSpec

# Published: N(0, 0.01^2) with softplus (algorithm.md section 1). The compact ReLU block starts at 0.05.
RESIDUAL_DEVIATION = {"softplus": 0.01, "relu": 0.05}
# Half of the usual 1/sqrt(fan_in): a dense W then starts near |W|_2 = 1 and its symmetric part near 0.7, so that
# projection only trims it.
WELL_POSED_GAIN = 0.5


def initial(spec: ModelSpec, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(theta (p,), head (h,)): the same numbers for the same spec and seed, theta inside its constraint set.

    Weights ~ N(0, 1 / fan_in), W of a contractive or monotone cell half as wide and then projected, residual
    convolutions as published, GroupNorm scales 1, biases 0.
    """
    generator = np.random.default_rng(seed)
    theta = _draw(spec, theta_layout(spec), generator)
    project(theta, constraints(spec))
    return theta, _draw(spec, head_layout(spec), generator)


def _draw(spec: ModelSpec, layout: Layout, generator: np.random.Generator) -> NDArray[np.float32]:
    vector = np.zeros(size(layout), dtype=np.float32)
    for slot in layout:
        if ".norm" in slot.name:
            slot.view(vector)[:] = 1.0 if slot.name.endswith("weight") else 0.0
        elif slot.name.endswith("weight"):
            slot.view(vector)[:] = generator.standard_normal(slot.shape) * _deviation(spec, slot)
    return vector


def _deviation(spec: ModelSpec, slot: Slot) -> float:
    fan_in = slot.size // slot.shape[0]
    if slot.name == "cell.weight":
        return WELL_POSED_GAIN / float(np.sqrt(fan_in))
    if slot.name.startswith("cell."):
        return RESIDUAL_DEVIATION[spec.activation]
    return 1.0 / float(np.sqrt(fan_in))

"""The start of a federation: parameters drawn from a seed by numpy, so that a gateway without torch can make them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.consensus.constraint import project
from fedeq_edge.deq.description import Description, Parameter, describe
from fedeq_edge.deq.layout import Layout, size
from fedeq_edge.deq.spec import ModelSpec


def initial(spec: ModelSpec, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(theta (p,), head (h,)): the same numbers for the same spec and seed, theta inside its constraint set.

    Weights ~ N(0, 1 / fan_in), W of a contractive or monotone cell half as wide and then projected, residual
    convolutions as published, GroupNorm scales 1, biases 0.
    """
    return start(describe(spec), seed)


def start(description: Description, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(theta (p,), head (h,)) as the description has them begin; theta inside its constraint set."""
    generator = np.random.default_rng(seed)
    theta = _draw(description.theta, description.theta_layout, generator)
    project(theta, description.constraints)
    return theta, _draw(description.head, description.head_layout, generator)


def _draw(parameters: Sequence[Parameter], layout: Layout, generator: np.random.Generator) -> NDArray[np.float32]:
    vector = np.zeros(size(layout), dtype=np.float32)
    for parameter, slot in zip(parameters, layout, strict=True):
        if parameter.deviation:
            slot.view(vector)[:] = generator.standard_normal(slot.shape) * parameter.deviation
        else:
            slot.view(vector)[:] = parameter.start
    return vector

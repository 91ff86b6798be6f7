"""Small models of every kind, and batches for them, shared by the tests of the equilibrium core."""

import pytest
import torch

from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.model import DEQ
from fedeq_edge.deq.spec import ModelSpec

SPECS = {
    "dense": ModelSpec(input_shape=(12,), classes=3, channels=10),
    "sequence": ModelSpec(input_shape=(2, 16), classes=3, channels=6, stem_kernel=4, stem_stride=2, pool=2),
    "image": ModelSpec(input_shape=(1, 8, 8), classes=4, channels=6, pool=2, shift=(0.5,), scale=(0.25,)),
    "two stages": ModelSpec(
        input_shape=(1, 12, 10), classes=4, channels=8, groups=4, stem_kernel=5, stem_stride=2, stem_width=4, pool=2
    ),
    "spectral": ModelSpec(input_shape=(12,), classes=3, channels=10, norm="spectral"),
    "spectral image": ModelSpec(input_shape=(1, 6, 7), classes=3, channels=4, norm="spectral", radius=0.8, pool=2),
    "monotone": ModelSpec(input_shape=(12,), classes=3, cell="monotone", channels=10, radius=0.7),
    "free": ModelSpec(input_shape=(12,), classes=3, channels=10, radius=None),
    "residual sequence": ModelSpec(
        input_shape=(2, 16), classes=3, cell="residual", channels=8, inner_channels=12, groups=4, pool=2
    ),
    "damped sequence": ModelSpec(input_shape=(2, 16), classes=3, cell="residual", damping=0.9, channels=8, groups=4),
    "residual image": ModelSpec(
        input_shape=(1, 8, 8), classes=4, cell="residual", activation="softplus", channels=8, groups=2, pool=2
    ),
}


@pytest.fixture(params=list(SPECS.values()), ids=list(SPECS))
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    """One of every kind of model."""
    chosen: ModelSpec = request.param
    return chosen


@pytest.fixture
def model(spec: ModelSpec) -> DEQ:
    """That model in float64, at its start."""
    built = DEQ(spec, dtype=torch.float64)
    built.load(*initial(spec, 3))
    return built


@pytest.fixture
def batch(spec: ModelSpec) -> torch.Tensor:
    """Five samples for it, float64."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(5, *spec.input_shape, generator=generator, dtype=torch.float64)

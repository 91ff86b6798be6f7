"""The specification of a model: derived shapes, and refusals that name what, where and the remedy."""

import subprocess
import sys
from typing import Any

import msgspec
import pytest

from fedeq_edge.deq.spec import ModelSpec, published
from fedeq_edge.errors import ConfigError


def test_the_stem_of_the_activity_model_turns_128_samples_into_32_states() -> None:
    spec = ModelSpec(input_shape=(9, 128), classes=6, stem_kernel=12, stem_stride=4)
    assert spec.state_shape == (32, 32)
    assert spec.features == 32


def test_the_two_stage_stem_of_the_digit_writers_model_gives_7_by_7_and_a_2_by_2_grid() -> None:
    spec = ModelSpec(input_shape=(1, 28, 28), classes=10, stem_kernel=5, stem_stride=2, stem_width=16, pool=2)
    assert spec.state_shape == (32, 7, 7)
    assert spec.pool_windows == ((4, 3), (4, 3))
    assert spec.features == 128
    assert spec.norm_groups(16) == 4


@pytest.mark.parametrize(("length", "grid"), [(7, 2), (8, 2), (7, 3), (14, 4), (5, 5), (9, 1)])
def test_the_pooling_windows_cover_the_state_exactly(length: int, grid: int) -> None:
    spec = ModelSpec(input_shape=(2, length), classes=2, stem_kernel=3, pool=grid)
    ((kernel, stride),) = spec.pool_windows
    assert (grid - 1) * stride + kernel == length
    assert stride <= kernel


def test_the_published_medium_block_has_the_published_number_of_convolution_weights() -> None:
    spec = published((3, 32, 32), 100, "M")
    assert (spec.channels, spec.inner, spec.activation) == (128, 256, "softplus")
    assert spec.state_shape == (128, 32, 32)


def test_a_spec_survives_the_wire_and_refuses_unknown_fields() -> None:
    spec = ModelSpec(input_shape=(1, 8, 8), classes=10, shift=(0.5,), scale=(0.25,))
    assert msgspec.json.decode(msgspec.json.encode(spec), type=ModelSpec) == spec
    with pytest.raises(msgspec.ValidationError, match="chanels"):
        msgspec.json.decode(b'{"input_shape": [4], "classes": 2, "chanels": 8}', type=ModelSpec)


def test_a_spec_written_before_there_were_norms_monotone_and_damped_cells_means_what_it_meant() -> None:
    old = b'{"input_shape":[9,128],"classes":6,"cell":"contractive","channels":32,"radius":0.9,"stem_kernel":12}'
    spec = msgspec.json.decode(old, type=ModelSpec)
    assert (spec.cell, spec.norm, spec.radius, spec.damping) == ("contractive", "max", 0.9, 1.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_shape": (1, 2, 3, 4)}, "shape of one sample"),
        ({"input_shape": ()}, "shape of one sample"),
        ({"classes": 1}, "at least 2"),
        ({"input_shape": (1, 8), "cell": "residual", "damping": 0.0}, "damping is 0.0; choose 0 < damping <= 1"),
        ({"input_shape": (1, 8), "cell": "residual", "damping": 1.5}, "damping is 1.5; choose 0 < damping <= 1"),
        ({"input_shape": (1, 8), "cell": "residual", "damping": float("nan")}, "damping is nan"),
        ({"damping": 0.5}, r'damping = 0.5 belongs to cell = "residual"'),
        ({"channels": 0}, "channels is 0"),
        ({"stem_stride": 0}, "stem_stride is 0"),
        ({"inner_channels": -1}, "inner_channels is -1"),
        ({"input_shape": (64,), "cell": "residual"}, r'use cell = "contractive"'),
        ({"input_shape": (64,), "pool": 2}, "remove them"),
        ({"input_shape": (64,), "stem_width": 4}, "remove them"),
        ({"cell": "residual", "channels": 20}, "not divisible by groups = 8"),
        ({"cell": "residual", "channels": 32, "inner_channels": 34}, "inner_channels = 34"),
        ({"stem_width": 6}, "stem_width = 6 is not a multiple of the 4"),
        ({"radius": 1.0}, "0 < radius < 1"),
        ({"radius": 0.0}, "0 < radius < 1"),
        ({"radius": float("nan")}, "0 < radius < 1"),
        ({"cell": "monotone"}, r"flatten the samples to \(64,\)"),
        ({"cell": "monotone", "input_shape": (64,), "radius": None}, "monotone cell needs a radius"),
        ({"cell": "residual", "norm": "spectral"}, 'belongs to cell = "contractive"'),
        ({"cell": "monotone", "input_shape": (64,), "norm": "spectral"}, 'belongs to cell = "contractive"'),
        ({"shift": (0.1, 0.2)}, "shift has 2 values"),
        ({"scale": (0.0,)}, "above 0"),
        ({"stem_stride": 8, "pool": 2}, "pooling grid of 2"),
        ({"input_shape": (1, 2, 2), "stem_stride": 8}, "lower stem_stride, stem_kernel or pool"),
    ],
)
def test_a_spec_that_cannot_be_built_is_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {"input_shape": (1, 8, 8), "classes": 10}
    with pytest.raises(ConfigError, match=message) as refusal:
        ModelSpec(**(usual | fields))
    assert "\n" not in str(refusal.value)


def test_specs_layouts_starts_and_certificates_need_no_torch() -> None:
    program = (
        "import sys, fedeq_edge.deq.spec, fedeq_edge.deq.layout, fedeq_edge.deq.initial, fedeq_edge.deq.wellposed;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

import subprocess
import sys

import pytest

from fedeq_edge.deq.layout import head_layout, size, theta_layout
from fedeq_edge.errors import ConfigError
from fedeq_edge.training.recommend import recommend


@pytest.mark.parametrize(
    "shape", [(4,), (207,), (1, 8), (9, 128), (6, 1000), (1, 8, 8), (1, 28, 28), (3, 32, 32), (1, 4, 4), (3, 64, 48)]
)
def test_every_kind_of_data_gets_a_model_that_can_be_built(shape: tuple[int, ...]) -> None:
    spec, plan, _ = recommend(shape, 10)
    assert spec.input_shape == shape
    assert size(theta_layout(spec)) > 0
    assert size(head_layout(spec)) == 10 * (spec.features + 1)
    assert plan.rounds >= 1


def test_a_long_sequence_is_shortened_to_what_a_small_board_can_iterate_on() -> None:
    spec, _, _ = recommend((6, 1000), 4)
    assert 24 <= spec.state_shape[1] <= 48


def test_the_normalisation_of_the_fleet_goes_into_the_model() -> None:
    spec, _, _ = recommend((2, 64), 3, shift=(0.5, 1.0), scale=(2.0, 3.0))
    assert (spec.shift, spec.scale) == ((0.5, 1.0), (2.0, 3.0))


def test_samples_of_four_dimensions_are_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="reshape"):
        recommend((1, 2, 3, 4), 3)


def test_a_gateway_without_torch_can_ask() -> None:
    script = """
import sys
from fedeq_edge.training.recommend import recommend
recommend((4,), 2)
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)

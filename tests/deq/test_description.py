"""A model without its formula: what it says is what the spec says, and what nobody could train is refused."""

from typing import Any

import msgspec
import numpy as np
import pytest

from fedeq_edge.deq.description import Description, describe
from fedeq_edge.deq.initial import initial, start
from fedeq_edge.deq.layout import constraints, head_layout, theta_layout
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.deq.wellposed import proven, rate
from fedeq_edge.errors import ConfigError

DENSE = msgspec.to_builtins(describe(ModelSpec(input_shape=(5,), classes=3, channels=4)))
SPECTRAL = msgspec.to_builtins(describe(ModelSpec(input_shape=(2, 9), classes=3, channels=4, norm="spectral")))


def travelled(description: Description) -> Description:
    return msgspec.json.decode(msgspec.json.encode(description), type=Description)


def test_a_description_that_has_travelled_says_what_the_spec_says(spec: ModelSpec) -> None:
    described = travelled(describe(spec))
    theta, head = start(described, 3)
    assert described == describe(spec)
    assert (described.theta_layout, described.head_layout) == (theta_layout(spec), head_layout(spec))
    assert (described.input_shape, described.classes, described.features) == (
        spec.input_shape,
        spec.classes,
        spec.features,
    )
    assert described.constraints == constraints(spec)
    assert proven(theta, described) == rate(theta, spec)
    assert all(map(np.array_equal, (theta, head), initial(spec, 3)))


def test_a_proof_of_a_kind_unknown_here_proves_nothing_and_stops_nobody() -> None:
    described = msgspec.convert({**DENSE, "proof": {"kind": "by-lmi", "parameter": "cell.gate"}}, Description)
    theta, _ = start(described, 0)
    assert proven(theta, described) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"theta": [*DENSE["theta"], {"name": "head.bias", "shape": [2]}]}, "two parameters are called 'head.bias'"),
        ({"theta": [*DENSE["theta"], {"name": "cell.huge", "shape": [2**13, 2**13]}]}, "use a smaller model"),
        ({"input_shape": [2**10, 2**10, 2**10]}, "use a smaller model"),
        ({"head": [DENSE["head"][0], {"name": "head.bias", "shape": [4]}]}, "no linear layer"),
        ({"head": [{"name": "w", "shape": [1, 4]}, {"name": "b", "shape": [1]}]}, "at least 2 classes"),
        ({"bounds": [{"kind": "rows", "parameter": "cell.none", "radius": 0.5}]}, "'cell.none' has shape"),
        ({"bounds": [{"kind": "monotone", "parameter": "stem.map.weight", "radius": 0.5}]}, "monotone needs a layer"),
        ({"bounds": [{"kind": "rows", "parameter": "cell.weight", "radius": 0.0}]}, "radius > 0"),
        ({"proof": {"kind": "spectral", "parameter": "stem.map.bias"}}, "spectral needs a layer"),
        ({"step_size": "stem.map.weight"}, "monotone needs a layer"),
    ],
)
def test_what_nobody_could_train_is_refused_in_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        msgspec.convert({**DENSE, **fields}, Description)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lengths", [[], [9, 9], [2**23]])
def test_states_that_a_layer_does_not_take_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ConfigError, match="states of"):
        msgspec.convert({**SPECTRAL, "proof": {**SPECTRAL["proof"], "lengths": lengths}}, Description)


@pytest.mark.parametrize(
    "parameter",
    [
        {"name": "", "shape": [1]},
        {"name": "a" * 101, "shape": [1]},
        {"name": "a", "shape": []},
        {"name": "a", "shape": [0]},
        {"name": "a", "shape": [1] * 6},
        {"name": "a", "shape": [1], "deviation": -1.0},
        {"name": "a", "shape": [1], "start": 1e30},
    ],
)
def test_a_parameter_out_of_range_is_refused(parameter: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**DENSE, "theta": [*DENSE["theta"], parameter]}, Description)

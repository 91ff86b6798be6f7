import pytest
from msgspec.structs import replace

from fedeq_edge.deq.budget import LARGEST_BUDGET
from fedeq_edge.errors import ConfigError
from fedeq_edge.training.step import Plan


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rounds", 0),
        ("epochs", 0),
        ("batch", 0),
        ("learning_rate", -1.0),
        ("clip", 0.0),
        ("compute_s", float("inf")),
        ("momentum", 1.0),
        ("budgets", ()),
        ("budgets", (0, 4)),
        ("budgets", (LARGEST_BUDGET + 1,)),
        ("refit_steps", -1),
        ("unrolled", -1),
        ("alone_rounds", 0),
        ("jacobian_penalty", -0.1),
        ("jacobian_penalty", float("nan")),
        ("jacobian_penalty", float("inf")),
        ("weight_decay", float("nan")),
        ("refit_pull", -0.1),
        ("energy_j", 0.0),
        ("energy_j", float("inf")),
        ("accuracy", -1e-3),
        ("accuracy", float("nan")),
    ],
)
def test_a_plan_that_no_device_could_carry_out_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(Plan(), **{field: value})

import pytest
from msgspec.structs import replace

from fedeq_edge.deq.budget import LARGEST_BUDGET
from fedeq_edge.deq.spec import ModelSpec, published
from fedeq_edge.errors import ConfigError
from fedeq_edge.training.recommend import recommend
from fedeq_edge.training.step import Plan

IMAGE = (3, 32, 32)


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
        ("microbatch", -1),
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


@pytest.mark.parametrize(
    ("spec", "unrolled", "most"),
    [
        (published(IMAGE, 10, "M"), 0, 4),  # 256 channels of 32 x 32 are a MiB a sample
        (published(IMAGE, 10, "S"), 0, 8),
        (published(IMAGE, 10, "S"), 3, 2),  # each of the evaluations is kept
        # no more than K = 12 are there
        (ModelSpec(input_shape=IMAGE, classes=10, cell="residual", channels=8), 100, 10),
        (published((3, 256, 256), 10, "M"), 0, 1),  # less than one sample is none
        (ModelSpec(input_shape=(3, 64, 64), classes=10, cell="residual", stem_width=64, stem_stride=2), 0, 16),
        (recommend(IMAGE, 10)[0], 0, 0),
    ],
    ids=["M", "S", "unrolled", "exact", "large", "stem", "recommended"],
)
def test_a_large_model_is_differentiated_a_few_samples_at_a_time(spec: ModelSpec, unrolled: int, most: int) -> None:
    plan = Plan(batch=32, unrolled=unrolled)
    assert plan.for_model(spec).microbatch == most
    assert replace(plan, microbatch=0).for_model(spec).microbatch == 0

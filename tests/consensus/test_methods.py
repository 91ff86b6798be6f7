import msgspec
import pytest

from fedeq_edge.consensus.methods import METHODS, Method, method
from fedeq_edge.errors import ConfigError


def test_the_comparison_holds_every_method_of_the_design() -> None:
    assert set(METHODS) == {
        "admm",
        "local",
        "fedavg",
        "fedprox",
        "fedper",
        "fedrep",
        "ditto",
        "fedavg-finetune",
        "knn-per",
        "fedavg-momentum",
        "fedper-momentum",
        "admm-sums",
        "fedeq-published",
        "quality-average",
    }


def test_an_unknown_method_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match="no method 'fedavgg', nearest is 'fedavg'"):
        method("fedavgg")


def test_only_ours_adds_the_duals_at_the_server_and_only_local_exchanges_nothing() -> None:
    assert [name for name, preset in METHODS.items() if preset.server == "fresh"] == ["admm"]
    assert [name for name, preset in METHODS.items() if preset.keeps_duals] == ["admm", "admm-sums"]
    assert [name for name, preset in METHODS.items() if not preset.exchange] == ["local"]


def test_only_fedrep_and_the_published_fedeq_fit_the_head_before_the_body() -> None:
    assert [name for name, preset in METHODS.items() if preset.head_step == "refit"] == ["fedrep", "fedeq-published"]


def test_a_method_travels_and_an_unknown_field_is_refused() -> None:
    preset = method("ditto")
    assert msgspec.json.decode(msgspec.json.encode(preset), type=Method) == preset
    with pytest.raises(msgspec.ValidationError, match="kapa"):
        msgspec.json.decode(b'{"name": "admm", "kapa": 1.0}', type=Method)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rho": 0.0}, "rho is 0.0"),
        ({"rho": float("nan")}, "rho is nan"),
        ({"r0": float("inf")}, "r0 is inf"),
        ({"ditto": -1.0}, "ditto is -1.0"),
        ({"blend": 1.5}, "blend is 1.5"),
        ({"quality_until": -0.1}, "quality_until is -0.1"),
        ({"duals": False}, "needs duals and proximal"),
        ({"trim": 0.5}, "trim is 0.5"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"norm_limit": 1.0}, "norm_limit is 1.0"),
        ({"min_cosine": -1.0}, "min_cosine is -1.0"),
        ({"robust": "median"}, 'set server = "mean", or robust = "clip"'),
        ({"robust": "trimmed"}, 'set server = "mean", or robust = "clip"'),
        ({"server": "sums", "duals": False}, 'server = "sums" adds .* needs duals and proximal'),
        ({"server": "mean", "server_momentum": 1.0}, "server_momentum is 1.0"),
        ({"server_momentum": 0.5}, 'set server = "mean", or server_momentum = 0'),
        ({"finetune_epochs": -1}, "finetune_epochs is -1"),
        ({"finetune_epochs": 1, "finetune_rate": 0.0}, "finetune_rate is 0.0"),
        ({"neighbours": -3}, "neighbours is -3"),
        ({"neighbour_scale": 0.0}, "neighbour_scale is 0.0"),
        ({"ditto": 0.1, "neighbours": 5}, "ditto and neighbours each make a personal model"),
        ({"server": "mean", "exchange": False, "finetune_epochs": 1}, "exchange = false .* leave out finetune_epochs"),
    ],
)
def test_a_setting_out_of_range_is_named(change: dict[str, float | str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        msgspec.structs.replace(method("admm"), **change)


def test_quality_is_frozen_late_and_never_moves_under_the_uniform_rule() -> None:
    assert [method("admm").quality_moves(done, 10) for done in (0, 7, 8, 9)] == [True, True, False, False]
    assert not method("fedavg").quality_moves(0, 10)

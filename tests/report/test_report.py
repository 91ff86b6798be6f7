"""The demo's report: one safe, self-contained page that tells what happened, however little of it is known."""

import builtins
import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from types import ModuleType
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedeq_edge.errors import ConfigError
from fedeq_edge.report import axes, numbers
from fedeq_edge.report.page import render

VOID = {"meta", "br", "img", "link", "input", "hr"}


def device(name: str, *, alone: float | None = 0.95, personal: float | None = 0.97, **changes: Any) -> dict[str, Any]:
    facts = {
        "id": name,
        "profile": "raspberry-pi-4",
        "emulated": True,
        "samples": 60,
        "budget": {"forward": 6, "adjoint": 2},
        "residual_mean": 0.0123,
        "certificate": {"norm": "max", "gamma": 0.9, "evaluations": 6, "bound": 0.478, "unit": "state"},
        "seconds_per_round": 2.5,
        "rss_idle_bytes": 38_200_000,
        "rss_peak_bytes": 231_000_000,
        "accuracy": {"personal": personal, "consensus": 0.96, "local_only": alone},
        "onnx": {"path": f"models/{name}.onnx", "max_abs_diff": 2.1e-6, "iterations": 7.25, "latency_ms": 0.31},
    }
    return facts | changes


def summary(devices: Sequence[Mapping[str, Any]], **changes: Any) -> dict[str, Any]:
    facts = {
        "version": "0.1.0",
        "command": "fedeq demo --devices 6",
        "data": {
            "name": "digits",
            "clients": len(devices),
            "classes": 10,
            "train_samples": 360,
            "test_samples": 1437,
            "input_shape": [1, 8, 8],
        },
        "model": {
            "cell": "residual",
            "channels": 32,
            "theta_parameters": 21_216,
            "head_parameters": 1_290,
            "groups": 8,
        },
        "method": "admm",
        "codec": "int8",
        "heads": "personal",
        "rounds": 3,
        "wall_s": 61.2,
        "seconds": {"start": 6.0, "rounds": 44.0},
        "broker": {"kind": "mosquitto", "version": "2.0.18"},
        "accuracy": {"personal": 0.975, "consensus": 0.96, "local_only": 0.951, "worst_five_personal": 0.9},
        "errors_saved": 0.49,
        "bytes_per_client_round": {
            "up": 22_000,
            "down": 23_012.5,
            "float32_full_model": {"up": 90_024, "down": 90_024},
        },
        "aggregator": {"rss_peak_bytes": 71_000_000, "cpu_s": 2.31},
        "devices": list(devices),
    }
    return facts | changes


def line(number: int, accuracies: Mapping[str, float | None], **changes: Any) -> dict[str, Any]:
    facts = {
        "kind": "round",
        "round": number,
        "cohort": len(accuracies),
        "contributed": sorted(accuracies),
        "late": [],
        "declined": {},
        "extensions": 0,
        "seconds": 2.5,
        "primal_residual": 3.0 / number,
        "dual_residual": 0.3 / number,
        "step": 1.0,
        "correction": 0.1,
        "devices": {name: {"accuracy": value, "reduced": False, "loss": 0.1} for name, value in accuracies.items()},
    }
    return facts | changes


def fleet(size: int) -> list[dict[str, Any]]:
    return [device(f"device-{i}", alone=0.9 + 0.002 * i, personal=0.93) for i in range(size)]


def rounds_of(devices: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    return [line(t, {facts["id"]: min(1.0, 0.3 + 0.1 * t) for facts in devices}) for t in range(1, count + 1)]


def text(page: str) -> str:
    """What a reader reads: words without markup, white space (that between number and unit too) as one blank."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


class Balance(HTMLParser):
    """Fails where a tag is closed that is not the one open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"


@pytest.mark.parametrize("size", [1, 6, 30])
@pytest.mark.parametrize("count", [0, 1, 15])
def test_a_page_is_well_formed_and_draws_inside_its_plots_for_any_fleet(size: int, count: int) -> None:
    devices = fleet(size)
    page = render(summary(devices), rounds_of(devices, count))
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    positions = [float(value) for value in re.findall(r"(?:left|bottom|width):(-?[\d.e-]+)%", page)]
    assert all(0 <= position <= 100 for position in positions)
    assert page.count("models/device-") == size


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    devices = fleet(6)
    page = render(summary(devices), rounds_of(devices, 5))
    assert not re.search(r"(?i)<script|<link|<img|<iframe|@import|url\(|\bsrc=|\bhref=|https?:|\bon\w+=", page)


def test_names_and_reasons_from_other_machines_are_escaped() -> None:
    evil = '<script>alert("x")</script>'
    history = [line(1, {evil: 0.5}, declined={evil: '"><img src=x onerror=y>'})]
    page = render(summary([device(evil, profile="</td>" + evil)], command=f"fedeq demo --data '{evil}'"), history)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in page


def test_the_headline_says_how_many_how_long_and_how_well() -> None:
    words = text(render(summary(fleet(6)), []))
    assert "6 devices learned together for 3 rounds and now answer 97.5 % of their own test samples" in words
    assert "trained alone: 95.1 %" in words
    assert "removed 49.0 % of the errors" in words


def test_a_federation_that_did_harm_is_said_to_have_done_so() -> None:
    words = text(render(summary(fleet(6), errors_saved=-0.125), []))
    assert "did not pay here" in words
    assert "12.5 % more errors" in words
    assert "removed" not in words


def test_emulated_boards_are_labelled_and_real_ones_are_not() -> None:
    mixed = [device("a", emulated=True), device("b", emulated=False)]
    assert "1 of 2 boards are emulated." in text(render(summary(mixed), []))
    assert "emulated" not in text(render(summary([device("b", emulated=False)]), []))


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_unknown_numbers_are_dashes_and_never_zeros_or_nan(unknown: float | None) -> None:
    nobody = device(
        "device-0",
        samples=None,
        residual_mean=unknown,
        seconds_per_round=unknown,
        rss_idle_bytes=unknown,
        rss_peak_bytes=unknown,
        accuracy={"personal": unknown, "consensus": unknown, "local_only": unknown},
        onnx=None,
    )
    facts = summary(
        [nobody],
        accuracy={"personal": unknown, "consensus": unknown, "local_only": unknown, "worst_five_personal": unknown},
        errors_saved=unknown,
        wall_s=unknown,
        bytes_per_client_round={"up": unknown, "down": unknown, "float32_full_model": {"up": unknown, "down": unknown}},
        aggregator={"rss_peak_bytes": unknown, "cpu_s": unknown},
    )
    history = [line(1, {"device-0": unknown}, primal_residual=unknown, dual_residual=unknown, seconds=unknown)]
    words = text(render(facts, history))
    assert "No device trained alone for comparison." in words
    assert "No round reported an accuracy." in words
    assert "No round reported a residual." in words
    assert "not exported" in words
    assert not re.search(r"\b(nan|None|inf)\b", words)
    assert numbers.UNKNOWN in words


def test_who_gained_is_counted_and_sorted_with_the_largest_gain_first() -> None:
    devices = [
        device("lost", alone=0.96, personal=0.94),
        device("tied", alone=0.9, personal=0.9),
        device("gained", alone=0.9, personal=0.95),
        device("unknown", alone=None),
    ]
    page = render(summary(devices), [])
    words = text(page)
    assert "1 device gained, 1 tied, 1 lost; 1 cannot be compared." in words
    part = words[words.index("1 device gained") : words.index("Memory idle")]
    order = [part.index(f"{name} 9") for name in ("gained", "tied", "lost")]
    assert order == sorted(order)
    assert {"+5.0", "0.0", "−2.0"} <= set(part.split())


def test_bytes_are_set_against_the_whole_model_as_float32() -> None:
    words = text(render(summary(fleet(6)), []))
    assert "45.0 kB in both directions, 4 times less" in words
    assert "(180 kB)" in words
    assert "22,506 parameters of 4 bytes" in words


def test_a_personal_head_is_said_to_stay_and_a_consensus_head_to_travel() -> None:
    personal = text(render(summary(fleet(1), heads="personal"), []))
    consensus = text(render(summary(fleet(1), heads="consensus_refit"), []))
    assert "The head (1,290 parameters), in every round and at the end." in personal
    assert "whole model, equilibrium part and head (22,506 parameters)" in consensus
    assert "in every round and at the end" not in consensus


def test_what_is_proven_is_told_per_device_and_its_absence_too() -> None:
    mixed = [device("proven"), device("measured", certificate=None)]
    words = text(render(summary(mixed), []))
    assert "proven 0.9 6 0.48 max" in words
    assert "measured – – no proof –" in words
    nobody = text(render(summary([device("measured", certificate=None)]), []))
    assert "No device has a proof: GroupNorm in the loop of the residual cell breaks the argument." in nobody


def test_a_bound_that_scales_with_the_injection_says_so() -> None:
    monotone = {"norm": "rms", "gamma": 0.79, "evaluations": 8, "bound": 0.2, "unit": "injection"}
    assert "0.79 8 0.2 u rms" in text(render(summary([device("a", certificate=monotone)]), []))


def test_declines_late_contributions_and_lowered_budgets_are_told() -> None:
    history = [
        line(1, {"a": 0.5, "b": 0.4}, declined={"b": "battery at 12 %"}, contributed=["a"]),
        line(2, {"a": 0.6, "b": 0.5}, late=["b"], extensions=1),
    ]
    history[1]["devices"]["a"]["reduced"] = True
    words = text(render(summary([device("a"), device("b")]), history))
    assert "3 of 4 contributions asked for were used (1 of them after their round); 1 refusal by a device" in words
    assert "1 time a round had to wait" in words
    assert "battery at 12 %" in words
    assert "lowered its budget in 1 round" in words


def test_lines_of_other_kinds_in_the_history_are_passed_over() -> None:
    history = [line(1, {"a": 0.5}), {"kind": "report", "device": "a", "round": 1}]
    assert text(render(summary([device("a")]), history)).count("1 of 1 contributions") == 1


def test_a_line_stops_where_a_round_has_no_value_and_goes_on_after_it() -> None:
    history = [line(t, {"a": 0.5}, primal_residual=value) for t, value in enumerate([3.0, 2.0, None, 0.0, 1.0], 1)]
    page = render(summary([device("a")]), history)
    drawn = re.findall(r'class="line primal" d="(M[^"]*)"', page)
    assert [path.count("M") for path in drawn if path != "M0 5H32"] == [2]


def test_without_jinja2_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> ModuleType:
        if name == "jinja2":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'fedeq-edge\[demo\]'"):
        render(summary(fleet(1)), [])


def test_a_summary_of_another_shape_is_refused_by_the_name_of_its_field() -> None:
    with pytest.raises(msgspec.ValidationError, match=r"\$\.devices\[0\]\.id"):
        render(summary([device("a", id=7)]), [])


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (numbers.percent(0.9754), "97.5 %"),
        (numbers.percent(1.0), "100.0 %"),
        (numbers.points(0.0241), "+2.4"),
        (numbers.points(-0.01), "−1.0"),
        (numbers.number(21_500), "21,500"),
        (numbers.significant(0.0123), "0.012"),
        (numbers.significant(3.2e-6), "3.2 × 10⁻⁶"),
        (numbers.significant(1e-5), "10⁻⁵"),
        (numbers.size(45_210_000), "45.2 MB"),
        (numbers.size(999), "999 B"),
        (numbers.duration(0.00031), "0.310 ms"),
        (numbers.duration(61.24), "61.2 s"),
        (numbers.duration(1800), "30 min"),
        (numbers.plural(1, "device"), "1 device"),
        (numbers.plural(1200, "device"), "1,200 devices"),
        (numbers.percent(None), "–"),
    ],
)
def test_numbers_are_written_with_the_digits_that_count(written: str, meant: str) -> None:
    assert written.replace("\N{NO-BREAK SPACE}", " ") == meant


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.lists(st.floats(min_value=1e-12, max_value=1e12), min_size=1, max_size=8))
def test_any_positive_residuals_lie_on_their_axis_and_have_two_labels_at_least(values: list[float]) -> None:
    history = [line(t, {"a": 0.5}, primal_residual=value, dual_residual=None) for t, value in enumerate(values, 1)]
    page = render(summary([device("a")]), history)
    chart = page[page.index("Consensus residuals over rounds") : page.index("<h2>Rounds")]
    assert all(0 <= float(at) <= 100 for at in re.findall(r"bottom:(-?[\d.e-]+)%", chart))
    assert len(re.findall('class="y"', chart)) >= 2


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 200).map(lambda right: right / 200), min_size=1, max_size=8))
def test_any_accuracies_lie_on_their_axis_and_have_two_labels_at_least(values: list[float]) -> None:
    history = [line(t, {"a": value}) for t, value in enumerate(values, 1)]
    page = render(summary([device("a")]), history)
    chart = page[page.index("Accuracy over rounds") : page.index("Consensus residuals over rounds")]
    assert all(0 <= float(at) <= 100 for at in re.findall(r"bottom:(-?[\d.e-]+)%", chart))
    assert 2 <= len(re.findall('class="y"', chart)) <= axes.LOG_TICKS + 1
    labels = [float(label) for label in re.findall(r'class="y"[^>]*>([\d.]+)\s%<', chart)]
    assert labels == sorted(set(labels), reverse=True)
    assert len(labels) == chart.count('class="y"')

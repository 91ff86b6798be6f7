"""Rounds and bytes to an accuracy, read from the lines of a result."""

from pathlib import Path
from typing import Any

from fedeq_edge.simulation.results import Result
from fedeq_edge.simulation.targets import costs


def result(*, target: float | None, final: float | None = 0.8, exchange: bool = True) -> Result:
    """Four rounds of 10 bytes up and 20 down, the first of 100 more, evaluated after the second and the fourth."""
    rounds = [{"kind": "round", "round": n, "bytes_up": 10, "bytes_down": 120 if n == 1 else 20} for n in range(1, 5)]
    seen = [{"kind": "evaluation", "round": 2, "personal": 0.7}, {"kind": "evaluation", "round": 4, "personal": 0.78}]
    header: dict[str, Any] = {
        "kind": "header",
        "experiment": {"evaluation": {"target": target}},
        "method": {"exchange": exchange},
    }
    end = {"kind": "end", "rounds": 4, "personal": final}
    return Result(Path("run.jsonl"), [header, rounds[0], rounds[1], seen[0], rounds[2], rounds[3], seen[1], end])


def test_bytes_to_a_target_are_all_until_the_round_that_was_seen_to_reach_it() -> None:
    assert costs(result(target=0.7))["bytes_to_target"] == 160
    assert costs(result(target=0.75))["bytes_to_target"] == 220


def test_a_target_that_the_last_evaluation_alone_reaches_counts_the_whole_run() -> None:
    assert costs(result(target=0.8))["bytes_to_target"] == 220


def test_a_target_that_is_never_reached_has_no_bytes() -> None:
    assert costs(result(target=0.81))["bytes_to_target"] is None
    assert costs(result(target=None))["bytes_to_target"] is None


def test_a_run_is_asked_for_95_percent_of_its_own_end() -> None:
    found = costs(result(target=None))  # 0.76
    assert (found["rounds_to_own"], found["bytes_to_own"]) == (4, 220)
    found = costs(result(target=None, final=0.73))  # 0.6935
    assert (found["rounds_to_own"], found["bytes_to_own"]) == (2, 160)


def test_a_run_that_ends_without_an_accuracy_has_no_end_of_its_own_to_come_near() -> None:
    assert costs(result(target=0.7, final=None)) == {
        "rounds_to_target": 2,
        "bytes_to_target": 160,
        "rounds_to_own": None,
        "bytes_to_own": None,
    }


def test_a_method_without_exchange_has_neither_rounds_nor_bytes() -> None:
    assert set(costs(result(target=0.7, exchange=False)).values()) == {None}

"""The table that `fedeq simulate` ends with."""

from typing import Any

from rich.console import Console

from fedeq_edge.cli.simulate import _show

NOTHING = {"mean": None, "sd": None}


def variant(**values: float) -> dict[str, Any]:
    keys = ("personal", "consensus", "local", "worst_tenth", "unseen", "bytes_up", "bytes_down", "rounds_to_target")
    return {key: {"mean": values[key], "sd": None} if key in values else NOTHING for key in keys}


def shown(**variants: dict[str, Any]) -> list[str]:
    console = Console(width=80, no_color=True)
    with console.capture() as captured:
        _show(console, {"variants": variants, "missing": []})
    return captured.get().replace("┃", " ").replace("│", " ").splitlines()


def test_a_column_is_there_where_anybody_has_a_value_and_only_there() -> None:
    lines = shown(
        admm=variant(personal=0.9, bytes_up=2e6, rounds_to_target=7.0),
        local=variant(personal=0.8),
    )
    assert lines[1].split() == ["variant", "personal", "up", "target"]
    assert lines[3].split() == ["admm", "0.9000", "2", "7"]
    assert lines[4].split() == ["local", "0.8000", "-", "-"]


def test_a_long_name_stays_in_one_line_where_there_is_room() -> None:
    assert any(line.split()[:1] == ["admm-consensus-head"] for line in shown(**{"admm-consensus-head": variant()}))

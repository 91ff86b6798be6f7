"""The README's commands exist, and every command is in the README."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from fedeq_edge.cli import command_line
from fedeq_edge.simulation.experiment import studies, study_text

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MEASURED = ROOT / "fedeq_edge" / "simulation" / "studies.md"


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """(words after fedeq, command) of every leaf of the command tree."""
    for name, command in getattr(group, "commands", {}).items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


COMMANDS = dict(commands(typer.main.get_command(command_line())))


def shown_lines() -> list[str]:
    """Lines of the README, and of the studies' files, that a user would type."""
    studied = [line for name in studies() for line in study_text(name).splitlines()]
    return [
        command.strip()
        for line in (*README.splitlines(), *studied)
        if re.match(r"( {4}|# )(fedeq|make) ", line)
        for command in line.removeprefix("# ").partition("#")[0].split("&&")
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readme(name: str) -> None:
    assert f"`fedeq {name}`" in README


@pytest.mark.parametrize("line", sorted({line for line in shown_lines() if line.startswith("fedeq")}))
def test_a_shown_command_exists_with_its_options(line: str) -> None:
    words = shlex.split(line)[1:]
    name = next(name for name in COMMANDS if " ".join(words).startswith(name))
    known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:`| {4})make ([a-z-]+)", README))))
def test_a_shown_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_nothing_in_the_readme_waits_to_be_filled_in() -> None:
    assert "<!--" not in README


@pytest.mark.parametrize("document", [ROOT / "README.md", MEASURED], ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    links = set(re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", document.read_text()))
    assert links
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("name", studies())
def test_what_a_study_measured_is_told(name: str) -> None:
    assert f"`{name}`" in MEASURED.read_text()


def test_a_study_that_is_told_of_ships() -> None:
    told = {
        name for line in MEASURED.read_text().splitlines() if line.startswith("## ") for name in line.split("`")[1::2]
    }
    assert told <= set(studies())

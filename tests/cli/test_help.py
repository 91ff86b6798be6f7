"""Every command explains itself."""

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import typer

from fedeq_edge import __version__
from fedeq_edge.cli import command_line

if TYPE_CHECKING:
    from tests.cli.conftest import Fedeq


def _commands(group: typer.Typer, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Names of every command under a Typer application, found as Typer finds them."""
    found = []
    for command in group.registered_commands:
        assert command.callback is not None
        found.append((*path, command.name or command.callback.__name__))
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        assert inner.name is not None
        found += _commands(inner.typer_instance, (*path, inner.name))
    return found


COMMANDS = _commands(command_line())


def test_the_commands_of_the_design_are_there() -> None:
    expected = {
        ("demo",),
        ("agent", "run"),
        ("aggregator", "run"),
        ("aggregator", "status"),
        ("broker", "run"),
        ("data", "inspect"),
        ("device", "list"),
        ("device", "probe"),
        ("model", "bench"),
        ("model", "export"),
        ("model", "infer"),
        ("model", "inspect"),
    }
    assert expected <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_says_what_a_command_does_and_ends_in_an_example_of_it(fedeq: "Fedeq", command: tuple[str, ...]) -> None:
    told = fedeq(*command, "--help")
    assert told.status == 0
    assert re.search(r"Usage: .*\n+ +\S", told.out)
    example = " ".join(told.out[told.out.rindex("Example:") :].split())
    assert example.startswith(f"Example: fedeq {' '.join(command)}")
    assert "--help" not in example  # nothing comes after it


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_example_of_a_command_uses_options_that_it_has(fedeq: "Fedeq", command: tuple[str, ...]) -> None:
    told = fedeq(*command, "--help").out
    described, _, example = told.rpartition("Example:")
    for option in re.findall(r"--[a-z-]+", example):
        assert option in described


def test_the_version_is_one_line(fedeq: "Fedeq") -> None:
    told = fedeq("--version")
    assert (told.status, told.out, told.err) == (0, f"fedeq-edge {__version__}\n", "")


def test_the_agent_is_started_without_what_gateways_hosts_and_simulations_need() -> None:
    code = "import sys; from fedeq_edge.cli import main; sys.argv[1:] = ['agent', '--help']; main()"
    started = subprocess.run([sys.executable, "-v", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(re.findall(r"^import '(fedeq_edge[.\w]*)'", started.stderr, re.MULTILINE))
    assert "fedeq_edge.cli.agent" in loaded
    others = {"aggregator", "chaos", "demo", "fleet", "model", "simulate"}
    assert not loaded & {f"fedeq_edge.cli.{name}" for name in others}
    assert not [name for name in loaded if name.startswith(("fedeq_edge.provision", "fedeq_edge.simulation"))]

"""`fedeq`: one module per noun. Commands parse, call one function, print.

People read tables and one-line errors on stderr; programs read `--json` on stdout.
Exit 0 done, 1 failed, 2 misused, 130 interrupted.
"""

import importlib
import sys
from collections.abc import Iterable
from typing import Annotated, Final

import typer

from fedeq_edge import __version__, logs
from fedeq_edge.errors import ConfigError, FedEqError, ProvisionError

# Optional packages by the extra that brings them.
_EXTRAS = {
    "torch": "torch",
    "onnx": "onnx",
    "onnxruntime": "device",
    "sklearn": "demo",
    "jinja2": "demo",
    "cryptography": "fleet",
    "asyncssh": "fleet",
    "uv": "fleet",
    "tuf": "fleet",
    "ray": "ray",
}
# The module here whose `app` a command is of, or is itself. A board is slow: what it starts does not import what
# gateways, hosts and simulations need.
_NOUNS: Final = ("agent", "aggregator", "broker", "bundle", "data", "device", "fleet", "model")
_VERBS: Final = {
    "demo": "demo",
    "simulate": "simulate",
    "chaos": "chaos",
    "flash": "flash",
    "logs": "flash",
    "rollback": "flash",
    "update": "update",
    "doctor": "doctor",
}


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedeq-edge {__version__}")
        raise typer.Exit


def _common(
    _wanted: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    logs.configure()


def command_line(wanted: Iterable[str] = (*_NOUNS, *_VERBS)) -> typer.Typer:
    """`fedeq` with these of its commands."""
    app = typer.Typer(
        name="fedeq",
        help="Federated deep equilibrium learning on heterogeneous edge devices.",
        epilog="Example: fedeq demo --devices 6 --rounds 15",
        callback=_common,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for name in wanted:
        own: typer.Typer = importlib.import_module(f"{__name__}.{_VERBS.get(name, name)}").app
        if name in _NOUNS:
            app.add_typer(own, name=name)
        else:
            app.registered_commands += [command for command in own.registered_commands if command.name == name]
    return app


def _needed_for(words: list[str]) -> Iterable[str]:
    """The commands that are needed to answer a command line of these words."""
    if words == ["--version"]:
        return ()
    everything = (*_NOUNS, *_VERBS)
    return words[:1] if words and words[0] in everything else everything


def main() -> None:
    """Run the command line; errors raised on purpose become one line on stderr."""
    try:
        command_line(_needed_for(sys.argv[1:]))()
    except ProvisionError as error:
        typer.echo(f"fedeq: {error}", err=True)
        sys.exit(error.exit)
    except FedEqError as error:
        typer.echo(f"fedeq: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except PermissionError as error:
        typer.echo(f"fedeq: {error.filename}: permission denied; run it as the owner of that, or with sudo", err=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "")
        if extra is None:
            raise
        typer.echo(f"fedeq: {error.name} is not installed; run pip install 'fedeq-edge[{extra}]'", err=True)
        sys.exit(1)

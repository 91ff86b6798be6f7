"""`fedeq`: one module per noun. Commands parse, call one function, print.

People read tables and one-line errors on stderr; programs read `--json` on stdout.
Exit 0 done, 1 failed, 2 misused, 130 interrupted.
"""

import sys
from typing import Annotated

import typer

from fedeq_edge import __version__, logs
from fedeq_edge.cli import (
    agent,
    aggregator,
    broker,
    bundle,
    chaos,
    data,
    demo,
    device,
    doctor,
    enrol,
    flash,
    fleet,
    model,
    simulate,
    update,
)
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

app = typer.Typer(
    name="fedeq",
    help="Federated deep equilibrium learning on heterogeneous edge devices.",
    epilog="Example: fedeq demo --devices 6 --rounds 15",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for noun, group in (
    ("agent", agent.app),
    ("aggregator", aggregator.app),
    ("broker", broker.app),
    ("bundle", bundle.app),
    ("data", data.app),
    ("device", device.app),
    ("fleet", fleet.app),
    ("model", model.app),
):
    app.add_typer(group, name=noun)
device.app.command(name="enrol", epilog=enrol.ENROL_EXAMPLE)(enrol.enrol)
device.app.command(name="csr", epilog=enrol.CSR_EXAMPLE)(enrol.csr)
device.app.command(name="update-loop", epilog=update.LOOP_EXAMPLE)(update.update_loop)
app.command(name="demo", epilog=demo.EXAMPLE)(demo.demo)
app.command(name="simulate", epilog=simulate.EXAMPLE)(simulate.simulate)
app.command(name="chaos", epilog=chaos.EXAMPLE)(chaos.chaos)
app.command(name="flash", epilog=flash.FLASH_EXAMPLE)(flash.flash)
app.command(name="logs", epilog=flash.LOGS_EXAMPLE)(flash.logs)
app.command(name="rollback", epilog=flash.ROLLBACK_EXAMPLE)(flash.rollback)
app.command(name="update", epilog=update.UPDATE_EXAMPLE)(update.update)
app.command(name="doctor", epilog=doctor.EXAMPLE)(doctor.doctor)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedeq-edge {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    _wanted: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    logs.configure()


def main() -> None:
    """Run the command line; errors raised on purpose become one line on stderr."""
    try:
        app()
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

"""fedeq device enrol, fedeq device csr: the identity of this board. Registered under `fedeq device`."""

from pathlib import Path
from typing import Annotated

import typer

from fedeq_edge.errors import ConfigError

ENROL_EXAMPLE = "Example: fedeq device enrol --service https://gateway.local:8443 --token fedeq1.pi-01.4f...a1.90...7c"
CSR_EXAMPLE = "Example: fedeq device csr --device pi-01 --folder /etc/fedeq-edge"
# not looked at beforehand: root's folder is refused to others by main, which says what to do
Folder = Annotated[Path, typer.Option(readable=False, help="Where key and certificates of this board are.")]
_HERE = Path("/etc/fedeq-edge")


def enrol(
    service: Annotated[str, typer.Option(help="Address of the fleet's service.")] = "",
    token: Annotated[
        str,
        typer.Option(envvar="FEDEQ_JOIN_TOKEN", help="What `fedeq fleet token` printed; '-' reads a line of stdin."),
    ] = "",
    join: Annotated[
        Path | None, typer.Option(help="join.toml with service and token in place of the options; deleted on success.")
    ] = None,
    folder: Folder = _HERE,
) -> None:
    """Give this board its identity: it makes a key and has it certified with a join token. Safe to repeat."""
    from fedeq_edge.provision import enrol as board  # noqa: PLC0415  # cryptography, only when it is asked for
    from fedeq_edge.provision.tokens import Token  # noqa: PLC0415  # as above

    if join is not None:
        device = board.join(join, folder)
    elif service and token:
        text = typer.get_text_stream("stdin").readline() if token == "-" else token  # noqa: S105  # stdin
        device = Token.parse(text).device
        board.enrol(service, text, folder, device)
    else:
        raise ConfigError("give --service and --token, or --join with a file that has both")
    typer.echo(f"device {device} is enrolled; its certificate is {folder}/device.crt", err=True)
    if folder == _HERE:
        typer.echo("next: sudo systemctl restart fedeq-agent fedeq-updater", err=True)


def csr(
    device: Annotated[str, typer.Option(help="Id of the device, as fleet.toml has it.")], folder: Folder = _HERE
) -> None:
    """Print a certificate request of this board on stdout; its key is made if it has none, and stays here."""
    from fedeq_edge.provision import enrol as board  # noqa: PLC0415  # cryptography, only when it is asked for

    typer.echo(board.csr(folder, device).decode(), nl=False)

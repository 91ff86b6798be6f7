"""fedeq data: what users bring, and public data sets."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from fedeq_edge.data.npz import FleetSummary, column_names, describe, load_client, load_fleet, load_text
from fedeq_edge.data.options import Options, Partition
from fedeq_edge.errors import ConfigError

if TYPE_CHECKING:
    from fedeq_edge.data.prepare import Prepared

app = typer.Typer(help="Data sets of devices and fleets.", no_args_is_help=True, rich_markup_mode=None)
Classes = Annotated[str | None, typer.Option(help="Labels to keep, such as 0-5 or 0,1,4.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


@app.command(
    epilog="Example: fedeq data prepare cifar-10-binary.tar.gz --partition shards --clients 100 --labels 5 "
    "--out cifar10.npz"
)
def prepare(
    source: Annotated[Path, typer.Argument(help="The official archive, as it was fetched or unpacked.")],
    out: Annotated[Path, typer.Option(help="The .npz of the fleet to write.")],
    kind: Annotated[
        str | None,
        typer.Option(
            help="har, hapt, wisdm, mnist, emnist, femnist, cifar10, cifar100 or shakespeare; "
            "what the contents show if not given."
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            help="wisdm: phone-accel, phone-gyro, watch-accel, watch-gyro. emnist: byclass, bymerge, balanced, "
            "letters, digits, mnist. cifar100: fine, coarse. shakespeare: codes, onehot. The first if not given."
        ),
    ] = None,
    partition: Annotated[
        Partition, typer.Option(help="natural: by person, writer or role; the others make --clients.")
    ] = "natural",
    clients: Annotated[
        int | None, typer.Option(min=1, help="Clients to make, or to draw from the natural ones.")
    ] = None,
    labels: Annotated[int | None, typer.Option(min=1, help="Labels per client, for shards.")] = None,
    alpha: Annotated[float | None, typer.Option(min=0.0, help="For dirichlet; small makes unlike clients.")] = None,
    classes: Classes = None,
    smallest: Annotated[int, typer.Option(min=1, help="Fewest samples of a client.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of partition and split.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Turn a public data set into the file of a fleet, with a training, validation and test part for each client."""
    options = Options(
        kind=kind,
        variant=variant,
        partition=partition,
        clients=clients,
        labels=labels,
        alpha=alpha,
        classes=classes,
        smallest=smallest,
        seed=seed,
    )
    from fedeq_edge.data.prepare import prepare as prepare_fleet  # noqa: PLC0415  # agents need no readers

    prepared = prepare_fleet(source, out, options)
    if as_json:
        typer.echo(json.dumps({"path": str(out), **msgspec.to_builtins(prepared)}))
    else:
        for line in _told(out, prepared):
            typer.echo(line, err=True)


def _told(out: Path, prepared: "Prepared") -> list[str]:
    kind = " ".join(filter(None, (prepared.kind, prepared.variant)))
    whole = (
        f"{out}: {kind}, {prepared.clients} clients with {prepared.fewest} to {prepared.most} training samples of "
        f"shape {prepared.shape}, {len(prepared.classes)} classes; in all {prepared.train} for training, "
        f"{prepared.validation} for validation, {prepared.test} for the test"
    )
    lines = [whole, *prepared.notes]
    if prepared.left_out:
        lines.append(f"{prepared.left_out} clients have too few samples and were left out (--smallest)")
    if prepared.official:
        lines.append(f"known by their published checksums: {', '.join(prepared.official)}")
    return lines + [f"sha256 {digest}  {name}" for name, digest in list(prepared.sha256.items())[:_SHOWN]]


_SHOWN = 10  # files of a folder; --json has them all


@app.command(epilog="Example: fedeq data inspect har.npz --x X --client subject --test local_test --classes 0-5")
def inspect(
    path: Annotated[Path, typer.Argument(help="An .npz of one device, or of a fleet with a client column.")],
    x: Annotated[str, typer.Option(help="Array of samples.")] = "x",
    y: Annotated[str, typer.Option(help="Array of labels.")] = "y",
    client: Annotated[
        str | None, typer.Option(help="Column that names the client; client if there, else it is one device.")
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Column that marks test rows; split if there, else every fifth row.")
    ] = None,
    where: Annotated[str | None, typer.Option(help="Boolean column that chooses rows; !name for the others.")] = None,
    classes: Classes = None,
    as_json: AsJson = False,
) -> None:
    """Check a data set and show what each client has, and where the file comes from."""
    names = column_names(path)
    if client is None and "client" in names:
        client = "client"
    if client is None and (x, y, test, where, classes) != ("x", "y", None, None, None):
        raise ConfigError(
            "--x, --y, --test, --where and --classes are for the file of a fleet; name its --client column"
        )
    if client is None:
        summary = describe({path.stem: load_client(path)})
    else:
        summary = describe(load_fleet(path, x=x, y=y, client=client, test=test, where=where, classes=classes))
    provenance = load_text(path, "provenance")
    if as_json:
        typer.echo(json.dumps({**msgspec.to_builtins(summary), "provenance": provenance}))
    else:
        _show(summary, provenance)


def _show(summary: FleetSummary, provenance: str | None) -> None:
    console = Console(stderr=True)
    console.print(f"samples of shape {summary.shape}, {summary.classes} classes, {len(summary.clients)} clients")
    if provenance is not None:
        readable = "".join(char if char.isprintable() else "?" for char in provenance)
        console.print(f"made from {readable}", markup=False, highlight=False, soft_wrap=True)
    table = Table("client", "train", "test", "training samples per label")
    for name, client in summary.clients.items():
        table.add_row(name, str(client.train), str(client.test), " ".join(map(str, client.histogram)))
    console.print(table)

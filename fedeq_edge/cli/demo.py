"""fedeq demo: see a fleet learn."""

import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedeq_edge.demo import run as fleet_demo
from fedeq_edge.storage import finite

_MANY = 10  # devices beyond which a mean hides the worst
EXAMPLE = "Example: fedeq demo --data har.npz --x X --client subject --test local_test --classes 0-5"
app = typer.Typer()


@app.command(name="demo", epilog=EXAMPLE)
def demo(  # noqa: PLR0917  # typer calls it by name
    devices: Annotated[int, typer.Option(min=2, max=28, help="Devices of the digits fleet.")] = 6,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds; what suits the data if not given.")] = None,
    data: Annotated[str, typer.Option(help='"digits", or an .npz with one row per sample.')] = "digits",
    x: Annotated[str, typer.Option(help="Array of samples.")] = "x",
    y: Annotated[str, typer.Option(help="Array of labels.")] = "y",
    client: Annotated[str, typer.Option(help="Column that names the client of a row.")] = "client",
    test: Annotated[
        str | None, typer.Option(help="Column that marks test rows; split if there, else every fifth row.")
    ] = None,
    where: Annotated[str | None, typer.Option(help="Boolean column that chooses rows; !name for the others.")] = None,
    classes: Annotated[str | None, typer.Option(help="Labels to keep, such as 0-5 or 0,1,4.")] = None,
    clients: Annotated[int | None, typer.Option(min=1, help="Only the first so many clients.")] = None,
    broker: Annotated[str, typer.Option(help="auto, mosquitto, embedded (amqtt), or an mqtt:// URL.")] = "auto",
    method: Annotated[str | None, typer.Option(help="Algorithm preset, such as admm, fedavg, fedper.")] = None,
    backend: Annotated[Literal["torch", "onnx"], typer.Option(help="What trains: torch, or ONNX graphs.")] = "torch",
    codec: Annotated[str, typer.Option(help="How differences travel: f32, int8, int4+z, top5:int8, ...")] = "int8",
    seed: Annotated[int, typer.Option(help="Of the data split and the initial weights.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Empty or new folder; fedeq-demo, fedeq-demo-2, ... else.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")] = False,
) -> None:
    """Run a fleet on this machine: a real broker, an aggregator and one agent process per (emulated) board."""
    source = fleet_demo.Source(
        data=data, x=x, y=y, client=client, test=test, where=where, classes=classes, clients=clients
    )
    options = fleet_demo.Options(
        source=source,
        devices=devices,
        rounds=rounds,
        broker=broker,
        preset=method,
        codec=codec,
        backend=backend,
        seed=seed,
        out=out,
    )
    console = Console(stderr=True)
    _leave_on_signals()
    if console.is_terminal:
        with _Table(console) as view:
            summary = fleet_demo.run(options, view)
    else:
        summary = fleet_demo.run(options, _Lines(console))
    if as_json:
        typer.echo(json.dumps(finite(summary)))
    _show(console, summary)


def _leave_on_signals() -> None:
    """SIGTERM and a closed terminal take the fleet's processes along, as Ctrl-C does."""

    def leave(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


def _accuracy(line: Mapping[str, Any]) -> float | None:
    told = [device["accuracy"] for device in line["devices"].values() if device["accuracy"] is not None]
    return sum(told) / len(told) if told else None


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _kilobytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1000:.1f} kB"


class _Lines:
    """For logs and pipes: one line a round."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._broker = "connected"

    def says(self, text: str) -> None:
        """Print it."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def status(self, status: Mapping[str, Any]) -> None:
        """Print how the aggregator's connection changes; the rest are states, and a log wants events."""
        if status["broker"] not in (self._broker, "connecting"):
            self._broker = status["broker"]
            self.says(f"aggregator and broker: {self._broker}")

    def round(self, line: Mapping[str, Any]) -> None:
        """Print a closed round."""
        if line["kind"] != "round":
            return
        budgets = sorted({device["forward"] for device in line["devices"].values()})
        self._console.print(
            f"round {line['round']:3d}  {len(line['contributed'])}/{line['cohort']} devices  "
            f"accuracy {_number(_accuracy(line))}  K {budgets[0]}..{budgets[-1]}  "
            f"primal {line['primal_residual']:.2e}  {line['seconds']:.1f} s",
            highlight=False,
        )


class _Table:
    """For a terminal: a table that lives while the fleet learns."""

    def __init__(self, console: Console) -> None:
        self._said: list[str] = []
        self._status: Mapping[str, Any] = {}
        self._rounds: list[Mapping[str, Any]] = []
        self._reported: set[str] = set()
        self._devices: dict[str, Mapping[str, Any]] = {}
        self._since = time.monotonic()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> "_Table":
        self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.__exit__(None, None, None)

    def says(self, text: str) -> None:
        """Show it above the table."""
        self._said.append(text)

    def status(self, status: Mapping[str, Any]) -> None:
        """Show where the round stands."""
        self._status = status

    def round(self, line: Mapping[str, Any]) -> None:
        """Show what each device did."""
        if line["kind"] == "round":
            self._rounds.append(line)
            self._devices.update(line["devices"])
        else:
            self._reported.add(line["device"])

    def _render(self) -> RenderableType:
        return Group(*(Text(text) for text in self._said), Text(self._headline()), self._table())

    def _headline(self) -> str:
        status = self._status
        if not status:
            return "starting ..."
        parts = [f"round {status['round']} of {status['rounds']}", self._stage(status)]
        if self._rounds:
            parts.append(f"accuracy {_number(_accuracy(self._rounds[-1]))}")
            parts.append(f"primal residual {_number(self._rounds[-1]['primal_residual'], '.1e')}")
        parts.append(f"{time.monotonic() - self._since:.0f} s")
        return "  ·  ".join(parts)

    def _stage(self, status: Mapping[str, Any]) -> str:
        if status["broker"] not in ("connected", "connecting") and status["status"] != "finished":
            return str(status["broker"])
        if status["status"] == "finishing":
            return f"personal models: {len(self._reported)} of {status['members']} are ready"
        if not status["cohort"]:
            return str(status["status"])
        waiting = len(status["cohort"]) - len(status["contributed"])
        return f"waiting for {waiting} of {len(status['cohort'])}" + (
            "" if self._rounds else " (the first takes longest)"
        )

    def _table(self) -> Table:
        table = Table("device", "", "K", "k", "residual", "seconds", "accuracy", "up", "down")
        table.caption = "seconds: as the emulated boards would take; accuracy: of the consensus; up, down: bytes so far"
        table.caption_justify = "left"
        answered = set(self._status.get("contributed", ())) | self._reported
        for device in self._status.get("online", ()):
            told = self._devices.get(device)
            mark = "✓" if device in answered else "…"
            cells = ["-"] * 7
            if told is not None:
                cells = [
                    str(told["forward"]),
                    str(told["adjoint"]),
                    f"{told['residual']:.1e}",
                    f"{told['seconds']:.2f}",
                    _number(told["accuracy"]),
                    _kilobytes(told["wire_up"]),
                    _kilobytes(told["wire_down"]),
                ]
            table.add_row(device, mark, *cells)
        return table


def _show(console: Console, summary: Mapping[str, Any]) -> None:
    console.print(_devices(summary["devices"]))
    console.print(_proofs(summary), highlight=False)
    accuracy = summary["accuracy"]
    sent, whole = summary["bytes_per_client_round"], summary["bytes_per_client_round"]["float32_full_model"]
    saved = summary["errors_saved"]
    console.print(
        f"personal models {_number(accuracy['personal'])}, trained alone {_number(accuracy['local_only'])}"
        + (f": the federation removed {saved:.0%} of the errors" if saved is not None and saved > 0 else "")
        + f"; the consensus as it stands {_number(accuracy['consensus'])}"
        + f"; the worst five {_number(accuracy['worst_five_personal'])}" * (len(summary["devices"]) > _MANY),
        highlight=False,
        soft_wrap=True,
    )
    console.print(
        f"{summary['rounds']} rounds in {summary['wall_s']:.0f} s; per client and round {_kilobytes(sent['up'])} up "
        f"and {_kilobytes(sent['down'])} down (the whole model as float32: {_kilobytes(whole['up'])} each way)",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"report: {summary['out']}/report.html", highlight=False, soft_wrap=True)


def _devices(devices: Sequence[Mapping[str, Any]]) -> Table:
    """Fits 80 columns: a board's name that is cut tells nothing."""
    caption = "boards are emulated; diff: largest |onnx - torch| of a logit; evals: solver evaluations per sample"
    table = Table(caption=caption, caption_justify="left", padding=(0, 1, 0, 0))
    for name in ("device", "board"):
        table.add_column(name, no_wrap=True)
    for name in ("K", "k", "personal", "alone", "diff", "evals", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for device in devices:
        onnx = device["onnx"] or {}
        table.add_row(
            device["id"],
            device["profile"],
            str(device["budget"]["forward"]),
            str(device["budget"]["adjoint"]),
            _number(device["accuracy"]["personal"]),
            _number(device["accuracy"]["local_only"]),
            _number(onnx.get("max_abs_diff"), ".0e"),
            _number(onnx.get("iterations"), ".1f"),
            _number(onnx.get("latency_ms"), ".2f"),
        )
    return table


def _proofs(summary: Mapping[str, Any]) -> RenderableType:
    """What is proven of each personal model; one line where nothing is."""
    devices = summary["devices"]
    if not any(device["certificate"] for device in devices):
        return (
            f"no proof: a {summary['model']['cell']} cell without a certificate; residuals are measured, not promised"
        )
    table = Table(caption="for every input, |z_K - z*| <= bound", caption_justify="left", padding=(0, 1, 0, 0))
    table.add_column("device", no_wrap=True)
    for name in ("gamma", "K", "bound", "norm"):
        table.add_column(name, justify="right", no_wrap=True)
    for device in devices:
        proof = device["certificate"]
        cells = ("-", "-", "no proof", "-")
        if proof:
            unit = " rms(u)" if proof["unit"] == "injection" else ""
            cells = (f"{proof['gamma']:.3f}", str(proof["evaluations"]), f"{proof['bound']:.1e}{unit}", proof["norm"])
        table.add_row(device["id"], *cells)
    return table

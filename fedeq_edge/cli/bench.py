"""fedeq model bench: what a trained model's budget buys on this machine."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from fedeq_edge import modelfile
from fedeq_edge.cli.ask import test_part, torch_engine
from fedeq_edge.deq.numeric import NumpyDEQ
from fedeq_edge.deq.wellposed import Certificate
from fedeq_edge.errors import ConfigError
from fedeq_edge.report.curve import Subject, drawing, page
from fedeq_edge.report.page import template
from fedeq_edge.storage import finite, write_atomically
from fedeq_edge.training.curve import BATCH, Curve, Engine, measure, noise

EXAMPLE: Final = "Example: fedeq model bench personal.fedeq data.npz --budgets 1..32 --out curve.html"
# Doublings with one value between: ten rows that show a geometric decay evenly.
_BUDGETS: Final = "1,2,3,4,6,8,12,16,24,32"
_RANGE: Final = re.compile(r"(\d{1,6})(?:\.\.(\d{1,6}))?")
# A thousand evaluations of any cell that is worth its time have long converged.
MOST_EVALUATIONS: Final = 1000
_NOISE_SAMPLES: Final = 256


def bench(
    model: Annotated[Path, typer.Argument(help="personal.fedeq out of a device's state folder.")],
    data: Annotated[
        Path | None, typer.Argument(help="An .npz with x and y, whose test part is asked; noise if not given.")
    ] = None,
    budgets: Annotated[str, typer.Option(help="Values of K, such as 1..32 or 1,2,4..8.")] = _BUDGETS,
    out: Annotated[Path | None, typer.Option(help="Also draw the curve: an .html page or an .svg drawing.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Measure what a model's budget buys here: accuracy, residual, proven bound and time against K evaluations."""
    sizes = _parse(budgets)
    draw = None if out is None else _drawer(out)
    found = _readable(model)
    x, y = (noise(found.spec, np.random.default_rng(0), _NOISE_SAMPLES), None) if data is None else test_part(data)
    curve = measure(_engines(found), found.spec, found.theta, x, y, sizes)
    samples = f"{len(x)} samples of noise" if data is None else f"{len(x)} test samples of {data.name}"
    if out is not None and draw is not None:
        subject = Subject(name=model.name, samples=samples, own=found.budget.forward)
        write_atomically(out, draw(curve, subject).encode())
    if as_json:
        told = {"model": str(model), "data": samples, "own_budget": found.budget.forward, **msgspec.to_builtins(curve)}
        typer.echo(json.dumps(finite(told)))
    else:
        _show_curve(curve, samples, out)


def _parse(budgets: str) -> tuple[int, ...]:
    """Ascending values of K out of "1..32", "1,2,4", "8" or a mixture. Raises ConfigError with an example."""
    sizes: set[int] = set()
    for part in budgets.split(","):
        spelt = _RANGE.fullmatch(part.strip())
        first, last = (0, 0) if spelt is None else (int(spelt[1]), int(spelt[2] or spelt[1]))
        if not 1 <= first <= last <= MOST_EVALUATIONS:
            raise ConfigError(
                f"--budgets {budgets!r}: {part.strip()!r} is neither a number of evaluations nor an ascending range "
                f"within 1 to {MOST_EVALUATIONS}; write for example 1..32 or 1,2,4"
            )
        sizes.update(range(first, last + 1))
    return tuple(sorted(sizes))


def _drawer(out: Path) -> Callable[[Curve, Subject], str]:
    """Who draws it; raises ConfigError now for what would otherwise fail after the measurement."""
    if out.suffix not in _DRAWERS:
        raise ConfigError(f"--out {out}: the curve is drawn as .html or .svg; name the file accordingly")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: the folder {out.parent} does not exist; make it or name another")
    template(f"curve{out.suffix}.jinja")
    return _DRAWERS[out.suffix]


def _readable(path: Path) -> modelfile.ModelFile:
    if path.suffix == ".onnx":
        raise ConfigError(f"{path}: bench takes the personal.fedeq that this file was exported from")
    return modelfile.read(path)


def _engines(found: modelfile.ModelFile) -> dict[str, Engine]:
    """The model behind each library that runs it here: torch for every kind, numpy for dense ones."""
    if found.spec.spatial:
        return {"torch": torch_engine(found)}
    engines: dict[str, Engine] = {"numpy": NumpyDEQ(found.spec, found.theta, found.head)}
    if importlib.util.find_spec("torch") is not None:
        engines["torch"] = torch_engine(found)
    return engines


def _show_curve(curve: Curve, samples: str, out: Path | None) -> None:
    console = Console(stderr=True)
    console.print(_table(curve, samples))
    if "numpy" in curve.points[0].timings and "torch" in curve.points[0].timings:
        console.print(_faster(*curve.ratio("torch", "numpy")), highlight=False, soft_wrap=True)
    if out is not None:
        console.print(f"drawn in {out}", highlight=False, soft_wrap=True)


def _table(curve: Curve, samples: str) -> Table:
    engines = list(curve.points[0].timings)
    proof = curve.points[0].certificate
    table = Table(padding=(0, 1, 0, 0), caption_justify="left")
    table.caption = (
        f"{samples}; residual: relative, mean and worst; change: of the logits, to the last K\n"
        + ("no proof: the cell is no certified contraction" if proof is None else _proof(proof))
        + f"\nµs per sample: asked one by one, and {BATCH} at a time"
    )
    timed = [f"{name} {count}" for name in engines for count in (1, BATCH)]
    for name in ("K", "right", "mean", "worst", "bound", "change", *timed):
        table.add_column(name, justify="right")
    for point in curve.points:
        numbers = [point.residual_mean, point.residual_max, point.bound, point.change]
        times = [time for name in engines for time in msgspec.structs.astuple(point.timings[name])]
        table.add_row(
            str(point.evaluations),
            "-" if point.accuracy is None else f"{point.accuracy:.3f}",
            *("-" if value is None else f"{value:.0e}" for value in numbers),
            *(f"{time:.3g}" if time < 1000 else f"{time:.0f}" for time in times),
        )
    return table


def _proof(proof: Certificate) -> str:
    unit = "" if proof.unit == "state" else " rms(u)"
    return f"proven for every input: {proof.norm} |z_K - z*| <= bound{unit}; gamma {proof.gamma:.3f}"


def _faster(alone: float, batch: float) -> str:
    """Which library to take here. alone, batch: time of torch over that of numpy."""

    def told(ratio: float) -> str:
        return f"numpy {ratio:.1f} times as fast as torch" if ratio >= 1.0 else f"torch {1 / ratio:.1f} times as fast"

    return f"one by one: {told(alone)}; {BATCH} at a time: {told(batch)}"


_DRAWERS: Final = {".html": page, ".svg": drawing}

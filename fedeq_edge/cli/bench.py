"""fedeq model bench: what a trained model's budget buys on this machine."""

import importlib.util
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec
import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fedeq_edge import modelfile
from fedeq_edge.cli.ask import test_part
from fedeq_edge.cli.footprint import engine_of, resident_mb
from fedeq_edge.deq.certificate import Certificate, Rate
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.deq.wellposed import rate
from fedeq_edge.errors import ConfigError
from fedeq_edge.modelform import form
from fedeq_edge.report.curve import Subject, drawing, page
from fedeq_edge.report.page import template
from fedeq_edge.storage import finite, write_atomically
from fedeq_edge.training.curve import BATCH, Curve, Samples, measure, noise

EXAMPLE: Final = "Example: fedeq model bench personal.fedeq data.npz --budgets 1..32 --out curve.html"
# Doublings with one value between: ten rows that show a geometric decay evenly.
_BUDGETS: Final = "1,2,3,4,6,8,12,16,24,32"
_RANGE: Final = re.compile(r"(\d{1,6})(?:\.\.(\d{1,6}))?")
# A thousand evaluations of any cell that is worth its time have long converged.
MOST_EVALUATIONS: Final = 1000
_NOISE_SAMPLES: Final = 256


def bench(
    model: Annotated[Path, typer.Argument(help="personal.fedeq out of a device's state folder, or an .onnx file.")],
    data: Annotated[
        Path | None, typer.Argument(help="An .npz with x and y, whose test part is asked; noise if not given.")
    ] = None,
    budgets: Annotated[str, typer.Option(help="Values of K, such as 1..32 or 1,2,4..8.")] = _BUDGETS,
    out: Annotated[Path | None, typer.Option(help="Also draw the curve: an .html page or an .svg drawing.")] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Time torch.compile as well; needs a C++ compiler and a minute.")
    ] = False,
    memory: Annotated[bool, typer.Option(help="Also start a process per library and see what it holds.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Measure what a model's budget buys here: accuracy, residual, proven bound, time and memory against K."""
    sizes = _parse(budgets)
    draw = None if out is None else _drawer(out)
    with tempfile.TemporaryDirectory(prefix="fedeq-bench-") as folder:
        exported = form(model) == "onnx"
        asked = _exported(model) if exported else _personal(model, Path(folder), compiled=compiled)
        x, y = (
            (noise(asked.spec, np.random.default_rng(0), _NOISE_SAMPLES), None)
            if data is None
            else test_part(data, gaps=False)
        )
        curve = asked.measure(x, y, (asked.own,) if asked.fixed else sizes)
        if memory:
            curve = msgspec.structs.replace(curve, memory_mb=asked.memory_mb())
    samples = f"{len(x)} samples of noise" if data is None else f"{len(x)} test samples of {data.name}"
    if out is not None and draw is not None:
        subject = Subject(name=model.name, samples=samples, own=asked.own)
        write_atomically(out, draw(curve, subject).encode())
    if as_json:
        told = {"model": str(model), "data": samples, "own_budget": asked.own, **msgspec.to_builtins(curve)}
        typer.echo(json.dumps(finite(told)))
    else:
        _show_curve(curve, samples, out)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A model behind each library that runs it here. files: what each library loads. own: the model's own K.

    fixed: an unrolled file, which has no other.
    """

    spec: ModelSpec
    rate: Rate | None
    own: int
    files: dict[str, Path]
    fixed: bool = False

    def measure(self, x: Samples, y: NDArray[np.int64] | None, sizes: Sequence[int]) -> Curve:
        """The curve of all libraries."""
        engines = {name: engine_of(name, path)[0] for name, path in self.files.items()}
        return measure(engines, self.rate, x, y, sizes)

    def memory_mb(self) -> dict[str, float | None]:
        """What a process of each library holds; an answer of any K."""
        return {name: resident_mb(name, path, self.own) for name, path in self.files.items()}


def _exported(path: Path) -> _Asked:
    from fedeq_edge.onnx.runtime import Predictor  # noqa: PLC0415  # onnxruntime only where needed

    predictor = Predictor(path)
    told = predictor.metadata.get("fedeq.model")
    if told is None:
        raise ConfigError(f"{path}: written by an older fedeq-edge, it does not say its model; export it again")
    try:
        spec = msgspec.json.decode(told, type=ModelSpec)
    except (msgspec.DecodeError, ConfigError) as error:
        raise ConfigError(f"{path}: its fedeq.model cannot be read ({error}); export it again") from error
    files = {"onnx": path}
    return _Asked(spec=spec, rate=predictor.rate, own=predictor.budget, files=files, fixed=predictor.unrolled)


def _personal(path: Path, folder: Path, *, compiled: bool) -> _Asked:
    """torch for every kind of model, numpy for dense ones, onnxruntime where it is installed."""
    found = modelfile.read(path)
    files = {} if found.spec.spatial else {"numpy": path}
    if found.spec.spatial or importlib.util.find_spec("torch") is not None:
        files |= {"torch": path} | ({"torch.compile": path} if compiled and _compiles(path) else {})
    if all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxruntime", "torch")):
        from fedeq_edge.onnx.export import unchecked  # noqa: PLC0415  # onnx only where needed

        files["onnx"] = folder / "model.onnx"
        content = unchecked(found.spec, found.theta, found.head, budget=found.budget.forward)
        files["onnx"].write_bytes(content)
    return _Asked(spec=found.spec, rate=rate(found.theta, found.spec), own=found.budget.forward, files=files)


def _compiles(path: Path) -> bool:
    """Whether torch.compile works here: a process of its own tries, for it fails in many ways."""
    works = resident_mb("torch.compile", path, 1) is not None
    if not works:
        typer.echo("torch.compile does not work here and is left out; it needs a C++ compiler", err=True)
    return works


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


def _show_curve(curve: Curve, samples: str, out: Path | None) -> None:
    console = Console(stderr=True)
    console.print(_table(curve, samples))
    for name in curve.points[0].timings.keys() - {"torch"} if "torch" in curve.points[0].timings else ():
        console.print(_faster(name, *curve.ratio("torch", name)), highlight=False, soft_wrap=True)
    if curve.memory_mb:
        console.print(_held(curve), highlight=False, soft_wrap=True)
    if out is not None:
        console.print(f"drawn in {out}", highlight=False, soft_wrap=True)


def _held(curve: Curve) -> str:
    held = (f"{name} {'?' if value is None else f'{value:.0f}'}" for name, value in curve.memory_mb.items())
    return f"MB resident, {BATCH} samples answered: {', '.join(held)}"


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


def _faster(name: str, alone: float, batch: float) -> str:
    """Which library to take here. alone, batch: time of torch over that of the named one."""

    def told(ratio: float) -> str:
        return f"{name} {ratio:.1f} times as fast as torch" if ratio >= 1.0 else f"torch {1 / ratio:.1f} times as fast"

    return f"one by one: {told(alone)}; {BATCH} at a time: {told(batch)}"


_DRAWERS: Final = {".html": page, ".svg": drawing}

"""fedeq model: personal models as files."""

import json
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.table import Column, Table

from fedeq_edge import modelfile
from fedeq_edge.cli import bench
from fedeq_edge.cli.ask import ask, test_part
from fedeq_edge.data.npz import load_client
from fedeq_edge.deq.budget import LARGEST_BUDGET
from fedeq_edge.modelform import form, spare
from fedeq_edge.onnx.contract import SOLVER_GRAPH
from fedeq_edge.onnx.recipe import DEFAULT
from fedeq_edge.storage import finite

app = typer.Typer(
    help="Personal models: look at them, export them, ask them.", no_args_is_help=True, rich_markup_mode=None
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
app.command(name="bench", epilog=bench.EXAMPLE)(bench.bench)


@app.command(epilog="Example: fedeq model export personal.fedeq --recipe int8 --data data.npz --out model.onnx")
def export(
    model: Annotated[Path, typer.Argument(help="personal.fedeq out of a device's state folder.")],
    out: Annotated[Path, typer.Option(help="The ONNX file to write.")] = Path("model.onnx"),
    recipe: Annotated[str, typer.Option(help="Form of the file: onnxruntime, float16, int8, unrolled.")] = DEFAULT,
    data: Annotated[
        Path | None, typer.Option(help="An .npz with x and y, for the check; int8 is calibrated with it.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(min=1, max=LARGEST_BUDGET, help="Default of max_iter; the model's own if not given.")
    ] = None,
    tol: Annotated[float | None, typer.Option(min=0.0, help="Default tolerance; the recipe's if not given.")] = None,
    cross_check: Annotated[
        bool, typer.Option(help="Compare with torch's own exporter too, if onnxscript is installed; takes seconds.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Write the model as ONNX with the solver inside, after checking it against torch; no file if a check fails."""
    from fedeq_edge.onnx.export import export as write_onnx  # noqa: PLC0415  # onnx and torch only where needed

    found = modelfile.read(model)
    spare(out)
    verification = write_onnx(
        found.spec,
        found.theta,
        found.head,
        out,
        budget=found.budget.forward if budget is None else budget,
        tol=tol,
        labels=found.labels or None,
        round_number=found.round,
        recipe=recipe,
        samples=None if data is None else load_client(data).x_train,
        cross_check=cross_check,
    )
    told = {"path": str(out), "bytes": out.stat().st_size, "recipe": recipe, **msgspec.to_builtins(verification)}
    if as_json:
        typer.echo(json.dumps(finite(told)))
    else:
        typer.echo(
            f"{out}: {told['bytes']} bytes; against torch: max |onnx - torch| {verification.max_abs_diff:.1e} on "
            f"logits, {verification.agreement:.1%} equal answers over {verification.samples} samples; "
            f"second route: {verification.cross_check}",
            err=True,
        )


@app.command(epilog="Example: fedeq model inspect personal.fedeq")
def inspect(
    model: Annotated[Path, typer.Argument(help="A personal.fedeq or any .onnx file of ours.")], as_json: AsJson = False
) -> None:
    """Show what a model file is."""
    facts = _onnx_facts(model) if form(model) == "onnx" else _model_facts(model)
    if as_json:
        typer.echo(json.dumps(finite(facts)))
        return
    table = Table("what", Column("value", overflow="fold"))
    for key, value in facts.items():
        table.add_row(key, value if isinstance(value, str) else json.dumps(value))
    Console(stderr=True).print(table)


def _model_facts(path: Path) -> dict[str, object]:
    model = modelfile.read(path)
    facts: dict[str, object] = {
        "device": model.device,
        "run": model.run,
        "round": model.round,
        "budget": msgspec.to_builtins(model.budget),
        "theta_parameters": len(model.theta),
        "head_parameters": len(model.head),
    }
    facts.update(model.model)
    return facts


def _onnx_facts(path: Path) -> dict[str, object]:
    from fedeq_edge.onnx.runtime import describe  # noqa: PLC0415  # onnxruntime only where needed

    found = describe(path)
    facts: dict[str, object] = {"kind": found.kind, "bytes": found.size_bytes}
    if found.kind == "inference":
        facts["input_shape"] = found.inputs["x"][1:]
    told = dict(sorted(found.metadata.items()))  # onnxruntime gives them in no order
    if SOLVER_GRAPH in told:
        told[SOLVER_GRAPH] = f"a graph of its own, {len(told[SOLVER_GRAPH])} characters"
    return {**facts, "inputs": dict(found.inputs), "outputs": dict(found.outputs), **told}


@app.command(epilog="Example: fedeq model infer personal.fedeq data.npz --budget 4")
def infer(
    model: Annotated[Path, typer.Argument(help="A personal.fedeq or an exported .onnx file.")],
    data: Annotated[Path, typer.Argument(help="An .npz with x and y, as a device has it.")],
    budget: Annotated[
        int | None, typer.Option(min=1, max=LARGEST_BUDGET, help="Most cell evaluations; the file's own if not given.")
    ] = None,
    tol: Annotated[float | None, typer.Option(min=0.0, help="Residual at which a sample stops; 0: never.")] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a model about the test part of a data file: .onnx by onnxruntime; .fedeq by numpy if dense, else by torch.

    Without torch, or where this version does not know the model, by the solver that it was trained with.
    """
    x, y = test_part(data, gaps=True)  # each sample is answered for itself
    answer = ask(model, x, budget=budget, tol=tol)
    answered = np.isfinite(answer.logits).all(1)
    told = {
        "samples": len(y),
        "unanswered": int((~answered).sum()),
        "accuracy": float(np.mean(answered & (answer.logits.argmax(1) == y))),
        "iterations_mean": float(answer.iterations.mean()),
        "residual_max": float(answer.residual[answered].max(initial=0.0)),
        "labels": list(answer.labels),
    }
    if as_json:
        typer.echo(json.dumps(finite(told)))
    else:
        spoilt = f", {told['unanswered']} without an answer, for NaN or infinity" if told["unanswered"] else ""
        typer.echo(
            f"{told['samples']} samples{spoilt}: accuracy {told['accuracy']:.3f}, "
            f"{told['iterations_mean']:.1f} evaluations a sample, largest residual {told['residual_max']:.1e}",
            err=True,
        )

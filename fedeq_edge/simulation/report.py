"""The page of an experiment's results."""

import html
from collections.abc import Sequence
from pathlib import Path

from fedeq_edge.simulation.results import Result
from fedeq_edge.simulation.summary import ACCURACIES, AMOUNTS, summarise
from fedeq_edge.storage.files import write_atomically


def write(results: Sequence[Result], path: Path) -> None:
    """`path` is a self-contained HTML page with one row a variant: mean and spread over its seeds."""
    found = summarise(results)
    columns = (*ACCURACIES, *AMOUNTS)
    head = "".join(f"<th>{column}</th>" for column in ("variant", "seeds", *columns))
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in (name, str(len(variant["seeds"]))))
        + "".join(f"<td>{_cell(variant[column])}</td>" for column in columns)
        + "</tr>"
        for name, variant in found["variants"].items()
    )
    title = html.escape(found["experiment"])
    page = (
        f"<!doctype html><meta charset=utf-8><title>{title}</title><h1>{title}</h1><table><tr>{head}</tr>{rows}</table>"
    )
    write_atomically(path, page.encode())


def _cell(number: dict[str, float | None]) -> str:
    mean, spread = number["mean"], number["sd"]
    if mean is None:
        return "-"
    return f"{mean:.4g}" if spread is None else f"{mean:.4g} ± {spread:.2g}"

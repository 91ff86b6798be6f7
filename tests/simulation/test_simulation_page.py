"""The page of a simulation: the numbers of its result files, in one safe file, and what is missing by name."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedeq_edge.cli import command_line
from fedeq_edge.errors import ConfigError, StateError
from fedeq_edge.report.simulation import Source, page
from fedeq_edge.simulation import run
from fedeq_edge.simulation.collect import Collected, collect
from fedeq_edge.simulation.experiment import load
from fedeq_edge.simulation.results import encoded, read

EXPERIMENT = """
name = "pages"
seeds = [0, 1]

[data]
file = "digits"
clients = 4
unseen = 1

[model]
channels = 8
groups = 4
stem_width = 4

[train]
rounds = 2
epochs = 1
budgets = [2, 3]

[evaluation]
every = 1
budgets = [1, 3]

[[variants]]
name = "ours"

[[variants]]
name = "alone"
method = { preset = "local" }
"""
COMMAND = ["simulate", "pages.toml", "--out", "out"]
SOURCE = Source(command="fedeq simulate pages.toml --report page.html", text=EXPERIMENT)
Line = dict[str, Any]


def fedeq(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedeq_edge", *COMMAND, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the experiment, its results and its page, made by the command."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "pages.toml").write_text(EXPERIMENT)
    done = fedeq(folder, "--workers", "2", "--report", "page.html")
    assert done.returncode == 0, done.stderr
    return folder


def found_in(folder: Path, seeds: int | None = None) -> Collected:
    return collect(load(folder / "pages.toml"), run.Options(seeds=seeds, out=folder / "out"))


def copied(whole: Path, folder: Path, change: Callable[[Line], Line] = lambda line: line) -> Path:
    """The same results with every line changed."""
    (folder / "out").mkdir()
    (folder / "pages.toml").write_text(EXPERIMENT)
    for path in (whole / "out").glob("*.jsonl"):
        lines = map(json.loads, path.read_text().splitlines())
        (folder / "out" / path.name).write_bytes(b"".join(encoded(change(line)) for line in lines))
    return folder


def text(document: str) -> str:
    """What a reader reads, white space as one blank."""
    body = re.sub(r"<style>.*?</style>", "", document, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


class Tables(HTMLParser):
    """Rows of all tables by the label of the region that they stand in; fails where tags do not match."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: dict[str, list[list[str]]] = {}
        self._label = ""
        self.feed(document)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("meta", "br"):
            return
        self.open.append(tag)
        told = dict(attrs)
        if told.get("role") == "region":
            self._label = str(told["aria-label"])
            self.rows[self._label] = []
        if tag == "tr":
            self.rows[self._label].append([])
        if tag in ("td", "th"):
            self.rows[self._label][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            cells = self.rows[self._label][-1]
            cells[-1] = " ".join(f"{cells[-1]} {data}".split())

    def column(self, label: str, title: str) -> dict[str, str]:
        """The cells below this title, by variant; small print after the name left out."""
        head, *rows = self.rows[label]
        return {row[0].split()[0]: row[head.index(title)] for row in rows}


def spelt(values: list[float]) -> str:
    """Mean and standard deviation of two seeds in percent, as the page spells it."""
    first, second = values
    return f"{50 * (first + second):.2f} ± {100 * abs(first - second) / 2**0.5:.2f}"


def ends(folder: Path, variant: str) -> list[Line]:
    return [read(folder / "out" / f"{variant}-seed{seed}.jsonl").end for seed in (0, 1)]


def test_the_numbers_are_those_of_the_results(whole: Path) -> None:
    tables = Tables((whole / "page.html").read_text())
    label = "Accuracy of all variants"
    for title, key in (("Personal", "personal"), ("Local", "local"), ("Unseen clients", "unseen")):
        told = tables.column(label, title)
        assert told == {name: spelt([end[key] for end in ends(whole, name)]) for name in ("ours", "alone")}
    ours = ends(whole, "ours")
    assert tables.column(label, "Consensus") == {"ours": spelt([end["consensus"] for end in ours]), "alone": "–"}
    at_round_1 = tables.rows["Personal accuracy by rounds, in numbers"][1]
    measured = [
        next(line["personal"] for line in read(path).of_kind("evaluation"))
        for path in sorted((whole / "out").glob("ours-*.jsonl"))
    ]
    assert at_round_1 == ["1", spelt(measured)]


def test_bytes_of_a_client_and_round_are_all_bytes_by_all_contributions(whole: Path) -> None:
    clients = [read(whole / "out" / f"ours-seed{seed}.jsonl").of_kind("client") for seed in (0, 1)]
    each = [sum(line["bytes_up"] for line in lines) / sum(line["rounds"] for line in lines) for lines in clients]
    told = Tables((whole / "page.html").read_text()).column(
        "Bytes and rounds of all variants", "Up, a client and round"
    )
    assert told["ours"].startswith(f"{sum(each) / 2 / 1000:.2f} kB")
    assert told["alone"] == "–"


def test_the_page_needs_nothing_else(whole: Path) -> None:
    document = (whole / "page.html").read_text()
    assert not re.search(r"(?i)<script|<link|<img|<iframe|@import|url\(|\bsrc=|\bhref=|https?:|\bon\w+=", document)
    assert not re.search(r"\b(nan|None|inf)\b", document)
    positions = [float(at) for at in re.findall(r"(?:left|bottom|width):(-?[\d.e-]+)%", document)]
    assert positions
    assert all(-0.01 <= position <= 100.01 for position in positions)


def test_under_every_plot_and_table_stands_what_makes_it_again(whole: Path) -> None:
    document = (whole / "page.html").read_text()
    command = "fedeq simulate pages.toml --out out --workers 2 --report page.html"
    drawn = document.count("<table") + document.count('class="chart"')
    at_the_end_and_once_for_three_dot_plots = 1 - 2
    assert document.count(f"<code>{command}</code>") == drawn + at_the_end_and_once_for_three_dot_plots
    header = read(whole / "out" / "ours-seed0.jsonl").header
    told = text(document)
    for fact in (header["version"], header["libraries"]["torch"], header["data"], "seeds 0, 1", "s of CPU"):
        assert fact in told
    assert "stem_width = 4" in told  # the experiment itself


def test_finished_results_are_drawn_again_without_running_and_to_the_same_bytes(whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "out").glob("*.jsonl")}
    first = (whole / "page.html").read_bytes()
    done = fedeq(whole, "--workers", "2", "--report", "page.html")
    assert done.returncode == 0, done.stderr
    assert (whole / "page.html").read_bytes() == first
    assert {path: path.stat().st_mtime_ns for path in (whole / "out").glob("*.jsonl")} == before


def test_a_run_that_is_stopped_leaves_a_page_that_names_what_is_missing(tmp_path: Path) -> None:
    alone = 'name = "alone"\nmethod = { preset = "local" }'
    assert alone in EXPERIMENT
    endless = EXPERIMENT.replace(alone, 'name = "endless"\ntrain = { rounds = 100000 }')
    (tmp_path / "pages.toml").write_text(endless)
    command = [sys.executable, "-m", "fedeq_edge", *COMMAND, "--workers", "1", "--report", "page.html"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as going:
        assert going.stderr is not None
        next(line for line in going.stderr if line.startswith("run 3/4"))
        going.send_signal(signal.SIGINT)
        told = going.stderr.read()
        assert going.wait(60) == 130
    assert "report: page.html, 2 of 4 runs missing" in told
    words = text((tmp_path / "page.html").read_text())
    assert "This page is not of the whole experiment: 2 of 4 runs are missing." in words
    assert re.search(r"not begun: (endless seed 0, )?endless seed 1", words)
    assert re.search(r"not (finished|begun): endless seed 0", words)


def test_what_has_finished_is_told_without_running_anything_and_what_has_not_as_well(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(whole, tmp_path)
    gone = folder / "out" / "alone-seed1.jsonl"
    gone.write_bytes(gone.read_bytes().rsplit(b"\n", 2)[0] + b"\n")
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(command_line(), [*COMMAND, "--no-run", "--json", "--report", "page.html"])
    assert done.exit_code == 0, done.stderr
    missing = [{"variant": "alone", "seed": 1, "reason": "not finished"}]
    assert json.loads(done.stdout)["missing"] == missing
    assert "missing: alone seed 1 (not finished)" in " ".join(done.stderr.split())
    assert "1 of 4 runs is missing" in text((folder / "page.html").read_text())


def test_a_file_of_another_experiment_is_not_taken_for_a_result(whole: Path, tmp_path: Path) -> None:
    folder = copied(whole, tmp_path)
    (folder / "pages.toml").write_text(EXPERIMENT.replace("rounds = 2", "rounds = 3"))
    found = found_in(folder)
    assert found.results == []
    assert {one.reason for one in found.missing} == {"its file is of another experiment"}


def test_an_older_file_lacks_some_numbers_and_is_shown_all_the_same(whole: Path, tmp_path: Path) -> None:
    def older(line: Line) -> Line:
        if line["kind"] == "header":
            del line["experiment"]["wire"]  # at its default
        return {key: value for key, value in line.items() if key != "workers_cpu_s"}

    found = found_in(copied(whole, tmp_path, older))
    assert len(found.results) == 4
    assert "CPU of the workers not recorded" in text(page(found, SOURCE))


def test_what_worker_processes_take_is_counted(whole: Path) -> None:
    walls = [wall for path in (whole / "out").glob("*.jsonl") for wall in read(path).of_kind("wall")]
    assert all(wall["workers_cpu_s"] > 0.0 for wall in walls)


def test_one_seed_shows_no_spread_and_makes_no_winner(whole: Path) -> None:
    document = page(found_in(whole, seeds=1), SOURCE)
    words = text(document)
    assert "no spread over seeds is known" in words
    assert "±" not in words
    assert 'class="stem"' not in document
    assert 'class="band' not in document


def test_names_and_files_of_others_are_escaped(whole: Path, tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"

    def renamed(line: Line) -> Line:
        return {**line, "client": evil} if line["kind"] == "client" else line

    document = page(found_in(copied(whole, tmp_path, renamed)), Source(command=f"fedeq {evil}", text=evil))
    assert "<script" not in document
    assert "&lt;script&gt;" in document
    Tables(document)


def without_courses(line: Line) -> Line:
    return {**line, "kind": "passed over"} if line["kind"] == "evaluation" else line


def at_one_budget(line: Line) -> Line:
    return {**line, "at": {"3": line["at"]["3"]}, "unseen": None, "residual": None} if line["kind"] == "end" else line


def never_contributed(line: Line) -> Line:
    changes: dict[str, Line] = {"client": {"rounds": 0}, "round": {"forward": [], "accuracy": None}}
    return {**line, **changes.get(line["kind"], {})}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_courses, "there is no course to draw"),
        (at_one_budget, "it was measured at one K"),
        (never_contributed, "– – "),
    ],
)
def test_what_nobody_measured_is_left_out_or_a_dash(
    change: Callable[[Line], Line], said: str, whole: Path, tmp_path: Path
) -> None:
    document = page(found_in(copied(whole, tmp_path, change)), SOURCE)
    Tables(document)
    assert said in text(document)
    assert not re.search(r"\b(nan|None|inf)\b", document)


@pytest.mark.parametrize(("target", "rounds"), [(0.001, "1"), (1.0, "–")])
def test_a_target_of_the_experiment_is_told_with_what_it_took(
    target: float, rounds: str, whole: Path, tmp_path: Path
) -> None:
    def asked(line: Line) -> Line:
        if line["kind"] == "header":
            line["experiment"]["evaluation"]["target"] = target
        return line

    found = found_in(copied(whole, tmp_path, asked))
    assert found.results == []  # it is another experiment than the file's
    (tmp_path / "pages.toml").write_text(EXPERIMENT.replace("[evaluation]", f"[evaluation]\ntarget = {target}"))
    tables = Tables(page(found_in(tmp_path), SOURCE))
    label = "Bytes and rounds of all variants"
    assert tables.column(label, "Rounds to it")["ours"] == rounds
    assert (tables.column(label, "Bytes to it")["ours"] == "–") == (rounds == "–")


def many(whole: Path, folder: Path, variants: int, clients: int, seeds: int) -> Collected:
    """Results of a larger experiment: those of ours, multiplied."""
    result = read(whole / "out" / "ours-seed0.jsonl")
    found = []
    for variant in range(variants):
        for seed in range(seeds):
            lines = [_numbered(line, f"method-{variant}", seed) for line in result.lines if line["kind"] != "client"]
            line = result.of_kind("client")[0]
            told = [{**line, "client": f"client-{at}", "personal": at / clients} for at in range(clients)]
            path = folder / f"{variant}-{seed}.jsonl"
            path.write_bytes(b"".join(map(encoded, [*lines[:-1], *told, lines[-1]])))
            found.append(read(path))
    return Collected(results=found, tuning=[], missing=[])


def _numbered(line: Line, variant: str, seed: int) -> Line:
    if line["kind"] == "header":
        scores = {f"train.learning_rate = {rate}": 0.9 for rate in (0.1, 0.3, 1.0)}
        tuned: Mapping[str, Any] = {"chosen": next(iter(scores)), "seed": 100, "validation": scores}
        return {**line, "experiment": {**line["experiment"], "variant": variant}, "seed": seed, "tuned": tuned}
    if line["kind"] == "end":
        return {**line, "personal": 0.9 - 0.01 * int(variant.rpartition("-")[2]) + 0.001 * seed}
    return line


def test_many_variants_stay_readable_and_the_page_small(whole: Path, tmp_path: Path) -> None:
    document = page(many(whole, tmp_path, variants=17, clients=30, seeds=3), SOURCE)
    assert len(document.encode()) < 300_000  # 2 MB are allowed
    assert "the other 12" in document
    chart = document[document.index('class="chart"') :]
    assert chart[: chart.index("</svg>")].count('<path class="line') == 6  # the best five, and all others as one
    assert "How settings were chosen" in document


def test_thousands_of_clients_do_not_make_the_page_heavy(whole: Path, tmp_path: Path) -> None:
    document = page(many(whole, tmp_path, variants=2, clients=3000, seeds=1), SOURCE)
    assert len(document.encode()) < 100_000


@pytest.mark.parametrize(
    ("name", "said"), [("page.txt", "name it NAME.html"), ("absent/page.html", "the folder absent does not exist")]
)
def test_a_page_that_cannot_be_written_is_refused_before_anything_runs(
    name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pages.toml").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        CliRunner().invoke(command_line(), [*COMMAND, "--report", name], catch_exceptions=False)
    assert not (tmp_path / "out").exists()


def test_nothing_to_tell_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pages.toml").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StateError, match="no run of this experiment has finished in out"):
        CliRunner().invoke(command_line(), [*COMMAND, "--no-run"], catch_exceptions=False)

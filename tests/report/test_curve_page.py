"""The drawn curve: one safe file, whatever the numbers."""

import math
import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedeq_edge.deq.certificate import Certificate
from fedeq_edge.report.curve import Subject, drawing, page, panels
from fedeq_edge.training.curve import Curve, Point, Timing

SUBJECT = Subject(name="personal.fedeq", samples="40 test samples of data.npz", own=4)


def point(K: int, *, accuracy: float | None = 0.9, residual: float = 0.1, proof: bool = True) -> Point:
    proven = Certificate(norm="max", gamma=0.5, evaluations=K, bound=0.5 ** (K + 1), unit="state")
    timing = Timing(alone_us=30.0 + K, batch_us=2.0 + 0.1 * K)
    return Point(
        evaluations=K,
        accuracy=accuracy,
        residual_mean=residual,
        residual_max=2 * residual,
        certificate=proven if proof else None,
        change=residual / 3,
        timings={"numpy": timing, "torch": timing},
    )


def curve(*points: Point) -> Curve:
    return Curve(samples=40, points=points)


FULL = curve(*(point(K, residual=0.5**K) for K in (1, 2, 4, 8)))


class Balance(HTMLParser):
    """Fails where a tag is closed that is not the one open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"


@pytest.mark.parametrize("draw", [page, drawing])
@pytest.mark.parametrize(
    "numbers",
    [FULL, curve(point(3)), curve(point(1, accuracy=None, proof=False, residual=0.0), point(1000, proof=False))],
    ids=["full", "one budget", "little known"],
)
def test_a_drawing_is_well_formed_stays_inside_its_plots_and_loads_nothing(
    draw: Callable[[Curve, Subject], str], numbers: Curve
) -> None:
    document = draw(numbers, SUBJECT)
    balance = Balance()
    balance.feed(document)
    assert balance.open == []
    positions = [float(at) for at in re.findall(r' (?:cx|cy|x1|y1|x|y)="(-?[\d.e-]+)%"', document)]
    assert positions
    assert all(0 <= position <= 100 for position in positions)
    links = re.sub(r'xmlns="http://www\.w3\.org/2000/svg"', "", document)
    assert not re.search(r"(?i)<script|<link|<img|<iframe|@import|url\(|\bsrc=|\bhref=|https?:|\bon\w+=", links)
    assert not re.search(r"\b(nan|None|inf)\b", document)


def test_names_of_files_are_escaped() -> None:
    evil = Subject(name='<script>alert("x")</script>', samples="<img src=x>", own=4)
    for document in (page(FULL, evil), drawing(FULL, evil)):
        assert "<script" not in document
        assert "<img" not in document


def test_accuracy_is_drawn_only_where_it_is_known_and_the_proof_likewise() -> None:
    full = panels(FULL, own=4)
    assert [panel.title for panel in full] == ["Accuracy", "Distance from the fixed point", "Time"]
    assert "Bound on |z_K − z*|, proven" in [line.label for line in full[1].chart.lines]
    little = panels(curve(*(point(K, accuracy=None, proof=False) for K in (1, 2))), own=4)
    assert [panel.title for panel in little] == ["Distance from the fixed point", "Time"]
    assert not [line for line in little[0].chart.lines if "Bound" in line.label]


def test_the_models_own_budget_is_marked_if_it_is_on_the_axis() -> None:
    assert [panel.own for panel in panels(FULL, own=4)] == [66.67] * 3  # log 4 / log 8
    assert [panel.own for panel in panels(FULL, own=9)] == [None] * 3
    assert '<tr class="own"><th scope="row">4</th>' in page(FULL, SUBJECT)


def test_a_sample_without_a_finite_residual_interrupts_its_line_and_nothing_else() -> None:
    broken = curve(point(1, residual=0.4), point(2, residual=math.inf), point(4, residual=0.1))
    lines = {line.label: line for line in panels(broken, own=1)[1].chart.lines}
    assert lines["Residual, mean over samples"].path.count("M") == 2
    assert lines["Bound on |z_K − z*|, proven"].path.count("M") == 1


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=12, unique=True),
    st.lists(st.floats(0, 1e6), min_size=12, max_size=12),
    st.lists(st.floats(0, 1), min_size=12, max_size=12),
)
def test_any_numbers_lie_on_their_axes(budgets: list[int], residuals: list[float], shares: list[float]) -> None:
    told = zip(sorted(budgets), residuals, shares, strict=False)
    numbers = curve(*(point(K, residual=residual, accuracy=share) for K, residual, share in told))
    for panel in panels(numbers, own=4):
        places = [at for line in panel.chart.lines for marker in line.markers for at in marker]
        assert all(0 <= place <= 100 for place in places)
        assert all(0 <= tick.at <= 100 for tick in [*panel.chart.x, *panel.chart.y])
        assert len(panel.chart.y) >= 2

"""Benchmarks run the sections that they are asked for, and say in one line what they cannot run."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from tests.bench.figures import Figure, NotRun, har_file, measure


def fast() -> Iterator[Figure]:
    yield Figure(section="fast", name="a thing", value=1.0, goal=2.0)


def absent() -> Iterator[Figure]:
    raise NotRun("data.npz does not exist; get it")
    yield


SECTIONS: dict[str, Callable[[], Iterable[Figure]]] = {"absent": absent, "fast": fast}


def test_a_name_that_is_no_section_is_answered_with_all_names_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        measure(SECTIONS, ["fast", "typo"])

    assert caught.value.code == 2
    assert capsys.readouterr() == ("", "no section typo; choose from absent, fast\n")


def test_a_section_that_cannot_run_is_reported_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    measure(SECTIONS, [])

    told = capsys.readouterr()
    first, second = map(json.loads, told.out.splitlines())
    assert first == {"section": "absent", "not_run": "data.npz does not exist; get it"}
    assert (second["section"], second["value"]) == ("fast", 1.0)
    assert told.err.splitlines()[0] == "absent      not run: data.npz does not exist; get it"


def test_a_section_asked_for_by_name_that_cannot_run_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        measure(SECTIONS, ["absent", "fast"])

    assert caught.value.code == 1
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_data_set_that_is_not_there_is_named_with_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BENCH_DATA", str(tmp_path))
    with pytest.raises(NotRun, match=r"har\.npz does not exist; name the folder of har\.npz with BENCH_DATA"):
        har_file()

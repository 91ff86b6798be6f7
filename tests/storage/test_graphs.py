"""Training graphs on a device's disk: found by what they are, replaced as a whole."""

import os
from pathlib import Path

import pytest

from fedeq_edge.storage.graphs import GraphFolder
from fedeq_edge.wire.chunks import digest

LIMIT_BYTES = 1000
FIRST, SECOND = b"first graph", b"second graph"


def folder_at(place: Path) -> GraphFolder:
    return GraphFolder(place / "training.onnx", [place / "absent", place / "models"], limit_bytes=LIMIT_BYTES)


def test_a_graph_is_found_by_its_digest_and_not_after_it_was_damaged(tmp_path: Path) -> None:
    graphs = folder_at(tmp_path)
    assert graphs.find(digest(FIRST)) is None
    graphs.keep(FIRST)
    assert graphs.find(digest(FIRST)) == tmp_path / "training.onnx"
    (tmp_path / "training.onnx").write_bytes(FIRST[:-1])
    assert graphs.find(digest(FIRST)) is None


def test_a_graph_that_came_with_a_release_is_found_among_other_models(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "personal.onnx").write_bytes(bytes(LIMIT_BYTES + 1))
    (tmp_path / "models" / "secret.onnx").symlink_to(tmp_path / "nowhere")
    (tmp_path / "models" / "plant.onnx").write_bytes(FIRST)
    assert folder_at(tmp_path).find(digest(FIRST)) == tmp_path / "models" / "plant.onnx"
    assert folder_at(tmp_path).find(digest(bytes(LIMIT_BYTES + 1))) is None


def test_a_kill_while_a_graph_is_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_at(tmp_path).keep(FIRST)

    def killed(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        folder_at(tmp_path).keep(SECOND)
    assert folder_at(tmp_path).find(digest(FIRST)) is not None
    assert folder_at(tmp_path).find(digest(SECOND)) is None

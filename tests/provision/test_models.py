"""What goes to boards is loaded first: personal models, and training graphs."""

from pathlib import Path

import pytest

from fedeq_edge.backends import build_graph
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError
from fedeq_edge.provision.models import check_model

GRAPH = build_graph(ModelSpec(input_shape=(6,), classes=2, channels=8))


def test_a_training_graph_may_go_to_boards(tmp_path: Path) -> None:
    path = tmp_path / "plant.onnx"
    path.write_bytes(GRAPH)
    check_model(path)


@pytest.mark.parametrize("content", [GRAPH[:-40], GRAPH[: len(GRAPH) // 2], b""], ids=["end", "half", "nothing"])
def test_a_training_graph_that_was_cut_may_not(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plant.onnx"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"plant\.onnx cannot be loaded, so that no board gets it"):
        check_model(path)

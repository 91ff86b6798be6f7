"""The graph that a gateway makes for devices without torch, or why it has none."""

import logging
import sys

import pytest

from fedeq_edge.deq.description import describe
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.gateway import _training_graph
from fedeq_edge.onnx.trainer import TrainingGraph
from fedeq_edge.protocol.graphs import GRAPH_LIMIT_BYTES
from fedeq_edge.settings import AggregatorSettings
from fedeq_edge.training.recommend import recommend

SMALL = AggregatorSettings(federation="f", model=ModelSpec(input_shape=(4,), classes=2))


@pytest.mark.parametrize("shape", [(207,), (9, 128), (1, 28, 28)])
def test_graphs_of_the_recommended_models_are_the_same_every_time_and_far_below_the_limit(
    shape: tuple[int, ...],
) -> None:
    spec, _, _ = recommend(shape, 10, shift=(0.1,), scale=(3.0,))
    chosen = AggregatorSettings(federation="f", model=spec)
    graph = _training_graph(chosen)
    assert graph == _training_graph(chosen)
    assert len(graph) < GRAPH_LIMIT_BYTES / 4
    assert TrainingGraph(graph).description == describe(spec)


def test_a_gateway_without_onnx_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "fedeq_edge.onnx.training", raising=False)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with caplog.at_level(logging.WARNING, logger="fedeq_edge.gateway"):
        assert _training_graph(SMALL) == b""
    (record,) = caplog.records
    assert "pip install 'fedeq-edge[onnx]'" in record.__dict__["reason"]

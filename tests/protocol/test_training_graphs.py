"""Devices without torch get their training graph through the broker: whole, as announced, and once."""

import tracemalloc
import zlib
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fedeq_edge.errors import RemoteWireError
from fedeq_edge.protocol.graphs import GRAPH_LIMIT_BYTES, packed, unpacked
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.transport.memory import MemoryBroker
from fedeq_edge.wire import chunks, messages
from fedeq_edge.wire.chunks import digest
from fedeq_edge.wire.messages import GraphName
from tests.protocol.fleet import TOPICS, Device, Fleet, Quadratics

TWO = Quadratics.drawn(2)
GRAPH = np.random.default_rng(0).bytes(5 * chunks.BLOCK_BYTES + 17)
NAME = digest(GRAPH)
TRANSFER = digest(packed(GRAPH)[1])


def fetches(fleet: Fleet, device: str) -> int:
    """How often this device has asked for the graph."""
    found = [messages.decode(said.payload).message for said in fleet.devices[device].said]
    return sum(isinstance(message, messages.Fetch) and message.model == TRANSFER for message in found)


def reasons(device: Device) -> list[str]:
    return [str(note.facts.get("reason", "")) for note in device.notes]


def test_the_manifest_names_the_graph_and_every_device_fetches_it_once() -> None:
    fleet = Fleet(TWO, rounds=3, graph=GRAPH)
    fleet.run()
    assert [device.graphs for device in fleet.devices.values()] == [{NAME}, {NAME}]
    assert [device.trained for device in fleet.devices.values()] == [[1, 2, 3], [1, 2, 3]]
    assert [fetches(fleet, name) for name in fleet.devices] == [1, 1]


def test_a_graph_that_lies_on_the_disk_is_not_fetched() -> None:
    fleet = Fleet(TWO, rounds=2, graph=GRAPH)
    for device in fleet.devices.values():
        device.graphs = {NAME}
        device.restart()
    fleet.run()
    assert [fetches(fleet, name) for name in fleet.devices] == [0, 0]


def test_a_device_that_needs_no_graph_asks_for_none() -> None:
    fleet = Fleet(TWO, rounds=2, graph=GRAPH)
    for device in fleet.devices.values():
        device.graphs = None
        device.restart()
    fleet.run()
    assert [fetches(fleet, name) for name in fleet.devices] == [0, 0]


def _undisturbed_actions() -> int:
    """How many actions the aggregator carries out in the whole of the federation below."""
    fleet = Fleet(TWO, rounds=1, graph=GRAPH)
    fleet.run()
    return fleet.carried


@pytest.mark.parametrize("boundary", range(_undisturbed_actions()))
def test_a_kill_of_the_aggregator_while_graphs_are_on_their_way_changes_nothing(boundary: int, tmp_path: Path) -> None:
    fleet = Fleet(TWO, rounds=1, graph=GRAPH, folder=tmp_path, kill_after=boundary)
    fleet.run()
    assert fleet.kills == 1
    assert all(device.graphs == {NAME} for device in fleet.devices.values())
    fleet.check_counted_once()
    fleet.check_duals()


def test_a_device_that_dies_amid_its_graph_begins_it_again() -> None:
    fleet = Fleet(TWO, rounds=2, graph=GRAPH)
    device = fleet.devices["d0"]
    fleet.run(lambda: device.client.status()["doing"] == "fetching" and fetches(fleet, "d0") == 1)
    device.restart()
    fleet.run()
    assert device.trained == [1, 2]
    assert device.graphs == {NAME}


def test_graphs_arrive_over_a_bad_wire() -> None:
    broker = MemoryBroker(loss=0.05, duplicate=0.2, reorder=True, seed=1)
    fleet = Fleet(TWO, rounds=3, graph=GRAPH, broker=broker, schedule=Schedule(deadline_s=60.0))
    fleet.run()
    assert all(device.graphs == {NAME} for device in fleet.devices.values())


def wants_the_graph() -> tuple[Fleet, Device]:
    """A fleet, and a device of it that has just asked for its graph."""
    fleet = Fleet(TWO, rounds=2, graph=GRAPH)
    device = fleet.devices["d0"]
    fleet.run(lambda: fetches(fleet, "d0") == 1)
    return fleet, device


def arrives(fleet: Fleet, device: Device, chunk: messages.Chunk, piece: bytes) -> None:
    payload = messages.encode(chunk, piece)
    device.carry_out(device.client.arrived(TOPICS.down(device.name), payload, fleet.now))


def test_a_graph_that_is_not_what_was_announced_is_named_declined_and_not_kept() -> None:
    fleet, device = wants_the_graph()
    arrives(fleet, device, messages.Chunk(transfer=TRANSFER, index=0, size=5), b"wrong")
    assert device.graphs == set()
    assert device.client.refusals["malformed"] == 1
    assert any("another sha256" in reason and "restart the aggregator" in reason for reason in reasons(device))
    fleet.settle()
    declined = [note.facts for note in fleet.notes if note.event == "device declines"]
    assert [facts["device"] for facts in declined] == ["d0"]
    assert "another sha256" in str(declined[0]["reason"])


def test_a_graph_over_the_limit_is_refused_before_anything_is_kept_of_it() -> None:
    fleet, device = wants_the_graph()
    arrives(fleet, device, messages.Chunk(transfer=TRANSFER, index=0, size=GRAPH_LIMIT_BYTES + 1), bytes(8192))
    assert any("over the limit" in reason for reason in reasons(device))
    fleet.run()
    assert device.graphs == {NAME}


def test_a_device_that_needs_a_graph_declines_where_the_federation_has_none() -> None:
    fleet = Fleet(TWO, rounds=1, schedule=Schedule(min_devices=2, quorum=0.5, deadline_s=40.0))
    device = fleet.devices["d0"]
    device.graphs = set()
    device.restart()
    fleet.run()
    assert (device.trained, fleet.devices["d1"].trained) == ([], [1])
    assert any("fedeq-edge[onnx]" in reason and 'backend = "torch"' in reason for reason in reasons(device))


def test_a_new_graph_of_a_restarted_aggregator_is_fetched_and_the_trainer_is_told(tmp_path: Path) -> None:
    fleet = Fleet(TWO, rounds=4, graph=GRAPH, folder=tmp_path)
    fleet.run_to_round(2)
    fleet.graph = GRAPH[::-1]
    configured = len(fleet.devices["d0"].configured)
    fleet.kill_aggregator()
    fleet.run()
    for device in fleet.devices.values():
        assert device.graphs == {NAME, digest(GRAPH[::-1])}
    assert len(fleet.devices["d0"].configured) == configured + 1


def test_a_graph_that_inflates_to_another_one_is_named_and_not_kept() -> None:
    """An aggregator that announces one graph and sends another, both names of the transfer being right."""
    fleet, device = wants_the_graph()
    _, other = packed(b"other")
    manifest = msgspec.structs.replace(device.configured[-1], graph=GraphName(sha256=NAME, transfer=digest(other)))
    device.carry_out(device.client.arrived(TOPICS.manifest, messages.encode(manifest), fleet.now))
    arrives(fleet, device, messages.Chunk(transfer=digest(other), index=0, size=len(other)), other)
    assert device.graphs == set()
    assert any("another sha256" in reason for reason in reasons(device))


def test_what_inflates_beyond_the_limit_takes_no_more_memory_than_that() -> None:
    bomb = zlib.compress(bytes(64 * GRAPH_LIMIT_BYTES))
    tracemalloc.start()
    with pytest.raises(RemoteWireError, match="another sha256"):
        unpacked(GraphName(sha256=NAME, transfer=digest(bomb)), bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * GRAPH_LIMIT_BYTES

"""Federations on Flower: the same numbers as on our own wire, and nobody pays for another's trouble."""

# pyright: reportMissingImports=false
# Flower is not in the environment in which types are checked (pyproject.toml, flower).

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

pytest.importorskip(
    "flwr", reason="Flower needs an environment of its own, as it wants an older protobuf than constraints.txt has"
)

from flwr.app import Message, RecordDict

from fedeq_edge import modelfile
from fedeq_edge.consensus.privacy import Privacy
from fedeq_edge.data.npz import ClientData
from fedeq_edge.errors import ConfigError, DataError
from fedeq_edge.flower import ConsensusStrategy, client_app, content
from fedeq_edge.flower.__main__ import main as copy_example
from fedeq_edge.flower.memory import Keeper
from fedeq_edge.settings import AggregatorSettings
from fedeq_edge.wire import coding, messages
from tests.flower.in_process import RUN_ID, Change, InProcessGrid, NodeConfig, data_of, load, partitions, settings
from tests.flower.machines import Machines
from tests.training.local_rounds import CHEAP

# What Flower and its libraries say of themselves is not ours to act on.
pytestmark = pytest.mark.filterwarnings("default")
LIAR = 101  # of the nodes 100 to 103


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Flower writes every round to the terminal."""
    flower = logging.getLogger("flwr")
    level = flower.level
    flower.setLevel(logging.ERROR)
    yield
    flower.setLevel(level)


def ran(
    chosen: AggregatorSettings, nodes: int = 4, changed: dict[int, Change] | None = None, **options: Any
) -> tuple[ConsensusStrategy, InProcessGrid]:
    grid = InProcessGrid(client_app(chosen, load, calibration=CHEAP, **options), partitions(nodes))
    grid.changed = changed or {}
    strategy = ConsensusStrategy(chosen)
    strategy.start(grid)
    return strategy, grid


def check_duals(strategy: ConsensusStrategy, grid: InProcessGrid, folder: Path | None = None) -> None:
    """What every node holds is what the sums hold of it, bit for bit."""
    consensus = strategy.server.consensus
    for node, context in grid.contexts.items():
        name = f"client-{node - 100}"
        state = Keeper(context=context, device=name, folder=folder).load().state
        assert state.pending is None
        np.testing.assert_array_equal(state.nu, strategy.server.duals.get(name), err_msg=name)
    np.testing.assert_array_equal(consensus.sums[0], consensus.recomputed()[0])
    assert consensus.sums[1] == consensus.recomputed()[1]


# ---- the same numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fraction": 0.5, "codec": "int4+z"},
        {"fraction": 0.5, "robust": "clip", "weighting": "objective"},
        {"preset": "fedrep", "robust": "median"},
        {"preset": "fedavg", "codec": "f32"},
        {"preset": "fedeq-published"},
    ],
    ids=str,
)
def test_consensus_and_reports_are_those_of_our_own_wire_bit_for_bit(options: dict[str, Any]) -> None:
    chosen = settings(**options)
    chosen = replace(chosen, schedule=replace(chosen.schedule, min_devices=4))
    ours = Machines(chosen, {f"client-{number}": data_of(f"client-{number}") for number in range(4)}, CHEAP)
    ours.run()
    strategy, _ = ran(chosen)
    np.testing.assert_array_equal(strategy.server.consensus.z_hat, ours.z)
    assert {name: report.accuracy_personal for name, report in strategy.reports.items()} == {
        name: report.accuracy_personal for name, report in ours.reports.items()
    }


def test_every_node_ends_with_the_dual_that_the_sums_hold() -> None:
    check_duals(*ran(settings(fraction=0.5)))


def test_a_second_run_gives_the_same_consensus() -> None:
    first, second = (ran(settings(fraction=0.5))[0].server.consensus.z_hat for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_the_result_holds_the_consensus_and_another_run_may_start_from_it() -> None:
    chosen = settings(rounds=2)
    grid = InProcessGrid(client_app(chosen, load, calibration=CHEAP), partitions(2))
    result = ConsensusStrategy(chosen).start(grid)
    again = ConsensusStrategy(chosen)
    again.start(InProcessGrid(grid.app, partitions(2)), result.arrays, num_rounds=1)
    assert again.history[0]["primal_residual"] < 0.9 * 0.5875  # of a first round from the seed
    assert result.train_metrics_clientapp[2]["counted"] == 2
    assert 0.5 < float(str(result.evaluate_metrics_clientapp[2]["accuracy-personal"])) <= 1.0


def test_a_node_that_holds_the_last_consensus_gets_the_step_from_it_alone() -> None:
    strategy, grid = ran(settings(codec="int4"), nodes=2)
    size = strategy.server.consensus.z_hat.size
    downs = [sum(map(len, frames_of(sent))) for sent in grid.sent if sent.metadata.message_type == "train"]
    assert min(downs[:2]) > coding.largest_bytes("f32", size)
    assert max(downs[2:]) < coding.largest_bytes("int4", size) + 900


# ---- nodes that come, go, forget and fail ----------------------------------------------------------------------


def frames_of(message: Message) -> list[bytes]:
    return content.unpack(message.content, 2**20)


def with_contribution(make: Callable[[messages.Contribution, bytes], tuple[messages.Contribution, bytes]]) -> Change:
    """The answer with another contribution in it."""

    def change(reply: Message) -> Message:
        *before, last = frames_of(reply)
        received = messages.decode(last)
        if isinstance(received.message, messages.Contribution):
            message, body = make(received.message, bytes(received.body))
            reply.content = content.pack([*before, messages.encode(message, body)])
        return reply

    return change


def with_content(made: Callable[[], RecordDict]) -> Change:
    def change(reply: Message) -> Message:
        if reply.metadata.message_type == "train":
            reply.content = made()
        return reply

    return change


def silent(reply: Message) -> Message | None:
    return None if reply.metadata.message_type == "train" else reply


def _nan(message: messages.Contribution, body: bytes) -> tuple[messages.Contribution, bytes]:
    return replace(message, codec="f32"), np.full(message.length, np.nan, "<f4").tobytes()


BAD: dict[str, tuple[Change, str]] = {
    "short": (with_contribution(lambda message, body: (message, body[:-1])), "bytes, got"),
    "length": (with_contribution(lambda message, body: (replace(message, length=7), body)), "expected"),
    "codec": (with_contribution(lambda message, body: (replace(message, codec="int16"), body)), "as int16"),
    "nan": (with_contribution(_nan), "NaN"),
    "step": (
        with_contribution(lambda m, _: (replace(m, codec="f32"), np.full(m.length, 1e30, "<f4").tobytes())),
        "at most",
    ),
    "base": (with_contribution(lambda m, body: (replace(m, base=bytes(32)), body)), "another consensus"),
    "round": (with_contribution(lambda m, body: (replace(m, round=99), body)), "round 99"),
    "run": (with_contribution(lambda m, body: (replace(m, run="other"), body)), "'other'"),
    "huge": (with_content(lambda: content.pack([bytes(10**6)])), "at most"),
    "garbage": (with_content(lambda: content.pack([b"FDQ1" + bytes(60)])), "frame claims"),
    "cut": (with_content(lambda: _raw(b"\xff\xff\xff\xff1")), "ends inside"),
    "nothing": (with_content(lambda: content.pack([])), "nothing"),
    "strange": (with_content(RecordDict), "fedeq-edge"),
}


def _raw(data: bytes) -> RecordDict:
    made = content.pack([])
    made.array_records[content.RECORD]["frames"].data = data
    return made


@pytest.mark.parametrize("trouble", BAD)
def test_a_bad_answer_is_refused_in_one_line_and_costs_nobody_else(
    trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, said = BAD[trouble]
    chosen = replace(settings(rounds=2, fraction=1.0), up=("int8", "f32"))
    strategy, _ = ran(chosen, changed={LIAR: change})
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("fedeq_edge")]
    assert len(lines) == 2
    assert all("client-1" in line and said in line and "\n" not in line for line in lines)
    without, _ = ran(chosen, changed={LIAR: silent})
    np.testing.assert_array_equal(strategy.server.consensus.z_hat, without.server.consensus.z_hat)
    assert strategy.history[0]["contributed"] == ["client-0", "client-2", "client-3"]


def test_a_node_whose_answer_is_lost_keeps_the_dual_that_counts() -> None:
    lost: list[Message] = []

    def once(reply: Message) -> Message | None:
        if reply.metadata.message_type != "train" or lost:
            return reply
        lost.append(reply)
        return None

    strategy, grid = ran(settings(), changed={LIAR: once})
    assert [len(line["contributed"]) for line in strategy.history] == [3, 4, 4, 4, 4]
    check_duals(strategy, grid)


def test_a_node_that_was_started_anew_counts_in_the_same_round_with_a_dual_of_zero() -> None:
    chosen, at = settings(), []

    def forgets(grid: InProcessGrid, reply: Message) -> Message:
        if reply.metadata.message_type == "train":
            at.append(reply)
            if len(at) == 2:
                grid.forget(LIAR)
        return reply

    grid = InProcessGrid(client_app(chosen, load, calibration=CHEAP), partitions(4))
    grid.changed = {LIAR: partial(forgets, grid)}
    strategy = ConsensusStrategy(chosen)
    strategy.start(grid)
    # One round passes, as it holds no consensus to step from; in the next it says that its dual is lost, and counts.
    assert [len(line["contributed"]) for line in strategy.history] == [4, 4, 3, 4, 4]
    assert "does not start from the consensus" in strategy.history[2]["declined"]["client-1"]
    check_duals(strategy, grid)


def test_a_node_that_lost_its_state_goes_on_with_what_lies_in_the_folder(tmp_path: Path) -> None:
    def forgets(grid: InProcessGrid, reply: Message) -> Message:
        grid.forget(LIAR)
        return reply

    chosen = settings()
    grid = InProcessGrid(client_app(chosen, load, calibration=CHEAP, folder=tmp_path), partitions(4))
    grid.changed = {LIAR: partial(forgets, grid)}
    strategy = ConsensusStrategy(chosen)
    strategy.start(grid)
    np.testing.assert_array_equal(strategy.server.consensus.z_hat, ran(chosen)[0].server.consensus.z_hat)
    check_duals(strategy, grid, tmp_path)
    model = modelfile.read(tmp_path / f"{RUN_ID:x}" / "client-1.fedeq")
    assert (model.device, model.round, model.spec) == ("client-1", 5, chosen.model)


def test_nodes_may_leave_and_come_later() -> None:
    chosen = settings(rounds=3)
    grid = InProcessGrid(client_app(chosen, load, calibration=CHEAP), partitions(3), away={102})

    def leaves(reply: Message) -> Message:
        if reply.metadata.message_type == "train":
            grid.away = {100}
        return reply

    grid.changed = {100: leaves}
    strategy = ConsensusStrategy(chosen)
    strategy.start(grid)
    assert [line["contributed"] for line in strategy.history] == [
        ["client-0", "client-1"],
        ["client-1", "client-2"],
        ["client-1", "client-2"],
    ]
    assert list(strategy.server.consensus.members) == ["client-0", "client-1", "client-2"]
    assert sorted(strategy.reports) == ["client-1", "client-2"]


def test_a_node_that_crashes_sits_out_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def crashing(config: NodeConfig) -> ClientData:
        asked.append(config["partition-id"])
        if config["partition-id"] == 1 and asked.count(1) > 1:  # it said who it is, and then trains
            raise ValueError("Traceback\n  of many lines\nValueError: out of memory")
        return load(config)

    asked: list[object] = []
    chosen = settings(rounds=1)
    strategy = ConsensusStrategy(chosen)
    strategy.start(InProcessGrid(client_app(chosen, crashing, calibration=CHEAP), partitions(3)))
    assert strategy.history[0]["contributed"] == ["client-0", "client-2"]
    assert strategy.history[0]["declined"] == {"client-1": "it failed: ValueError: out of memory"}
    assert "refused: client-1: it failed: ValueError: out of memory" in caplog.messages


def test_a_node_that_cannot_read_its_data_is_no_member(caplog: pytest.LogCaptureFixture) -> None:
    def damaged(config: NodeConfig) -> ClientData:
        if config["partition-id"] == 1:
            raise DataError("data.npz is damaged; copy it again")
        return load(config)

    chosen = settings(rounds=1)
    strategy = ConsensusStrategy(chosen)
    strategy.start(InProcessGrid(client_app(chosen, damaged, calibration=CHEAP), partitions(2)))
    assert list(strategy.server.consensus.members) == ["client-0"]
    assert any("data.npz is damaged" in line for line in caplog.messages)


def test_where_nobody_can_take_part_the_run_ends_and_says_why() -> None:
    def missing(config: NodeConfig) -> ClientData:
        raise DataError(f"there is no data for node {config['partition-id']}; copy it there")

    chosen = settings(rounds=1)
    with pytest.raises(ConfigError, match=r"2 nodes are here and none of them can take part; .* no data for node 1"):
        ConsensusStrategy(chosen).start(InProcessGrid(client_app(chosen, missing), partitions(2)))


def test_of_two_nodes_with_one_name_the_second_stays_out(caplog: pytest.LogCaptureFixture) -> None:
    chosen = settings(rounds=1)
    pi: NodeConfig = {"partition-id": 0, "device": "pi"}
    grid = InProcessGrid(client_app(chosen, load, calibration=CHEAP), [pi, pi, {"partition-id": 2}])
    strategy = ConsensusStrategy(chosen)
    strategy.start(grid)
    assert list(strategy.server.consensus.members) == ["client-2", "pi"]
    assert any("another node is called pi" in line for line in caplog.messages)


def test_a_node_that_claims_all_the_weight_stays_out(caplog: pytest.LogCaptureFixture) -> None:
    def claims(reply: Message) -> Message:
        if reply.metadata.message_type == "query":
            (birth,) = map(messages.decode, frames_of(reply))
            assert isinstance(birth.message, messages.Birth)
            content.named(reply.content, "client-1")
            changed = content.pack([messages.encode(replace(birth.message, samples=2**40))])
            reply.content = content.named(changed, "client-1")
        return reply

    strategy, _ = ran(settings(rounds=1), changed={LIAR: claims})
    assert "client-1" not in strategy.server.consensus.members
    assert any("claims 1099511627776 samples" in line for line in caplog.messages)


# ---- settings and the example ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"preset": "local"}}, "exchanges nothing"),
        ({"schedule": {"mode": "async"}}, "schedule"),
        ({"schedule": {"profiles": ("raspberry-pi-4",)}}, "schedule"),
        ({"audit": True}, "audit"),
        ({"privacy": Privacy(clip=1.0, noise_multiplier=1.0)}, "privacy"),
    ],
    ids=str,
)
def test_settings_that_flower_cannot_run_are_refused(changes: dict[str, Any], said: str) -> None:
    chosen = settings()
    if "schedule" in changes:
        changes = {"schedule": replace(chosen.schedule, **changes["schedule"])}
    refused = replace(chosen, **changes)
    for make in (ConsensusStrategy, lambda value: client_app(value, load)):
        with pytest.raises(ConfigError, match=said):
            make(refused)


def test_arrays_of_another_model_are_refused() -> None:
    chosen = settings(rounds=1)
    other = ConsensusStrategy(settings(preset="fedavg")).initial_arrays()
    with pytest.raises(ConfigError, match="initial_arrays: give one array"):
        ConsensusStrategy(chosen).start(InProcessGrid(client_app(chosen, load), partitions(1)), other)


def test_the_example_is_copied_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "app"
    assert copy_example([str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {"digits.py", "pyproject.toml"}
    assert copy_example([str(folder)]) == 1
    assert copy_example([]) == 2
    assert "exists already" in capsys.readouterr().err

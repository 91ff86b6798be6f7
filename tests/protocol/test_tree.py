"""The root's machine and a worker's: shares that come twice, late, in pieces, from strangers, or not at all."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.consensus.duals import MemoryDuals
from fedeq_edge.consensus.methods import method
from fedeq_edge.consensus.records import Share
from fedeq_edge.protocol.actions import AggregatorAction, Finished, Note, Publish, Snapshot
from fedeq_edge.protocol.aggregator import Aggregator, new_state
from fedeq_edge.protocol.federation import Federation
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.protocol.tree import Parcel, Root, pieces, share_blob
from fedeq_edge.wire import messages
from fedeq_edge.wire.topics import Topics

SIZE = 20_000  # a share takes three pieces
WORKERS = ("w0", "w1")
TOPICS = Topics("all")
ROUNDS = 3
FEDERATION = Federation(
    topics=TOPICS,
    model={"name": "quadratic"},
    plan={},
    seed=0,
    rounds=ROUNDS,
    method=method("admm"),
    schedule=Schedule(deadline_s=40.0, final_s=60.0),
    up=("f32",),
    down="f32",
)
START = np.linspace(-1, 1, SIZE, dtype=np.float32)


def consensus() -> Consensus:
    return Consensus(START, method=FEDERATION.method)


def new_root(down: str = "f32") -> Root:
    return Root(
        federation=replace(FEDERATION, down=down),
        consensus=consensus(),
        state=new_state("r"),
        workers=WORKERS,
        boot="b",
    )


class Devices:
    """What a worker has to give: one device, and its consensus."""

    def __init__(self, seed: int) -> None:
        self.consensus, self.rng = consensus(), np.random.default_rng(seed)
        self.consensus.join("d", 5)

    def share(self) -> Share:
        step = self.rng.normal(size=SIZE).astype(np.float32)
        self.consensus.accept("d", step, self.consensus.penalty("d"))
        return self.consensus.hand_over()[0]


def blob(root: Root, share: Share, **changes: object) -> bytes:
    """The share as a worker that is up to date sends it."""
    base = root._published.base
    whole = share_blob(share, round_number=root.state.round + 1, base=base, federation=root.federation)
    received = messages.decode(whole)
    return messages.encode(msgspec.structs.replace(received.message, **changes), received.body)


def tell(root: Root, worker: str, payloads: Iterable[bytes], now: float = 0.0) -> list[AggregatorAction]:
    return [action for payload in payloads for action in root.arrived(TOPICS.worker_up(worker), payload, now)]


def answers(actions: Sequence[AggregatorAction], worker: str) -> list[messages.Model]:
    """The consensus that the root has sent to this worker, each time it has."""
    parcel, found = Parcel(10**6), []
    for action in actions:
        if isinstance(action, Publish) and action.topic == TOPICS.worker_down(worker):
            chunk = messages.decode(action.payload)
            assert isinstance(chunk.message, messages.Chunk)
            whole = parcel.add(chunk.message, chunk.body)
            if whole is not None:
                model = messages.decode(whole).message
                assert isinstance(model, messages.Model)
                found.append(model)
    return found


def codes(actions: Sequence[AggregatorAction]) -> list[object]:
    return [action.facts["code"] for action in actions if isinstance(action, Note) and action.event == "refused"]


def close(root: Root, workers: Sequence[Devices]) -> list[AggregatorAction]:
    return [
        action
        for name, worker in zip(WORKERS, workers, strict=True)
        for action in tell(root, name, pieces(blob(root, worker.share())))
    ]


@pytest.fixture
def devices() -> list[Devices]:
    return [Devices(seed) for seed in range(len(WORKERS))]


def test_a_root_closes_with_the_last_share_and_tells_every_worker(devices: list[Devices]) -> None:
    root = new_root()
    assert not tell(root, "w0", pieces(blob(root, devices[0].share())))
    actions = tell(root, "w1", pieces(blob(root, devices[1].share())))
    kinds = [type(action) for action in actions]
    assert kinds.index(Snapshot) < kinds.index(Publish)
    for worker in WORKERS:
        assert [model.model for model in answers(actions, worker)] == [root._published.base]


def test_pieces_may_come_in_any_order_and_more_than_once(devices: list[Devices]) -> None:
    root = new_root()
    parts = pieces(blob(root, devices[0].share()))
    assert len(parts) > 2
    tell(root, "w0", [*reversed(parts), *parts])
    tell(root, "w1", pieces(blob(root, devices[1].share())))
    assert root.state.round == 1


def test_a_share_of_a_closed_round_is_answered_and_not_added_again(devices: list[Devices]) -> None:
    root = new_root()
    old = pieces(blob(root, devices[0].share()))
    tell(root, "w0", old)
    tell(root, "w1", pieces(blob(root, devices[1].share())))
    before = root.consensus.z.tobytes()
    assert [model.round for model in answers(tell(root, "w0", old), "w0")] == [1]
    assert root.status()["contributed"] == []
    assert root.consensus.z.tobytes() == before


def test_a_restored_root_answers_with_the_consensus_that_it_had(devices: list[Devices]) -> None:
    root = new_root()
    old = pieces(blob(root, devices[0].share()))
    tell(root, "w0", old)
    actions = tell(root, "w1", pieces(blob(root, devices[1].share())))
    saved = next(action for action in actions if isinstance(action, Snapshot))
    restored = Root(
        federation=FEDERATION,
        consensus=Consensus.restore(saved.consensus, method=FEDERATION.method),
        state=saved.state,
        workers=WORKERS,
        boot="b2",
    )
    assert [model.model for model in answers(tell(restored, "w0", old), "w0")] == [root._published.base]
    close(restored, devices)
    assert restored.state.round == 2


def test_a_worker_without_devices_holds_nobody_up_and_nothing_alone_is_no_round(devices: list[Devices]) -> None:
    root, nothing = new_root(), consensus().hand_over()[0]
    for worker in WORKERS:
        assert not tell(root, worker, pieces(blob(root, nothing)))
    tell(root, "w1", pieces(blob(root, devices[1].share())))
    assert root.state.round == 1


def test_a_worker_that_begins_anew_gets_the_whole_consensus(devices: list[Devices]) -> None:
    root, anew = new_root(), blob(new_root(), Devices(5).share())
    close(root, devices)
    close(root, devices)
    (model,) = answers(tell(root, "w0", pieces(anew)), "w0")
    assert (model.base, model.round, model.model) == (b"", 2, root._published.base)


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("federation", {"federation": bytes(32)}),
        ("federation", {"length": SIZE - 1}),
        ("rollback", {"round": 2}),
        ("digest", {"base": bytes(32)}),
    ],
)
def test_a_share_that_does_not_belong_here_is_refused_by_name(
    devices: list[Devices], code: str, changes: dict[str, object]
) -> None:
    root = new_root()
    assert codes(tell(root, "w0", pieces(blob(root, devices[0].share(), **changes)))) == [code]
    close(root, devices)
    assert root.state.round == 1


def test_strangers_and_what_is_no_share_are_refused_before_memory_is_taken(devices: list[Devices]) -> None:
    root = new_root()
    huge = messages.encode(messages.Chunk(transfer=bytes(32), index=0, size=10**9), bytes(8192))
    short = messages.decode(blob(root, devices[0].share()))
    assert codes(tell(root, "w2", pieces(b"anything"))) == ["not_a_worker"]
    assert codes(tell(root, "w0", [huge, b"noise", messages.encode(messages.Offline(boot="b"))])) == ["malformed"] * 3
    assert codes(tell(root, "w0", pieces(messages.encode(short.message, short.body[8:])))) == ["malformed"]


def test_a_root_ends_when_every_worker_has_the_last_consensus(devices: list[Devices]) -> None:
    root = new_root()
    for _ in range(ROUNDS):
        close(root, devices)
    ack = messages.encode(messages.ChunkAck(transfer=root._published.base, bitmap=b""))
    assert not tell(root, "w0", [ack, ack])
    assert [model.round for model in answers(root.connected(1.0), "w1")] == [ROUNDS]
    assert any(isinstance(action, Finished) for action in tell(root, "w1", [ack]))


def test_a_root_does_not_wait_for_ever_for_the_last_acknowledgement(devices: list[Devices]) -> None:
    root = new_root()
    for _ in range(ROUNDS):
        close(root, devices)
    assert not root.tick(100.0)
    assert not root.tick(159.0)
    assert any(isinstance(action, Finished) for action in root.tick(160.0))


# A worker


class Worker:
    """A worker's machine, and the root's answers to it."""

    def __init__(self, down: str = "f32") -> None:
        federation = replace(FEDERATION, down=down, topics=Topics("w0"), root=TOPICS)
        duals = MemoryDuals()
        own = Consensus(START, method=federation.method, duals=duals)
        self.machine = Aggregator(federation=federation, consensus=own, duals=duals, boot="b", state=new_state("own"))
        self.machine.connected(0.0)

    def born(self, device: str, now: float) -> list[AggregatorAction]:
        birth = messages.Birth(boot="x", samples=5, profile="", emulated=False, codecs=("f32",))
        return self.machine.arrived(Topics("w0").state(device), messages.encode(birth), now)

    def hears(self, root: Root, now: float, run: str = "r") -> list[AggregatorAction]:
        """The whole consensus of this root."""
        received = messages.decode(root._published.whole())
        whole = messages.encode(msgspec.structs.replace(received.message, run=run), received.body)
        topic = TOPICS.worker_down("w0")
        return [action for piece in pieces(whole) for action in self.machine.arrived(topic, piece, now)]


def shares(actions: Sequence[AggregatorAction]) -> list[messages.Share]:
    parcel, found = Parcel(10**6), []
    for action in actions:
        if isinstance(action, Publish) and action.topic == TOPICS.worker_up("w0"):
            received = messages.decode(action.payload)
            if isinstance(received.message, messages.Chunk):
                whole = parcel.add(received.message, received.body)
                found += [messages.decode(whole).message] if whole else []
    return found  # type: ignore[return-value]  # nothing else is sent there in chunks


def test_a_worker_without_devices_says_so_after_its_deadline_and_follows(devices: list[Devices]) -> None:
    worker, root = Worker(), new_root()
    assert not shares(worker.machine.tick(0.0))
    (nothing,) = shares(worker.machine.tick(40.0))
    assert (nothing.round, nothing.weight, nothing.penalties) == (1, "0", "0")
    close(root, devices)
    worker.hears(root, 41.0)
    assert worker.machine.consensus.z_hat.tobytes() == root.consensus.z_hat.tobytes()
    assert not shares(worker.machine.tick(80.0))
    (nothing,) = shares(worker.machine.tick(81.0))
    assert nothing.round == 2


@pytest.mark.parametrize("down", ["f32", "int4"])
def test_a_worker_takes_the_root_s_steps_to_the_same_bits(devices: list[Devices], down: str) -> None:
    worker, root = Worker(down), new_root(down)
    for _ in range(ROUNDS - 1):
        for action in close(root, devices):
            if isinstance(action, Publish):
                worker.machine.arrived(action.topic, action.payload, 0.0)
        assert worker.machine.consensus.z_hat.tobytes() == root.consensus.z_hat.tobytes()
    assert worker.machine.state.root_round == ROUNDS - 1


def test_a_round_that_the_root_has_closed_without_it_is_left_and_opened_anew(devices: list[Devices]) -> None:
    worker, root = Worker(), new_root()
    worker.machine.tick(0.0)
    worker.machine.tick(40.0)
    worker.born("d", 41.0)
    assert worker.machine.state.open
    close(root, devices)
    actions = worker.hears(root, 42.0)
    tasks = [messages.decode(action.payload).message for action in actions if isinstance(action, Publish)]
    assert [task.model for task in tasks if isinstance(task, messages.Task)] == [root._published.base]
    assert worker.machine.state.round == 2


def test_a_worker_says_its_share_until_it_is_answered_and_opens_no_round_before(devices: list[Devices]) -> None:
    worker, root = Worker(), new_root()
    worker.born("d", 0.0)
    machine = worker.machine
    _contribute(worker, 1.0)
    handed = machine.state.handed
    assert handed
    assert not machine.state.open
    assert [share.round for share in shares(machine.tick(10.0))] == [1]
    assert machine.state.handed == handed
    close(root, devices)
    worker.hears(root, 11.0)
    assert not machine.state.handed
    assert machine.state.open


def test_a_worker_does_not_follow_a_root_that_is_not_the_one_it_knows(devices: list[Devices]) -> None:
    worker, root = Worker(), new_root()
    close(root, devices)
    worker.hears(root, 1.0)
    close(root, devices)
    assert codes(worker.hears(root, 2.0, run="another")) == ["malformed"]
    assert worker.machine.state.root_round == 1


def _contribute(worker: Worker, now: float) -> None:
    state = worker.machine.state
    metrics = messages.Metrics(
        loss=0.0,
        residual=0.0,
        backward_residual=0.0,
        forward=1,
        adjoint=1,
        seconds=0.0,
        accuracy=0.0,
        reduced=False,
        wire_up=0,
        wire_down=0,
    )
    body = np.ones(SIZE, "<f4").tobytes()
    message = messages.Contribution(
        run=state.run,
        round=state.round,
        boot="x",
        base=state.bases[state.round],
        samples=5,
        codec="f32",
        length=SIZE,
        metrics=metrics,
    )
    whole = messages.encode(message, body)
    up = Topics("w0").up("d")
    name = messages.decode(pieces(whole)[0]).message
    assert isinstance(name, messages.Chunk)
    offer = messages.Offer(transfer=name.transfer, size=len(whole))
    for payload in (messages.encode(offer), *pieces(whole)):
        worker.machine.arrived(up, payload, now)

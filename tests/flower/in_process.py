"""A Flower engine without processes: real apps, contexts and messages, one node after the other."""

# pyright: reportMissingImports=false
# Flower is not in the environment in which types are checked (pyproject.toml, flower).

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from msgspec.structs import replace

from fedeq_edge.data.npz import ClientData
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.settings import AggregatorSettings
from fedeq_edge.wire.coding import Codec
from tests.training.local_rounds import PLAN, SPEC, blobs

RUN_ID = 7
# Newer versions of Flower make messages only in a process that was told which task it is.
with contextlib.suppress(ImportError):
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, 1
NodeConfig = Mapping[str, bool | float | int | str]
Change = Callable[[Message], Message | None]


@dataclass
class InProcessGrid(Grid):  # type: ignore[misc, unused-ignore]  # as fedeq_edge/flower/strategy.py
    """Nodes 100, 101, ... with these configs. changed: what comes of the answer of a node; None: none does."""

    app: ClientApp
    configs: Sequence[NodeConfig]
    changed: dict[int, Change] = field(default_factory=dict)
    away: set[int] = field(default_factory=set)
    sent: list[Message] = field(default_factory=list)
    answers: list[Message] = field(default_factory=list)
    contexts: dict[int, Context] = field(init=False)

    def __post_init__(self) -> None:
        self.contexts = {100 + number: self._context(100 + number) for number in range(len(self.configs))}

    def _context(self, node: int) -> Context:
        config = dict(self.configs[node - 100])
        return Context(run_id=RUN_ID, node_id=node, node_config=config, state=RecordDict(), run_config={})

    def forget(self, node: int) -> None:
        """The SuperNode was started anew."""
        self.contexts[node] = self._context(node)

    def get_node_ids(self) -> Iterable[int]:
        return [node for node in self.contexts if node not in self.away]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = [self._answer(message) for message in messages]
        return [reply for reply in replies if reply is not None]

    def _answer(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        self.sent.append(message)
        try:
            reply: Message | None = self.app(message, self.contexts[node])
        except Exception as error:
            reply = Message(Error(code=1, reason=str(error)), reply_to=message)
        if reply is not None and node in self.changed:
            reply = self.changed[node](reply)
        if reply is not None:
            self.answers.append(reply)
        return reply

    def set_run(self, run: object) -> None: ...

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *_: object, **__: object) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError


def settings(
    *, rounds: int = 5, codec: Codec = "int8", fraction: float = 1.0, preset: str = "admm", **changes: object
) -> AggregatorSettings:
    """A federation on the small model of tests/training/local_rounds.py, whose devices afford every budget."""
    return AggregatorSettings(
        federation="blobs",
        model=SPEC,
        codec=codec,
        train=replace(PLAN, rounds=rounds, epochs=1, compute_s=900.0, budgets=(2, 4)),
        method={"preset": preset, **changes},
        schedule=Schedule(fraction=fraction, deadline_s=1000.0, min_devices=1),
    )


@cache
def data_of(device: str) -> ClientData:
    """The same for the same name, other samples for another."""
    return blobs(SPEC, seed=int(device.removeprefix("client-")))


def load(config: NodeConfig) -> ClientData:
    return data_of(f"client-{config['partition-id']}")


def partitions(nodes: int) -> list[NodeConfig]:
    return [{"partition-id": number, "num-partitions": nodes} for number in range(nodes)]

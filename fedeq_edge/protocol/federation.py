"""What is fixed for the life of a federation."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedeq_edge.consensus.methods import Method
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.wire.coding import Codec
from fedeq_edge.wire.topics import Topics


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """Settings of one federation. model, plan and seed travel in the manifest as they are.

    up: codecs of contributions in the order of preference; a device gets the first that it speaks. down: codec of the
    consensus' steps, one for all, as all must decode the same numbers; who does not speak it gets whole values.
    audit: whether the history of rounds holds what it takes to compute every consensus again (audit.py).
    """

    topics: Topics
    model: Mapping[str, object]
    plan: Mapping[str, object]
    seed: int
    rounds: int
    method: Method
    schedule: Schedule
    up: tuple[Codec, ...]
    down: Codec
    audit: bool = False

"""What a user chooses when a public data set becomes a fleet."""

from typing import Literal

import msgspec

from fedeq_edge.errors import ConfigError

Partition = Literal["natural", "shards", "dirichlet", "iid"]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a user chooses. kind, variant: None takes what the contents show and the reader's first.

    clients: how many to make; of natural ones, None takes all, a number draws so many. labels: per client, of shards.
    alpha: of dirichlet. classes: labels to keep, as "0-5". smallest: samples of a natural client, training samples of
    a made one, that it has at least. Raises ConfigError for options that do not go together.
    """

    kind: str | None = None
    variant: str | None = None
    partition: Partition = "natural"
    clients: int | None = None
    labels: int | None = None
    alpha: float | None = None
    classes: str | None = None
    smallest: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        self._needs("clients", self.clients is not None, self.partition != "natural", only_there=False)
        self._needs("labels", self.labels is not None, self.partition == "shards")
        self._needs("alpha", self.alpha is not None, self.partition == "dirichlet")

    def _needs(self, option: str, given: bool, needed: bool, *, only_there: bool = True) -> None:
        if needed and not given:
            raise ConfigError(f"--partition {self.partition} needs --{option}; give it")
        if given and not needed and only_there:
            raise ConfigError(f"--partition {self.partition} has no --{option}; leave it away")

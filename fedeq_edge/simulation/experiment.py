"""An experiment as a user writes it: one TOML file, several runs that differ by what the file says.

    name = "har"
    seeds = [0, 1, 2]
    [data]              where the clients' samples come from, and who is kept out of training (DataTable)
    [model]             preset = "recommended" and changes of it (deq/spec.py), or an explicit network (networks.py)
    [train]             changes of the plan that is recommended for the data (training/step.py)
    [method]            preset = "admm", "fedavg", ... and changes of it (consensus/methods.py)
    [schedule]          who is asked and how long a round waits (protocol/schedule.py)
    backend = "torch"   what trains, or "onnx"
    [wire]              codec, up, down (wire/coding.py)
    [[fleet.groups]]    which boards, on which links, how often away or slow (Group)
    [evaluation]        when and how accuracy is measured (EvaluationTable)
    [[variants]]        name = "..." and changes of any table above: one run each, and seed
    [tune]              values of any key, "train.learning_rate" = [0.03, 0.1], chosen on validation data; seed and
                        rounds of the runs that choose

Everything is checked before anything runs; an unknown key is refused with the nearest known one.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Final

import msgspec

from fedeq_edge import settings
from fedeq_edge.consensus.methods import METHODS, Method, method
from fedeq_edge.deq.budget import LARGEST_BUDGET
from fedeq_edge.errors import ConfigError
from fedeq_edge.hardware.profiles import load_profile
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.simulation.models import kind_of
from fedeq_edge.training.step import BackendName, Plan
from fedeq_edge.wire import coding
from fedeq_edge.wire.topics import check_identifier

_STUDIES: Final = "fedeq_edge.simulation.studies"
_OF_A_FILE: Final = ("x", "y", "client", "test", "where", "classes")  # keys of [data] that are about its arrays


class DataTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[data]: file is "digits" or an .npz with one row per sample; x, y, client, test, where, classes name its arrays.

    In a file of `fedeq data prepare` they are known: x, y, client and test are not looked at, and `[tune]` chooses by
    its validation part. clients: so many drawn by seed; of the digits, how many there are. seed: of that, of the
    digits' split and of the validation part. validation: share of each client's training data that `[tune]` chooses by
    where the file marks none, in (0, 1); ordered: a client's rows follow each other in time, so that share is its last
    rows. unseen: clients that are kept out of training and evaluated at the end: their names, how many of the last
    ones, or a boolean array that marks all their rows, such as official_test; those are not counted by `clients`.
    flat: each sample as one vector, for dense cells.
    """

    file: str = "digits"
    x: str = "x"
    y: str = "y"
    client: str = "client"
    test: str | None = None
    where: str | None = None
    classes: str | None = None
    clients: int | None = None
    seed: int = 0
    validation: float = 0.2
    ordered: bool = False
    unseen: int | str | tuple[str, ...] = 0
    flat: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.validation < 1.0:
            raise ConfigError(f"data.validation is {self.validation}; give a share above 0 and below 1")
        if self.clients is not None and self.clients < 1:
            raise ConfigError(f"data.clients is {self.clients}; give at least 1")
        if self.seed < 0:
            raise ConfigError(f"data.seed is {self.seed}; give a number from 0")
        defaults = {field.name: field.default for field in msgspec.structs.fields(self)}
        named = [key for key in _OF_A_FILE if getattr(self, key) != defaults[key]]
        if self.file == "digits" and named:
            raise ConfigError(f"data.{named[0]} is about arrays of a file, and the digits have none; leave it out")
        if isinstance(self.unseen, int) and self.unseen < 0:
            raise ConfigError(f"data.unseen is {self.unseen}; give a number of clients, or their names")


class WireTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[wire]: codec of differences in both directions; up, down: of one direction, where it differs from that."""

    codec: str = "int8"
    up: str | None = None
    down: str | None = None

    def __post_init__(self) -> None:
        for codec in filter(None, (self.codec, self.up, self.down)):
            coding.parse(codec)


class Group(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[[fleet.groups]]: `share` of the clients, relative to the other groups.

    profile: board of devices/, whose speed counts; empty: the reference core. budgets: values of K, in place of
    train.budgets. dropout: chance that a client is gone once it is asked, until the round's deadline is over.
    straggle: chance that its device is `straggle_factor` times slower for a round. up_mbit, down_mbit: megabits a
    second (0: without limit), latency_ms: of each direction.
    """

    share: float = 1.0
    profile: str = ""
    budgets: tuple[int, ...] = ()
    dropout: float = 0.0
    straggle: float = 0.0
    straggle_factor: float = 4.0
    up_mbit: float = 0.0
    down_mbit: float = 0.0
    latency_ms: float = 0.0

    def __post_init__(self) -> None:
        if self.profile:
            load_profile(self.profile)
        if not 0.0 < self.share < math.inf:
            raise ConfigError(f"fleet.groups: share is {self.share}; give a number above 0")
        if not (0.0 <= self.dropout < 1.0 and 0.0 <= self.straggle <= 1.0):
            raise ConfigError(
                f"fleet.groups: dropout is {self.dropout} and straggle {self.straggle}; give chances, dropout below 1"
            )
        if not 1.0 <= self.straggle_factor < math.inf:
            raise ConfigError(f"fleet.groups: straggle_factor is {self.straggle_factor}; give a number from 1")
        if any(not 0.0 <= value < math.inf for value in (self.up_mbit, self.down_mbit, self.latency_ms)):
            raise ConfigError("fleet.groups: up_mbit, down_mbit and latency_ms are numbers from 0")


class FleetTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[fleet]: groups of clients; without any, all are reference boards on perfect links."""

    groups: tuple[Group, ...] = (Group(),)

    def __post_init__(self) -> None:
        if not self.groups:
            raise ConfigError("fleet.groups is empty; leave it out, or name at least one group")


class EvaluationTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[evaluation]: every so many rounds all clients are evaluated (0: at the end alone).

    budgets: values of K at which accuracy is measured at the end; empty: the model's middle one alone. local: whether
    theta_i + w_i, after a round of the client's own, is measured as well. target: accuracy whose first round is told.
    """

    every: int = 10
    budgets: tuple[int, ...] = ()
    local: bool = True
    target: float | None = None

    def __post_init__(self) -> None:
        if self.every < 0 or any(not 1 <= budget <= LARGEST_BUDGET for budget in self.budgets):
            raise ConfigError(
                f"evaluation.every is at least 0, and evaluation.budgets are values of K from 1 to {LARGEST_BUDGET}"
            )
        if self.target is not None and not 0.0 < self.target <= 1.0:
            raise ConfigError(f"evaluation.target is {self.target}; give an accuracy above 0 and up to 1")


class CostTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[cost]: reference seconds of a training step, fixed_s + K evaluation_s + k adjoint_s, instead of counted ones."""

    fixed_s: float
    evaluation_s: float
    adjoint_s: float

    def __post_init__(self) -> None:
        if any(not 0.0 < value < math.inf for value in (self.fixed_s, self.evaluation_s, self.adjoint_s)):
            raise ConfigError("cost: fixed_s, evaluation_s and adjoint_s are seconds above 0")


class Experiment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run's settings, but for its seed. model, train, method, schedule: changes of what is recommended."""

    name: str
    variant: str = "base"
    seeds: tuple[int, ...] = (0,)
    data: DataTable = msgspec.field(default_factory=DataTable)
    model: dict[str, Any] = {}
    train: dict[str, Any] = {}
    method: dict[str, Any] = {}
    schedule: dict[str, Any] = {}
    wire: WireTable = msgspec.field(default_factory=WireTable)
    fleet: FleetTable = msgspec.field(default_factory=FleetTable)
    evaluation: EvaluationTable = msgspec.field(default_factory=EvaluationTable)
    cost: CostTable | None = None
    backend: BackendName = "torch"

    def __post_init__(self) -> None:
        check_identifier(self.name, "experiment")
        check_identifier(self.variant, "variant")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(f"seeds is {list(self.seeds)}; give different numbers from 0")
        _check_changes(self.model, kind_of(self.model), "model")
        _check_changes(self.train, Plan, "train")
        _check_changes(self.method, Method, "method")
        _check_changes(self.schedule, Schedule, "schedule")
        if "preset" in self.method:
            method(str(self.method["preset"]))


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """One [[variants]] entry as it is run: choices are (name, experiment) of [tune]'s grid.

    tune_seed, tune_rounds: of the runs that choose; None: as many rounds as the experiment has. A given
    train.alone_rounds stays as it is.
    """

    experiment: Experiment
    choices: tuple[tuple[str, Experiment], ...] = ()
    tune_seed: int = 0
    tune_rounds: int | None = None

    def trial(self, choice: Experiment) -> Experiment:
        """The choice as it is run to see how good it is."""
        if self.tune_rounds is None:
            return choice
        return msgspec.structs.replace(choice, train={**choice.train, "rounds": self.tune_rounds})


def load(path: Path) -> list[Variant]:
    """The variants of an experiment file, all of them checked as far as that goes without the data.

    Raises ConfigError in one line.
    """
    if not path.is_file():
        raise ConfigError(f"experiment file {path} does not exist; name another, or --study for one that ships with us")
    return parse(settings.read_toml(path), str(path), base=path)


def study(name: str, data: Path | None = None) -> list[Variant]:
    """The variants of a study that ships with the package, on this file of data where it needs one.

    Raises ConfigError naming the studies that there are, or where the file is missing.
    """
    known = studies()
    if name not in known:
        raise ConfigError(f"there is no study {name!r}; known are {', '.join(known)}")
    where = f"study {name}"
    with resources.as_file(resources.files(_STUDIES) / f"{name}.toml") as path:
        tables = settings.read_toml(path)
    if data is not None:
        tables["data"] = {**tables["data"], "file": str(data.resolve())}
    elif tables["data"]["file"] != "digits":
        raise ConfigError(f"{where} runs on {tables['data']['file']}; give that file with --data")
    return parse(tables, where)


def study_text(name: str) -> str:
    """The file of a study that ships with the package, comments and all."""
    return (resources.files(_STUDIES) / f"{name}.toml").read_text(encoding="utf-8")


def studies() -> list[str]:
    """Names of the studies that ship with the package."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in resources.files(_STUDIES).iterdir()
        if entry.name.endswith(".toml")
    )


def parse(tables: Mapping[str, Any], where: str, *, base: Path | None = None) -> list[Variant]:
    """The variants that these tables describe. base: file whose folder the data's path is relative to."""
    common = {key: value for key, value in tables.items() if key not in ("variants", "tune")}
    changes = tables.get("variants", [{}])
    if not isinstance(changes, list) or not all(isinstance(change, Mapping) for change in changes) or not changes:
        raise ConfigError(f"{where}: variants are tables; write [[variants]]")
    grid = tables.get("tune", {})
    if not isinstance(grid, Mapping):
        raise ConfigError(f'{where}: tune is {grid!r}; write a table, [tune], with lists such as "train.learning_rate"')
    found = [_variant(common, change, grid, where, base) for change in changes]
    names = [variant.experiment.variant for variant in found]
    if len(set(names)) < len(names):
        raise ConfigError(f"{where}: variants need names of their own, got {', '.join(names)}")
    return found


def _variant(
    common: Mapping[str, Any], change: Mapping[str, Any], grid: Mapping[str, Any], where: str, base: Path | None
) -> Variant:
    changes = dict(change)
    name = str(changes.pop("name", "base"))
    tables = _merged(common, {**changes, "variant": name})
    place = where if name == "base" else f"{where} [variants {name}]"
    seed, rounds = grid.get("seed", 0), grid.get("rounds")
    for key, value in (("seed", seed), ("rounds", rounds)):
        if value is not None and (not isinstance(value, int) or value < (key == "rounds")):
            raise ConfigError(f"{where} [tune]: {key} is {value!r}; give a whole number")
    tried = {key: value for key, value in grid.items() if key not in ("seed", "rounds")}
    if rounds is not None and (not tried or "train.rounds" in tried):
        raise ConfigError(
            f"{where} [tune]: rounds is the length of runs that try other settings; name some, or leave it out"
        )
    choices = []
    for values in _grid(tried, where):
        label = ", ".join(f"{key} = {value}" for key, value in values.items())
        choices.append((label, _experiment(_merged(tables, _nested(values)), f"{place} [tune]", base)))
    chosen = _experiment(tables, place, base)
    return Variant(experiment=chosen, choices=tuple(choices), tune_seed=seed, tune_rounds=rounds)


def _experiment(tables: Mapping[str, Any], where: str, base: Path | None) -> Experiment:
    settings.check_keys(tables, Experiment, where)
    fleet = tables.get("fleet", {})
    groups = fleet.get("groups", []) if isinstance(fleet, Mapping) else None
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise ConfigError(f"{where}: groups of clients are tables; write [[fleet.groups]]")
    for number, group in enumerate(groups):
        settings.check_keys(group, Group, f"{where} [fleet.groups {number + 1}]")
    made = settings.convert(tables, Experiment, where)
    if base is None or made.data.file == "digits":
        return made
    data = msgspec.structs.replace(made.data, file=str(settings.resolve(base, made.data.file)))
    return msgspec.structs.replace(made, data=data)


def _merged(into: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    copied: dict[str, Any] = msgspec.to_builtins(into)
    settings.merge(copied, changes)
    return copied


def _grid(grid: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """Every combination of the values, none where there is no grid."""
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(
                f'{where} [tune]: {key} is {values!r}; give a list of values, "train.learning_rate" = [..]'
            )
    if grid:
        yield from (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"train.learning_rate": 0.1} as tables."""
    tables: dict[str, Any] = {}
    for key, value in values.items():
        *path, last = key.split(".")
        table = tables
        for part in path:
            table = table.setdefault(part, {})
        table[last] = value
    return tables


def _check_changes(changes: Mapping[str, Any], kind: type[msgspec.Struct], where: str) -> None:
    """Every key is a field of `kind`, or its preset; training alone is a variant here (method.preset = "local")."""
    known = {field.name for field in msgspec.structs.fields(kind)} - {"name", "compare_local"}
    if where in ("model", "method"):
        known.add("preset")
    for key in changes:
        if key not in known:
            raise ConfigError(f"{where}: {settings.unknown_key(key, known)}")


def method_of(experiment: Experiment, advised: Method) -> Method:
    """The method of the experiment; advised: what is recommended for its data."""
    preset = experiment.method.get("preset")
    base = advised if preset is None else METHODS[str(preset)]
    changes = {key: value for key, value in experiment.method.items() if key != "preset"}
    return settings.changed(base, changes, "method")

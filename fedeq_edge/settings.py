"""Settings: a TOML file, then environment variables, then command-line options; later wins, and the merge ends here.

An environment variable is FEDEQ_ and the key's path in capitals, tables joined by two underscores:
FEDEQ_BROKER__URL=mqtt://gateway sets [broker] url. Its value is read as TOML where that fits the key, or else as text.
An unknown key of a file is refused with the nearest known one, because a misspelt setting that is silently ignored is
worse than none.
Paths in a file are relative to that file.
"""

import difflib
import os
import re
import tomllib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import msgspec

from fedeq_edge.consensus.masked import Masking
from fedeq_edge.consensus.methods import Method, method
from fedeq_edge.consensus.privacy import Privacy
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.serving.address import Address, parse_address
from fedeq_edge.training.step import BackendName, Plan
from fedeq_edge.transport.mqtt import Endpoint
from fedeq_edge.wire import coding
from fedeq_edge.wire.coding import Codec
from fedeq_edge.wire.topics import check_identifier

PREFIX = "FEDEQ_"
_MISSING = re.compile("^Object missing required field `([^`]+)`")
T = TypeVar("T", bound=msgspec.Struct)


class BrokerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[broker]: url is mqtt://host[:1883] or mqtts://host[:8883]; the rest are PEM files for mqtts."""

    url: str = "mqtt://127.0.0.1:1883"
    version: Literal["3.1.1", "5"] = "5"
    ca: str | None = None
    certificate: str | None = None
    key: str | None = None

    def endpoint(self, base: Path) -> Endpoint:
        """Where to connect. base: the settings file. Raises ConfigError on an URL that is no broker's."""
        ca, certificate, key = (
            None if path is None else str(resolve(base, path)) for path in (self.ca, self.certificate, self.key)
        )
        endpoint = Endpoint(url=self.url, version=self.version, ca=ca, certificate=certificate, key=key)
        endpoint.address()
        return endpoint


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """agent.toml: one device.

    device: its id. federation: which one it joins. data: npz with x, y and an optional split. state: folder for what
    must survive a restart. profile: board profile out of devices/ (limits; with emulate = true also its speed).
    backend: what trains, torch or onnxruntime ("onnx") by a graph that the aggregator has made. graphs: folders where
    such graphs may lie already, as *.onnx. trainer_idle_s: the trainer process, and the one that answers applications,
    end after so long without work. workers: where the federation has so many workers, named FEDERATION-0, FEDERATION-1,
    ...: the device goes to the one that its id hashes to. serve: where applications on this device ask its personal
    model over HTTP: the path of a unix socket, or 127.0.0.1:PORT (devices/README.md); empty: nowhere.
    """

    device: str
    federation: str
    data: str
    state: str = "state"
    profile: str = ""
    emulate: bool = False
    backend: BackendName = "torch"
    graphs: tuple[str, ...] = ()
    trainer_idle_s: float = 60.0
    workers: int = 0
    serve: str = ""
    broker: BrokerSettings = msgspec.field(default_factory=BrokerSettings)

    def __post_init__(self) -> None:
        check_identifier(self.device, "device")
        check_identifier(self.joins, "federation")
        parse_address(self.serve)
        if self.workers < 0:
            raise ConfigError(f"workers is {self.workers}; give their number, or leave it out")

    @property
    def joins(self) -> str:
        """The federation whose aggregator this device talks to: its own, or that of its worker."""
        if not self.workers:
            return self.federation
        return f"{self.federation}-{zlib.crc32(self.device.encode()) % self.workers}"

    def answers_at(self, base: Path) -> Address | None:
        """Where applications ask, None for nowhere. base: the settings file."""
        if not self.serve:
            return None
        found = parse_address(self.serve)
        return found if found.path is None else Address(resolve(base, self.serve), None)


class AggregatorSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """aggregator.toml: one federation.

    [model] is a ModelSpec, [train] a Plan, [schedule] a Schedule. [method] names a preset ("admm", "fedavg", ...) and
    may change its fields. [privacy], if there is one, is a Privacy: what z tells of a single device is bounded.
    [masking], if there is one, is a Masking: the aggregator learns the sum of a round and no contribution.
    codec: how differences travel, "int4" for example (wire/coding.py). up: codecs of contributions in the order of
    preference, where they shall differ from that: a device sends in the first that it speaks. audit: keep every
    contribution, so that `fedeq aggregator audit` can compute the consensus again. seed: of the initial weights.
    workers: federations of the aggregators whose devices this root adds up; it has no devices of its own. root: the
    federation whose root closes the rounds of this worker. Both have the same [model], [train] rounds, [method], codec
    and seed.
    """

    federation: str
    model: ModelSpec
    state: str = "state"
    codec: Codec = "int8"
    up: tuple[Codec, ...] = ()
    audit: bool = False
    seed: int = 0
    workers: tuple[str, ...] = ()
    root: str = ""
    train: Plan = msgspec.field(default_factory=Plan)
    method: dict[str, Any] = msgspec.field(default_factory=dict)
    schedule: Schedule = msgspec.field(default_factory=Schedule)
    privacy: Privacy | None = None
    masking: Masking | None = None
    broker: BrokerSettings = msgspec.field(default_factory=BrokerSettings)

    def __post_init__(self) -> None:
        check_identifier(self.federation, "federation")
        for codec in (self.codec, *self.up):
            coding.parse(codec)
        if self.train.compute_s >= self.schedule.deadline_s:
            raise ConfigError(
                f"train.compute_s ({self.train.compute_s:g}) must be below schedule.deadline_s "
                f"({self.schedule.deadline_s:g}): training is a part of a round"
            )
        if self.workers or self.root:
            self._check_tree()

    def _check_tree(self) -> None:
        for name in (*self.workers, *filter(None, (self.root,))):
            check_identifier(name, "root" if name == self.root else "worker")
        if self.workers and self.root:
            raise ConfigError("root, workers: an aggregator is one or the other; give either the root or the workers")
        if self.audit or self.schedule.mode == "async":
            raise ConfigError('root, workers: they know neither audit = true nor schedule.mode = "async"; leave it out')
        if self.privacy is not None:
            raise ConfigError("root, workers: a worker hands over its sum without noise; leave them out, or [privacy]")
        if self.masking is not None:
            raise ConfigError("root, workers: each worker would unmask a sum of its own; leave them out, or [masking]")
        chosen = self.resolved_method()
        if chosen.sees_each or not chosen.exchange:
            raise ConfigError(
                f"method {chosen.name}: its server looks at every contribution, or none, and a root sees sums; "
                "leave out root and workers, or the robust options"
            )

    @property
    def plan(self) -> Plan:
        """[train] as devices get it. How many they are is known to nobody yet: enough that a round asks for one."""
        fewest = max(self.schedule.min_devices, round(1.0 / self.schedule.fraction))
        return self.train.for_model(self.model).for_share(self.schedule.share(fewest))

    def resolved_method(self) -> Method:
        """The preset with the file's changes. Raises ConfigError on an unknown preset or field."""
        changes = dict(self.method)
        base = method(str(changes.pop("preset", "admm")))
        known = {field.name for field in msgspec.structs.fields(Method)}
        for key in changes:
            if key not in known:
                raise ConfigError(f"method: {unknown_key(key, known)}")
        merged = {**msgspec.to_builtins(base), **changes}
        return convert(merged, Method, "method")


def load(path: Path, kind: type[T], *, options: Mapping[str, Any] | None = None) -> T:
    """The settings in `path` as a `kind`, under environment and options (nested mappings like the file).

    Raises ConfigError in one line: missing file, bad TOML (with its line), unknown key (with the nearest), bad value.
    """
    merged = read_toml(path)
    merge(merged, _environment(os.environ, kind))
    merge(merged, options or {})
    check_keys(merged, kind, str(path))
    return convert(merged, kind, str(path))


def resolve(base: Path, path: str) -> Path:
    """A path out of a settings file, relative to that file."""
    return (base.parent / Path(path).expanduser()).resolve()


def to_toml(value: msgspec.Struct) -> str:
    """Settings as TOML text, without the values that are null (TOML has none)."""
    return msgspec.toml.encode(_without_none(msgspec.to_builtins(value))).decode()


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def changed(base: T, changes: Mapping[str, Any], where: str) -> T:
    """`base` with these fields. Raises ConfigError naming table and value."""
    return convert({**msgspec.to_builtins(base), **msgspec.to_builtins(changes)}, type(base), where)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError in one line."""
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConfigError(f"settings file {path} does not exist; name another with --config") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"settings file {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"settings file {path} is not TOML: {error}") from error


def _environment(environment: Mapping[str, str], kind: type[msgspec.Struct]) -> dict[str, Any]:
    """Nested settings out of FEDEQ_ variables whose first part is a key of `kind`; other programs' are left alone."""
    known = {field.encode_name for field in msgspec.structs.fields(kind)}
    found: dict[str, Any] = {}
    for name, text in sorted(environment.items()):  # a table as a whole comes before its keys
        keys = name.removeprefix(PREFIX).lower().split("__")
        if not name.startswith(PREFIX) or keys[0] not in known:
            continue
        table = found
        for key in keys[:-1]:
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise ConfigError(
                    f"environment variable {name} sets a key of {key!r}, which another one sets as a whole"
                )
        table[keys[-1]] = _value(text, _type_of(kind, keys))
    return found


def _value(text: str, wanted: Any) -> Any:
    """The text as TOML, if that makes a `wanted`: 5 is a number, and as the version of MQTT it is a text."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
        msgspec.convert(value, wanted)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, ConfigError):
        return text
    return value


def _type_of(kind: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        if not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
            return Any
        kind = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}.get(key, Any)
    return kind


def merge(into: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """`into` has these changes, table by table."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def check_keys(table: Mapping[str, Any], kind: type[msgspec.Struct], where: str) -> None:
    """Every key is one of `kind`, in tables inside it as well. Raises ConfigError naming the nearest."""
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in table.items():
        if key not in fields:
            raise ConfigError(f"{where}: {unknown_key(key, fields)}")
        inner = _table_of(fields[key])
        if isinstance(value, Mapping) and inner is not None:
            check_keys(value, inner, f"{where} [{key}]")


def _table_of(kind: Any) -> type[msgspec.Struct] | None:
    """The struct that a table becomes, also where the table may be left out; None for other types."""
    choices = [choice for choice in (kind, *get_args(kind)) if isinstance(choice, type)]
    return next((choice for choice in choices if issubclass(choice, msgspec.Struct)), None)


def unknown_key(key: str, known: Mapping[str, Any] | set[str]) -> str:
    """What is wrong with a key that is not among the known ones."""
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    return f"unknown key {key!r}; did you mean {nearest[0]!r}?"


def convert(table: Mapping[str, Any], kind: type[T], where: str) -> T:
    """The table as a `kind`. Raises ConfigError naming the value that does not fit, or is missing."""
    try:
        return msgspec.convert(table, kind)
    except (msgspec.ValidationError, ConfigError) as error:
        said = _MISSING.sub(r"\1 is missing; add it", str(error))
        raise ConfigError(f"{where}: {said}") from error

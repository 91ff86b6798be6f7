"""One run's parts: the clients with their data, the model, the plans and boards, for one variant and one seed.

Whoever takes part in a run makes these by itself, from the same few bytes: the engine and each of its workers.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np

from fedeq_edge import settings
from fedeq_edge.consensus.methods import Method
from fedeq_edge.data.npz import ClientData, column_names, describe, flattened, load_fleet
from fedeq_edge.demo.source import device_ids, statistics
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.errors import ConfigError, DataError
from fedeq_edge.hardware.profiles import load_profile
from fedeq_edge.protocol.federation import Federation
from fedeq_edge.protocol.schedule import Schedule
from fedeq_edge.simulation import cost
from fedeq_edge.simulation.experiment import DataTable, Experiment, Group, method_of
from fedeq_edge.simulation.models import Spec, model_of, reference_of, start_of
from fedeq_edge.training.holdout import held_out
from fedeq_edge.training.recommend import recommend
from fedeq_edge.training.step import Calibration, Plan, Vector
from fedeq_edge.wire.topics import Topics

_DIGITS_CLIENTS = 6
# `fedeq data prepare` names its arrays alike for every data set: a study on another file of that set takes it as well.
_PREPARED = DataTable()
Fleet = Mapping[str, ClientData]


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is, in few bytes. tuning: it trains on less, and the validation part stands for the test part."""

    experiment: Experiment
    seed: int
    tuning: bool = False


@dataclass(frozen=True, slots=True)
class Board:
    """One client's device. plan: with the budgets of its group. calibration: what a step of the model costs it."""

    group: Group
    plan: Plan
    calibration: Calibration
    watts: float | None


@dataclass(frozen=True)
class Scenario:
    """A run's parts. fleet: who takes part; unseen: who is evaluated at the end alone. boards: by client."""

    setup: Setup
    fleet: Fleet
    unseen: Fleet
    spec: Spec
    plan: Plan
    method: Method
    schedule: Schedule
    reference: Calibration
    boards: Mapping[str, Board]

    @cached_property
    def start(self) -> tuple[Vector, Vector]:
        """theta (p,) and head (h,) before the first round."""
        return start_of(self.spec, self.setup.seed)

    @property
    def consensus(self) -> Vector:
        """z before the first round, (s,)."""
        theta, head = self.start
        return theta if self.method.heads == "personal" else np.concatenate([theta, head])

    @property
    def federation(self) -> Federation:
        """What the aggregator is set up with."""
        wire = self.setup.experiment.wire
        return Federation(
            topics=Topics("simulation"),
            model=msgspec.to_builtins(self.spec),
            plan=msgspec.to_builtins(self.plan),
            seed=self.setup.seed,
            rounds=self.plan.rounds if self.method.exchange else 0,
            method=self.method,
            schedule=self.schedule,
            up=(wire.up or wire.codec,),
            down=wire.down or wire.codec,
        )


def prepare(setup: Setup, fleet: Fleet | None = None) -> Scenario:
    """The parts of a run. fleet: its data, where that is at hand. Raises ConfigError or DataError in one line."""
    chosen = setup.experiment
    clients = load_data(chosen.data) if fleet is None else fleet
    summary = describe(clients)
    shape = summary.shape
    _check_tests(clients)
    seen, unseen = _divided(clients, chosen.data)
    shift, scale = statistics(seen)
    if chosen.data.flat:
        seen, unseen = ({name: flattened(data) for name, data in part.items()} for part in (seen, unseen))
        shift, scale = (_by_position(values, shape) for values in (shift, scale))
        shape = (math.prod(shape),)
    advised = recommend(shape, summary.classes, shift=shift, scale=scale)
    spec, plan = model_of(chosen.model, advised[0]), settings.changed(advised[1], chosen.train, "train")
    reference = _reference(chosen, spec, plan)
    method = method_of(chosen, advised[2])
    schedule = settings.changed(Schedule(min_devices=len(seen), seed=setup.seed), chosen.schedule, "schedule")
    _check_schedule(schedule, plan, len(seen))
    plan = plan.for_share(schedule.share(len(seen)))
    if isinstance(spec, ModelSpec):
        plan = plan.for_model(spec)
    if setup.tuning:
        seen = {name: _for_tuning(name, data, chosen.data) for name, data in seen.items()}
    scenario = Scenario(
        setup=setup,
        fleet=seen,
        unseen={} if setup.tuning else unseen,
        spec=spec,
        plan=plan,
        method=method,
        schedule=schedule,
        reference=reference,
        boards=_boards(chosen, sorted(seen), plan, reference, setup.seed),
    )
    _ = scenario.federation  # refuses what does not fit together
    return scenario


def load_data(table: DataTable) -> dict[str, ClientData]:
    """The clients by id. Raises DataError where the file cannot be used."""
    if table.file == "digits":
        from fedeq_edge.data.digits import digits_fleet  # noqa: PLC0415  # scikit-learn only for this data set

        return digits_fleet(devices=table.clients or _DIGITS_CLIENTS, seed=table.seed)
    path = Path(table.file)
    named = _PREPARED if "provenance" in column_names(path) else table
    fleet = load_fleet(
        path,
        x=named.x,
        y=named.y,
        client=named.client,
        test=named.test,
        where=table.where,
        classes=table.classes,
        clients=table.clients,
        seed=table.seed,
        apart=table.unseen if isinstance(table.unseen, str) else None,
    )
    return dict(zip(device_ids(list(fleet)), fleet.values(), strict=True))


def data_digest(fleet: Fleet) -> str:
    """sha256 over all samples and labels, by client."""
    digest = hashlib.sha256()
    for name in sorted(fleet):
        data = fleet[name]
        digest.update(name.encode())
        for part in (data.x_train, data.y_train, data.x_test, data.y_test):
            digest.update(np.ascontiguousarray(part).view(np.uint8).data)
        if data.validation is not None:
            digest.update(data.validation.tobytes())
    return digest.hexdigest()


def _check_tests(fleet: Fleet) -> None:
    untested = [name for name, data in fleet.items() if not len(data.y_test)]
    if untested:
        raise DataError(f"client {untested[0]} has no test samples to be evaluated by; give it some, or leave it out")


def _divided(fleet: Fleet, table: DataTable) -> tuple[Fleet, Fleet]:
    """Clients that take part, and those that are not seen before the end."""
    names = list(fleet)
    if isinstance(table.unseen, int):
        held = set(names[len(names) - table.unseen :]) if table.unseen else set()
    elif isinstance(table.unseen, str):
        held = {name for name, data in fleet.items() if data.apart}
        if not held:
            raise ConfigError(f"data.unseen: {table.unseen!r} marks no client of {table.file}; name another column")
    else:
        held = set(table.unseen)
        strangers = sorted(held - set(names))
        if strangers:
            raise ConfigError(f"data.unseen: there is no client {strangers[0]!r}; known are {', '.join(names[:20])}")
    if len(held) >= len(names):
        raise ConfigError(f"data.unseen keeps all {len(names)} clients out of training; leave at least one")
    return {n: d for n, d in fleet.items() if n not in held}, {n: d for n, d in fleet.items() if n in held}


def _by_position(values: tuple[float, ...], shape: tuple[int, ...]) -> tuple[float, ...]:
    """Each channel's value for every position of a sample that is laid out as a vector; one for all stays one."""
    return values if len(values) == 1 else tuple(np.repeat(values, math.prod(shape[1:])).tolist())


def _reference(chosen: Experiment, spec: Spec, plan: Plan) -> Calibration:
    given = chosen.cost
    if given is None:
        return reference_of(spec, plan)
    return Calibration(
        batch=plan.batch, fixed_s=given.fixed_s, evaluation_s=given.evaluation_s, adjoint_s=given.adjoint_s
    )


def _check_schedule(schedule: Schedule, plan: Plan, clients: int) -> None:
    if schedule.min_devices > clients:
        raise ConfigError(f"schedule.min_devices is {schedule.min_devices}, but {clients} clients take part; lower it")
    if plan.compute_s >= schedule.deadline_s:
        raise ConfigError(
            f"train.compute_s ({plan.compute_s:g}) must be below schedule.deadline_s ({schedule.deadline_s:g}): "
            "training is a part of a round"
        )


def _for_tuning(name: str, data: ClientData, table: DataTable) -> ClientData:
    """The client's training data alone, a part of which stands where the test part stood."""
    held = held_out(data, table.validation, seed=table.seed, ordered=table.ordered)
    if not len(held.y_test) or not len(held.y_train):
        raise ConfigError(
            f"tune: client {name} has {len(data.y_train)} training samples, {len(held.y_test)} of them for validation; "
            "mark some of them, not all, or raise data.validation"
        )
    return held


def _boards(chosen: Experiment, names: list[str], plan: Plan, reference: Calibration, seed: int) -> dict[str, Board]:
    """Which client is of which group: by lot, in the proportions that the groups ask for."""
    groups = chosen.fleet.groups
    shuffled = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    made = [board_of(group, plan, reference) for group in groups]
    total, ends, boards = math.fsum(group.share for group in groups), 0.0, {}
    begin = 0
    for board in made:
        ends += board.group.share / total * len(names)
        for name in shuffled[begin : round(ends)]:
            boards[name] = board
        begin = round(ends)
    return boards


def board_of(group: Group, plan: Plan, reference: Calibration) -> Board:
    """A device of this group. reference: what a step of the model costs on the reference core."""
    profile = load_profile(group.profile) if group.profile else None
    own = settings.changed(plan, {"budgets": group.budgets}, "fleet.groups") if group.budgets else plan
    slowdown = 1.0 if profile is None else 1.0 / profile.relative_speed
    return Board(
        group=group,
        plan=own,
        calibration=cost.slowed(reference, slowdown),
        watts=None if profile is None else profile.active_watts,
    )

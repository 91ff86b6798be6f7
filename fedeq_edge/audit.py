"""Every consensus of a federation computed again from the contributions that were accepted, and compared bit by bit.

An aggregator with `audit = true` keeps all contributions (storage/contributions.py) and writes for every close of a
round what counted, with which weights, and the digests of the consensus before and after it. The audit begins at the
initial weights and makes each close afresh: H = sum omega_i nu_i is summed over all members' own duals instead of kept
running, so a sum that has drifted, a contribution that was counted twice or not at all, or a dual that moved without
one shows as a difference. The consensus of the next round stands on this one: the audit ends at the first difference.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedeq_edge.consensus.constraint import Constraint, project
from fedeq_edge.consensus.fixed import (
    PENALTY_BITS,
    FixedVector,
    dual_step,
    fixed_penalty,
    fraction_bits,
    largest,
    penalty_of,
)
from fedeq_edge.consensus.privacy import Privacy, noised
from fedeq_edge.consensus.robust import fuse
from fedeq_edge.deq.layout import constraints
from fedeq_edge.errors import FedEqError, RemoteWireError, StateError
from fedeq_edge.gateway import federation_of, start_of
from fedeq_edge.protocol.federation import Federation
from fedeq_edge.protocol.publication import Publication
from fedeq_edge.settings import AggregatorSettings
from fedeq_edge.storage import Record, audit_trail, history, privacy_key
from fedeq_edge.training.step import Vector
from fedeq_edge.wire import coding, messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """What an audit has found.

    rounds: closes that are bit-equal, in sequence from the first. contributions: counted in them. starts: how often a
    device began with nu = 0. difference: the first thing that does not hold, in one line; empty where all does.
    duals: nu_i of every member after those rounds, (s,) int64.
    """

    rounds: int
    contributions: int
    starts: int
    difference: str
    duals: Mapping[str, FixedVector]

    @property
    def sound(self) -> bool:
        """Whether nothing differs."""
        return not self.difference

    @property
    def sentence(self) -> str:
        """For people."""
        if self.sound:
            return (
                f"z is bit-equal to the oracle over {self.contributions} accepted contributions "
                f"in {self.rounds} rounds; none is missing and none counts twice"
            )
        return f"{self.difference} ({self.rounds} rounds before it are bit-equal to the oracle)"


def audit(folder: Path, chosen: AggregatorSettings) -> Audit:
    """The audit of an aggregator's state folder; the aggregator may be at work meanwhile.

    Raises StateError where the folder holds no audit trail, or its files are damaged.
    """
    lines = [line for line in history(folder) if line["kind"] == "round"]
    if any("accepted" not in line for line in lines):
        raise StateError(f"{folder} holds no audit trail; set audit = true before a federation begins")
    federation = federation_of(chosen)
    oracle = _Oracle(federation, start_of(chosen), constraints(chosen.model), _key(folder, federation))
    difference = ""
    records = audit_trail(folder)
    try:
        for line in lines:
            oracle.close(line, records)
    except _DifferenceError as found:
        difference = str(found)
    return Audit(
        rounds=oracle.round,
        contributions=len(oracle.counted),
        starts=oracle.starts,
        difference=difference,
        duals=oracle.duals,
    )


def _key(folder: Path, federation: Federation) -> bytes:
    """Of the noise, empty where there is none. Raises StateError where the folder has lost it."""
    if federation.privacy is None:
        return b""
    key = privacy_key(folder)
    if key is None:
        raise StateError(f"{folder} holds no privacy.key, without which its noise cannot be told; restore it first")
    return key


class _DifferenceError(FedEqError):
    """The history is not what its contributions make; caught here."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A contribution as it counts in a close. difference: as it was decoded, (s,). step: what nu_i moved by."""

    device: str
    omega: int
    penalty: int
    factor: int
    difference: Vector
    step: FixedVector

    @property
    def weight(self) -> int:
        """omega_i kappa_i, in units of 2^-32."""
        return self.omega * self.penalty


@dataclass(slots=True)
class _Oracle:
    """The federation up to the close of `round`."""

    federation: Federation
    start: Vector
    sets: Sequence[Constraint]
    key: bytes = field(repr=False)
    round: int = 0
    starts: int = 0
    duals: dict[str, FixedVector] = field(default_factory=dict)
    counted: dict[tuple[str, int], int] = field(default_factory=dict)  # in which close
    _published: Publication = field(init=False)
    _bases: dict[int, bytes] = field(default_factory=dict)  # digest of z_hat while a round was open

    def __post_init__(self) -> None:
        z = self.start.astype(np.float64)
        project(z, self.sets)
        self._published = Publication("", z.astype(np.float32))

    def close(self, line: Mapping[str, Any], records: Iterator[Record]) -> None:
        """This close, too, is what the contributions make. Raises _DifferenceError where it is not."""
        number = self.round + 1
        if line["round"] != number:
            raise _DifferenceError(f"round {number}: rounds.jsonl goes on with round {line['round']}")
        self._expect(number, "begins from", line["base"])
        self._bases[number] = self._published.base
        self._admit(number, line)
        steps = self._take_in(number, line, records)
        if steps or self.federation.privacy is not None:
            self._move(number, line, steps)
        self._expect(number, "ends with", line["z"])
        self.round = number

    def _expect(self, number: int, what: str, digest: str) -> None:
        own = self._published.base.hex()
        if own != digest:
            raise _DifferenceError(f"round {number} {what} consensus {digest[:16]}, the oracle with {own[:16]}")

    def _admit(self, number: int, line: Mapping[str, Any]) -> None:
        """Duals are those of this close's members, and of who starts in it; the share of others has left H."""
        starting = {device for device, _ in line["started"]}
        unknown = line["members"].keys() - self.duals.keys() - starting
        if unknown:
            raise _DifferenceError(f"round {number} has member {min(unknown)}, which never started")
        zero = np.zeros(self.start.size, np.int64)
        self.duals = {device: self.duals.get(device, zero) for device in line["members"]}
        self.starts += len(line["started"])

    def _take_in(self, number: int, line: Mapping[str, Any], records: Iterator[Record]) -> list[_Step]:
        """What counts in this close, in order; a device that lost its state may have started anew in between."""
        steps: list[_Step] = []
        contributed = Counter[str]()
        for device in line["members"]:
            self._restart(line, device, 0)
        for entry, record in _matched(number, line, records):
            steps.append(self._count(number, entry, record))
            contributed[record.device] += 1
            self._restart(line, record.device, contributed[record.device])
        return steps

    def _restart(self, line: Mapping[str, Any], device: str, contributed: int) -> None:
        """nu = 0 where the device has started after so many contributions to this close."""
        if [device, contributed] in line["started"] and device in self.duals:
            self.duals[device] = np.zeros(self.start.size, np.int64)

    def _count(self, number: int, entry: Sequence[Any], record: Record) -> _Step:
        device, answered, omega = entry
        before = self.counted.get((device, answered))
        if before is not None:
            raise _DifferenceError(
                f"device {device}: its contribution for round {answered} counts twice, in rounds {before} and {number}"
            )
        self.counted[device, answered] = number
        difference = self._decoded(record)
        step = dual_step(difference, penalty_of(record.kappa), fraction_bits(np.float32), record.factor)
        if device in self.duals:  # else it was retired after it had contributed
            self.duals[device] = self.duals[device] + step
        return _Step(device, omega, record.kappa, record.factor, difference, step)

    def _decoded(self, record: Record) -> Vector:
        where = f"device {record.device}: its contribution for round {record.round}"
        try:
            received = messages.decode(record.blob)
            message = messages.contribution(received)
            difference = coding.decode(message.codec, received.body, message.length)
        except RemoteWireError as error:
            raise _DifferenceError(f"{where} cannot be decoded: {error}") from error
        self._published.run = self._published.run or message.run
        expected = (self._published.run, record.round, self._bases.get(record.round), self.start.size)
        if (message.run, message.round, message.base, message.length) != expected:
            raise _DifferenceError(f"{where} answers another task than that round's")
        return difference

    def _move(self, number: int, line: Mapping[str, Any], steps: Sequence[_Step]) -> None:
        """The server's step: algorithm.md, section 4."""
        members, privacy = line["members"], self.federation.privacy
        R = sum(omega * penalty for omega, penalty in members.values())
        center = self._center(steps) if privacy is None else self._noised(number, line["expected"], steps, privacy)
        move = center + self._correction(members, R)
        z = self._published.z_hat + self._share(steps, R) * move
        project(z, self.sets)
        difference = (z - self._published.z_hat).astype(np.float32)
        self._published.advance(difference, self.federation.down, number)

    def _share(self, steps: Sequence[_Step], R: int) -> float:
        """Of the step that z makes: all, or in "async" mode what the contributors have of R."""
        if self.federation.schedule.mode != "async" or R == 0:
            return 1.0
        return min(1.0, sum(one.weight for one in steps) / R)

    def _center(self, steps: Sequence[_Step]) -> NDArray[np.float64]:
        method = self.federation.method
        if method.robust not in ("trimmed", "median"):
            return _ratio([(one.omega, one.step) for one in steps], sum(one.weight for one in steps))
        if not any(one.factor for one in steps):  # measured only: the method had nothing to compare them with yet
            return np.zeros(self.start.size)
        differences = [(one.device, one.difference) for one in steps]
        return fuse(method, lambda: differences, [one.device for one in steps], self.start.size)

    def _noised(self, number: int, expected: float, steps: Sequence[_Step], privacy: Privacy) -> NDArray[np.float64]:
        """The private mean, with the noise that the key of the folder gives for this sum."""
        total = np.zeros(self.start.size, np.int64)
        for one in steps:
            total += one.omega * one.step
        rho = penalty_of(fixed_penalty(self.federation.method.rho))
        std = privacy.std(rho, fraction_bits(np.float32))
        released = noised(total, std, key=self.key, round_number=number)
        return _ratio([(1, released)], expected * fixed_penalty(rho))

    def _correction(self, members: Mapping[str, Sequence[int]], R: int) -> NDArray[np.float64]:
        """H / R afresh over all members; nothing for the server "mean"."""
        if self.federation.method.server != "fresh" or R == 0:
            return np.zeros(self.start.size)
        return _ratio([(omega, self.duals[device]) for device, (omega, _) in members.items()], R)


def _matched(number: int, line: Mapping[str, Any], records: Iterator[Record]) -> Iterator[tuple[Sequence[Any], Record]]:
    """What counts in this close, (entry, record): both are in the order in which they were accepted.

    Raises _DifferenceError where a record is missing, or one lies between them that should count and does not: one
    that was taken back is of a device that has left, or has started anew.
    """
    stayed = line["members"].keys() - {device for device, _ in line["started"]}
    for device, answered, *weight in line["accepted"]:
        for record in records:
            if (record.device, record.round) == (device, answered):
                yield (device, answered, *weight), record
                break
            if record.device in stayed:
                raise _DifferenceError(
                    f"round {number} leaves out the contribution of device {record.device} for round {record.round}"
                )
        else:
            raise _DifferenceError(f"round {number} counts one of device {device} for round {answered}, which is lost")


def _ratio(terms: Sequence[tuple[int, FixedVector]], weight: float) -> NDArray[np.float64]:
    """sum factor vector / weight, (s,), in the units of theta; summed without a limit where int64 could wrap."""
    wide = sum(abs(factor) * largest(vector) for factor, vector in terms) >= 2**63
    total = np.zeros(terms[0][1].size, object if wide else np.int64)
    for factor, vector in terms:
        total += factor * (vector.astype(object) if wide else vector)
    unit = 2.0 ** (PENALTY_BITS - fraction_bits(np.float32))
    ratio: NDArray[np.float64] = total.astype(np.float64) * unit / float(weight)
    return ratio

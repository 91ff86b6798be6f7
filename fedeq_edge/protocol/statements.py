"""What a device says of itself and of its work: plain values, made into messages."""

import hashlib
import random
from dataclasses import dataclass

from fedeq_edge.protocol.state import Pending
from fedeq_edge.training.step import LocalResult, Personal
from fedeq_edge.wire import chunks, coding, messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What a device says of itself at birth. boot: new at every start of the agent."""

    device: str
    boot: str
    samples: int
    profile: str = ""
    emulated: bool = False
    data_age_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Resources of the agent's processes so far, bytes; battery: percent, None on mains or without one."""

    wire_up: int = 0
    wire_down: int = 0
    rss_idle: int = 0
    rss_peak: int = 0
    battery: float | None = None


def seed(task: messages.Task, device: str) -> int:
    """The same for a repeated round, another for every device, round and federation."""
    name = f"{task.run}/{device}/{task.round}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def birth(identity: Identity, codecs: tuple[str, ...], battery: float | None) -> messages.Birth:
    """Who we are. battery: percent, None on mains or without one."""
    return messages.Birth(
        boot=identity.boot,
        samples=identity.samples,
        profile=identity.profile,
        emulated=identity.emulated,
        codecs=codecs,
        data_age_s=identity.data_age_s,
        battery=battery,
    )


def contribution(
    identity: Identity, task: messages.Task, result: LocalResult, usage: Usage, repeated_bytes: int
) -> Pending:
    """What training for this task has come to, coded as the task wants it. repeated_bytes: sent twice so far.

    Raises LocalWireError where training left NaN behind.
    """
    body = coding.encode(task.codec, result.difference, random.Random(seed(task, identity.device)))
    message = messages.Contribution(
        run=task.run,
        round=task.round,
        boot=identity.boot,
        base=task.model,
        samples=identity.samples,
        codec=task.codec,
        length=result.difference.size,
        metrics=_metrics(result, usage, repeated_bytes),
    )
    blob = messages.encode(message, body)
    masked = task.masking is not None
    return Pending(round=task.round, kappa=task.kappa, blob=blob, transfer=chunks.digest(blob), masked=masked)


def _metrics(result: LocalResult, usage: Usage, repeated_bytes: int) -> messages.Metrics:
    return messages.Metrics(
        loss=result.loss,
        residual=result.residual,
        backward_residual=result.backward_residual,
        forward=result.budget.forward,
        adjoint=result.budget.adjoint,
        seconds=result.seconds,
        accuracy=result.accuracy_consensus,
        reduced=result.reduced,
        wire_up=usage.wire_up,
        wire_down=usage.wire_down,
        repeated_bytes=repeated_bytes,
        battery=usage.battery,
    )


def report(task: messages.Task, personal: Personal, usage: Usage) -> messages.Report:
    """The numbers of our own model, fitted for this task."""
    return messages.Report(
        run=task.run,
        round=task.round,
        forward=personal.budget.forward,
        adjoint=personal.budget.adjoint,
        residual=personal.residual,
        certificate=personal.certificate,
        accuracy_personal=personal.accuracy_personal,
        accuracy_consensus=personal.accuracy_consensus,
        local_only=personal.local_only,
        rss_idle_bytes=usage.rss_idle,
        rss_peak_bytes=usage.rss_peak,
        wire_up=usage.wire_up,
        wire_down=usage.wire_down,
    )

"""The consensus in force as blobs for devices: whole, and as coded steps from the last few before it."""

from collections import deque
from dataclasses import dataclass, field

from fedeq_edge.errors import RemoteWireError
from fedeq_edge.protocol.state import vector_digest
from fedeq_edge.training.step import Vector
from fedeq_edge.wire import coding, messages


@dataclass(frozen=True, slots=True)
class _Step:
    base: bytes  # digest of the consensus that it starts from
    blob: bytes


@dataclass(slots=True)
class Publication:
    """What a device is sent. base: digest of z_hat, of which `round` was the last round.

    Steps are kept while they are shorter in sum than the whole, and always the last `steps_kept`.
    """

    run: str
    z_hat: Vector
    round: int = 0
    steps_kept: int = 1
    base: bytes = field(init=False)
    _whole: bytes = b""  # made when first asked for
    _steps: deque[_Step] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.base = vector_digest(self.z_hat)

    @property
    def step(self) -> bytes:
        """The last step as a blob, empty before the first since our start."""
        return self._steps[-1].blob if self._steps else b""

    def advance(self, difference: Vector, codec: coding.Codec, round_number: int) -> Vector:
        """z_hat has moved by what every client decodes of `difference`, which is returned (algorithm.md, coding).

        Rounded to nearest: what that leaves out stays in z - z_hat and is in the next step. Two bits converge so, and
        diverge when rounded at random.
        """
        body = coding.encode(codec, difference)
        decoded = coding.decode(codec, body, difference.size)
        self._move(self.z_hat + decoded, body, codec, round_number)
        return decoded

    def follow(self, model: messages.Model, body: bytes | memoryview) -> None:
        """z_hat is that of another publication, which sent this step from ours, or all of it; the codes stay its own.

        Raises RemoteWireError, and then nothing has changed, where it starts or ends elsewhere than it says.
        """
        if model.length != self.z_hat.size or model.base not in (b"", self.base):
            raise RemoteWireError(f"step of {model.length} values starts from another consensus than ours")
        decoded = coding.decode(model.codec, body, model.length)
        moved = self.z_hat + decoded if model.base else decoded
        if vector_digest(moved) != model.model:
            raise RemoteWireError(f"consensus of round {model.round} has another digest than its name")
        if model.base:
            self._move(moved, bytes(body), model.codec, model.round)
        else:
            self._steps.clear()
            self.z_hat, self.round, self.base, self._whole = moved, model.round, model.model, b""

    def _move(self, z_hat: Vector, body: bytes, codec: coding.Codec, round_number: int) -> None:
        before, self.round = self.base, round_number
        self.z_hat = z_hat
        self.base, self._whole = vector_digest(self.z_hat), b""
        if self.base != before:
            self._steps.append(_Step(before, self._blob(body, codec, before)))
        while len(self._steps) > self.steps_kept and self._steps_bytes() >= self._whole_bytes():
            self._steps.popleft()

    def _steps_bytes(self) -> int:
        return sum(len(step.blob) for step in self._steps)

    def _whole_bytes(self) -> int:
        return coding.largest_bytes("f32", self.z_hat.size)

    def step_from(self, held: bytes, wanted: bytes) -> bytes | None:
        """The step from the consensus with digest `held` on the way to `wanted`, None where steps do not lead there.

        The device asks again until it has come there.
        """
        wanted_is_ahead = wanted == self.base
        for step in reversed(self._steps):  # near the optimum a consensus may come back: only its last step leads on
            if step.base == held:
                return step.blob if wanted_is_ahead else None
            wanted_is_ahead = wanted_is_ahead or step.base == wanted
        return None

    def whole(self) -> bytes:
        """The consensus in force for a device that steps do not help."""
        if not self._whole:
            self._whole = self._blob(coding.encode("f32", self.z_hat), "f32", b"")
        return self._whole

    def _blob(self, body: bytes, codec: coding.Codec, base: bytes) -> bytes:
        message = messages.Model(
            run=self.run, round=self.round, model=self.base, base=base, codec=codec, length=self.z_hat.size
        )
        return messages.encode(message, body)

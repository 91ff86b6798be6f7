"""Applications that ask, over a unix socket or the loopback, and models to be asked."""

import contextlib
import http.client
import io
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from msgspec import to_builtins

from fedeq_edge import modelfile
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.modelfile import ModelFile
from fedeq_edge.serving.address import Address
from fedeq_edge.training.step import Budget

FEATURES, CLASSES = 16, 3
DENSE = ModelSpec(input_shape=(FEATURES,), classes=CLASSES, channels=8)
CONVOLUTIONAL = ModelSpec(input_shape=(1, 4, 4), classes=CLASSES, channels=8)
EXAMPLE = Path(__file__).parents[2] / "export" / "example"
JSON, NPY = {"Content-Type": "application/json"}, {"Content-Type": "application/x-npy"}


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back."""

    status: int
    body: dict[str, Any]

    @property
    def error(self) -> str:
        told: str = self.body["error"]
        return told


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=60.0)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@dataclass(frozen=True, slots=True)
class Application:
    """Somebody who asks at an address."""

    address: Address

    def connect(self) -> http.client.HTTPConnection:
        if self.address.path is not None:
            return _UnixConnection(self.address.path)
        return http.client.HTTPConnection("127.0.0.1", self.address.port, timeout=60.0)

    def send(self, method: str, target: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Reply:
        """One request on a connection of its own."""
        connection = self.connect()
        try:
            connection.request(method, target, body=body, headers=headers or {})
            response = connection.getresponse()
            return Reply(response.status, json.loads(response.read()))
        finally:
            connection.close()

    def health(self) -> Reply:
        return self.send("GET", "/v1/health")

    def infer(self, x: np.ndarray[Any, Any], query: str = "") -> Reply:
        """The samples as .npy."""
        return self.send("POST", f"/v1/infer{query}", npy(x), NPY)

    def infer_json(self, x: np.ndarray[Any, Any], query: str = "") -> Reply:
        return self.send("POST", f"/v1/infer{query}", json.dumps(x.tolist()).encode(), JSON)


def npy(x: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, x)
    return stream.getvalue()


def samples(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).normal(size=(count, FEATURES)).astype(np.float32)


def personal(spec: ModelSpec = DENSE, *, seed: int = 0, round_number: int = 3) -> ModelFile:
    """A model as a federation leaves it."""
    theta, head = initial(spec, seed)
    return ModelFile(
        model=to_builtins(spec),
        theta=theta,
        head=head,
        budget=Budget(forward=6, adjoint=2),
        run="r",
        round=round_number,
    )


def keep(state: Path, model: ModelFile) -> None:
    """The model is the newest of the state folder."""
    state.mkdir(exist_ok=True)
    modelfile.write(state / "personal.fedeq", model)


def answering(agent: int) -> list[psutil.Process]:
    """The answering processes of the process with this id."""
    return [child for child in psutil.Process(agent).children() if "fedeq_edge.serving" in _command(child)]


def gone(process: psutil.Process) -> bool:
    """Whether it has ended, reaped or not."""
    return not _command(process)


def _command(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.NoSuchProcess):  # a zombie is none, either
        command: list[str] = process.cmdline()
        return command
    return []

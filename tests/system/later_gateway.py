"""A gateway of a later version, whose models have a cell of which nothing in the package knows.

    z = tanh(g) * tanh(W relu(z) + u),   u = U x + b,   z_0 = tanh(g) * tanh(u) = f(0)

|tanh| < 1 and tanh and relu are 1-Lipschitz, so the rows of W bound gamma, and entries of z* are below 1.

Run as `python later_gateway.py SETTINGS`: the gateway of this version on its broker and disk, but for the model.
"""

import secrets
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedeq_edge import logs, settings
from fedeq_edge.consensus.admm import Consensus
from fedeq_edge.deq.description import Bound, Description, Parameter, Proof
from fedeq_edge.deq.initial import start
from fedeq_edge.gateway import Gateway, federation_of
from fedeq_edge.onnx.graph import Part
from fedeq_edge.onnx.pieces import Pieces
from fedeq_edge.onnx.training import compile_training
from fedeq_edge.protocol.aggregator import Aggregator, new_state
from fedeq_edge.settings import AggregatorSettings

FEATURES, CLASSES, WIDTH = 16, 3, 8
MODEL: dict[str, Any] = {"cell": "gated", "input_shape": [FEATURES], "classes": CLASSES, "width": WIDTH, "gate": "tanh"}
"""In the manifest: no ModelSpec of this version."""
DESCRIPTION = Description(
    input_shape=(FEATURES,),
    theta=(
        Parameter(name="encoder.weight", shape=(WIDTH, FEATURES), deviation=0.25),
        Parameter(name="encoder.bias", shape=(WIDTH,)),
        Parameter(name="cell.gate", shape=(WIDTH,), start=1.0),
        Parameter(name="cell.mixing", shape=(WIDTH, WIDTH), deviation=0.3),
    ),
    head=(
        Parameter(name="head.weight", shape=(CLASSES, WIDTH), deviation=0.35),
        Parameter(name="head.bias", shape=(CLASSES,)),
    ),
    bounds=(Bound(kind="rows", parameter="cell.mixing", radius=0.8),),
    proof=Proof(kind="rows", parameter="cell.mixing"),
)


def pieces() -> Pieces:
    """The architecture as the compiler takes it."""
    return Pieces(
        description=DESCRIPTION,
        state_shape=(WIDTH,),
        stem=_stem(),
        start=_gated(Part("start"), "injection", "z_0"),
        cell=_cell(),
        head=_head(),
        shapes={parameter.name: parameter.shape for parameter in (*DESCRIPTION.theta, *DESCRIPTION.head)},
    )


def states(x: NDArray[np.float32], theta: NDArray[np.float32], evaluations: int) -> NDArray[np.float64]:
    """z_K (B, WIDTH) by the formula above."""
    U, b, g, W = (slot.view(theta.astype(np.float64)) for slot in DESCRIPTION.theta_layout)
    u = x @ U.T + b
    z = np.tanh(g) * np.tanh(u)
    for _ in range(evaluations):
        z = np.tanh(g) * np.tanh(np.maximum(z, 0.0) @ W.T + u)
    return np.asarray(z)


def _stem() -> Part:
    part = Part("stem")
    part.apply("Gemm", "x", "encoder.weight", "encoder.bias", name="injection", transB=1)
    return part


def _cell() -> Part:
    part = Part("cell")
    mixed = part.apply("Gemm", part.apply("Relu", "z"), "cell.mixing", "injection", transB=1)
    return _gated(part, mixed, "f")


def _gated(part: Part, value: str, name: str) -> Part:
    part.apply("Mul", part.apply("Tanh", value), part.apply("Tanh", "cell.gate"), name=name)
    return part


def _head() -> Part:
    part = Part("head")
    part.apply("Gemm", "z_star", "head.weight", "head.bias", name="logits", transB=1)
    return part


class LaterGateway(Gateway):
    """Its federation trains the model above instead of the one in its settings."""

    def _open(self) -> Aggregator:
        federation = replace(federation_of(self._settings), model=MODEL)
        theta, _ = start(DESCRIPTION, self._settings.seed)
        return Aggregator(
            federation=federation,
            consensus=Consensus(
                theta, method=federation.method, constraints=DESCRIPTION.constraints, duals=self._folder.duals
            ),
            duals=self._folder.duals,
            boot=secrets.token_hex(8),
            state=new_state(f"{self._settings.federation}-{secrets.token_hex(4)}"),
            find_blob=self._folder.find,
            graph=compile_training(pieces()),
        )


if __name__ == "__main__":
    logs.configure()
    config = Path(sys.argv[1])
    LaterGateway(config, settings.load(config, AggregatorSettings)).run()

"""The models that runs compare: equilibrium models, and explicit networks beside them."""

import importlib.util
from collections.abc import Mapping
from typing import Any, Final

from fedeq_edge import backends, settings
from fedeq_edge.backends import open_backend
from fedeq_edge.consensus.constraint import Constraint
from fedeq_edge.deq import layout
from fedeq_edge.deq.initial import initial, start
from fedeq_edge.deq.spec import ModelSpec, published
from fedeq_edge.errors import ConfigError
from fedeq_edge.simulation import cost
from fedeq_edge.simulation.networks import NETWORKS, ExplicitSpec, network
from fedeq_edge.training.backend import Backend
from fedeq_edge.training.step import BackendName, Calibration, Plan, Vector

Spec = ModelSpec | ExplicitSpec
PRESETS: Final = ("recommended", "plain", "published-s", "published-m", *NETWORKS)


def check_installed(table: Mapping[str, Any], backend: BackendName) -> None:
    """What trains the model of a [model] table is here, as far as that shows without loading it. Raises ConfigError."""
    if backend == "torch" or kind_of(table) is ExplicitSpec:
        _check_found("torch", "torch")
    else:
        _check_found("onnx", "onnx")
        _check_found("onnxruntime", "onnx")


def _check_found(library: str, extra: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise ConfigError(f"{library} is not installed; run pip install 'fedeq-edge[{extra}]'")


def kind_of(table: Mapping[str, Any]) -> type[Spec]:
    """What a [model] table describes. Raises ConfigError on an unknown preset."""
    preset = table.get("preset", PRESETS[0])
    if preset not in PRESETS:
        raise ConfigError(f"model.preset is {preset!r}; known are {', '.join(PRESETS)}")
    return ExplicitSpec if preset in NETWORKS or "network" in table else ModelSpec


def model_of(table: Mapping[str, Any], advised: ModelSpec) -> Spec:
    """The model of a [model] table. advised: what is recommended for the data, whose shape and classes all have.

    Raises ConfigError where the table's changes do not fit.
    """
    shape, classes = advised.input_shape, advised.classes
    measured: dict[str, Any] = {"shift": advised.shift, "scale": advised.scale}
    given: dict[str, Any] = {"input_shape": shape, "classes": classes, **measured}
    preset, changes = str(table.get("preset", PRESETS[0])), {key: table[key] for key in table if key != "preset"}
    if preset in NETWORKS:
        return settings.changed(network(preset, shape, classes, **measured), changes, "model")
    if "network" in table:
        return settings.convert({**given, **changes}, ExplicitSpec, "model")
    base = advised
    if preset.startswith("published"):
        base = settings.changed(published(shape, classes, "S" if preset.endswith("s") else "M"), measured, "model")
    elif preset == "plain":
        base = ModelSpec(**given)
    return settings.changed(base, changes, "model")


def start_of(spec: Spec, seed: int) -> tuple[Vector, Vector]:
    """theta (p,) and head (h,) before the first round."""
    if isinstance(spec, ModelSpec):
        return initial(spec, seed)
    return start(_explicit().describe(spec), seed)


def constraints_of(spec: Spec) -> tuple[Constraint, ...]:
    """The convex sets that the server keeps z in."""
    return layout.constraints(spec) if isinstance(spec, ModelSpec) else ()


def reference_of(spec: Spec, plan: Plan) -> Calibration:
    """Counted seconds of a training step on the reference core."""
    if isinstance(spec, ModelSpec):
        return cost.planned(cost.counted(spec, plan.batch), plan)
    return cost.counted_explicit(_explicit().multiplications(spec), plan.batch)


def backend_of(spec: Spec, plan: Plan, name: BackendName) -> Backend:
    """The model on this backend. Raises ConfigError where that is not installed or cannot compute it."""
    if isinstance(spec, ModelSpec):
        return open_backend(name, spec, plan)
    if name != "torch":
        raise ConfigError(f'backend = "{name}" has no explicit networks; set backend = "torch" for this variant')
    backends.one_thread()
    return _explicit().ExplicitBackend(spec, plan)  # type: ignore[no-any-return]


def _explicit() -> Any:
    from fedeq_edge.simulation import explicit  # noqa: PLC0415  # torch

    return explicit

"""What came of a demo: models as ONNX files, and the numbers of summary.json."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fedeq_edge import __version__, modelfile, settings
from fedeq_edge.agent import PERSONAL
from fedeq_edge.data.npz import ClientData, describe
from fedeq_edge.deq.layout import head_layout, size, theta_layout
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.settings import AgentSettings, AggregatorSettings
from fedeq_edge.storage import history


def read_status(folder: Path) -> dict[str, Any] | None:
    """The aggregator's latest status, None before its first."""
    try:
        found: dict[str, Any] = json.loads((folder / "status.json").read_text())
    except FileNotFoundError:
        return None
    return found


def export_models(out: Path, fleet: Mapping[str, ClientData]) -> dict[str, dict[str, Any]]:
    """model.onnx beside each device that has a personal model, and what its check found."""
    from fedeq_edge.onnx.export import export  # noqa: PLC0415  # onnx, onnxruntime and torch only from here on
    from fedeq_edge.onnx.runtime import Predictor  # noqa: PLC0415

    found: dict[str, dict[str, Any]] = {}
    for device, data in fleet.items():
        folder = out / "devices" / device
        if not (folder / "state" / PERSONAL).exists():
            continue
        model = modelfile.read(folder / "state" / PERSONAL)
        path = folder / "model.onnx"
        budget = model.budget.forward
        verification = export(model.spec, model.theta, model.head, path, budget=budget, round_number=model.round)
        answer = Predictor(path).infer(data.x_test) if len(data.y_test) else None
        found[device] = {
            "path": str(path.relative_to(out)),
            "max_abs_diff": verification.max_abs_diff,
            "iterations": verification.iterations_mean,
            "latency_ms": verification.latency_ms,
            "accuracy": None if answer is None else float(np.mean(answer.logits.argmax(1) == data.y_test)),
        }
    return found


def summarise(
    out: Path,
    fleet: Mapping[str, ClientData],
    chosen: AggregatorSettings,
    exported: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What the aggregator's history, the devices' reports and the exports say, as in summary.json."""
    lines = history(out / "aggregator" / "state")
    rounds = [line for line in lines if line["kind"] == "round"]
    reports = {line["device"]: line for line in lines if line["kind"] == "report"}
    devices = [
        _device_summary(out, device, len(data.y_train), rounds, reports.get(device), exported.get(device))
        for device, data in fleet.items()
    ]
    personal = _mean(device["accuracy"]["personal"] for device in devices)
    local = _mean(device["accuracy"]["local_only"] for device in devices)
    status = read_status(out / "aggregator" / "state") or {}
    return {
        "version": __version__,
        "out": str(out),
        "model": {**msgspec.to_builtins(chosen.model), **_sizes(chosen.model)},
        "method": chosen.resolved_method().name,
        "heads": chosen.resolved_method().heads,
        "codec": chosen.codec,
        "rounds": len(rounds),
        "accuracy": {
            "personal": personal,
            "consensus": _mean(device["accuracy"]["consensus"] for device in devices),
            "local_only": local,
            "worst_five_personal": _worst_five([device["accuracy"]["personal"] for device in devices]),
        },
        "errors_saved": None if personal is None or not local or local >= 1.0 else (personal - local) / (1.0 - local),
        "bytes_per_client_round": _bytes(chosen.model, reports, rounds),
        "aggregator": {"rss_peak_bytes": status.get("rss_peak_bytes"), "cpu_s": status.get("cpu_s")},
        "devices": devices,
    }


def data_summary(name: str, fleet: Mapping[str, ClientData]) -> dict[str, Any]:
    """What the fleet learned from."""
    summary = describe(fleet)
    return {
        "name": name,
        "clients": len(fleet),
        "classes": summary.classes,
        "train_samples": sum(len(data.y_train) for data in fleet.values()),
        "test_samples": sum(len(data.y_test) for data in fleet.values()),
        "input_shape": list(summary.shape),
    }


def _sizes(spec: ModelSpec) -> dict[str, int]:
    return {"theta_parameters": size(theta_layout(spec)), "head_parameters": size(head_layout(spec))}


def _device_summary(
    out: Path,
    device: str,
    samples: int,
    rounds: Sequence[Mapping[str, Any]],
    reported: Mapping[str, Any] | None,
    exported: Mapping[str, Any] | None,
) -> dict[str, Any]:
    own = [line["devices"][device] for line in rounds if device in line["devices"]]
    told = reported or {}
    board = settings.load(out / "devices" / device / "agent.toml", AgentSettings)
    return {
        "id": device,
        "profile": board.profile,
        "emulated": board.emulate,
        "samples": samples,
        "budget": {
            "forward": max((line["forward"] for line in own), default=None),
            "adjoint": max((line["adjoint"] for line in own), default=None),
        },
        "residual_mean": _mean(line["residual"] for line in own),
        "certificate": told.get("certificate"),
        "seconds_per_round": _mean(line["seconds"] for line in own),
        "rss_idle_bytes": told.get("rss_idle_bytes"),
        "rss_peak_bytes": told.get("rss_peak_bytes"),
        "accuracy": {
            "personal": told.get("accuracy_personal"),
            "consensus": told.get("accuracy_consensus"),
            "local_only": told.get("local_only"),
        },
        "onnx": dict(exported) if exported else None,
    }


def _bytes(
    spec: ModelSpec, reports: Mapping[str, Mapping[str, Any]], rounds: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Bytes on the wire per client and round in which it took part, beside the whole model as float32 each way."""
    taken = {device: sum(device in line["contributed"] for line in rounds) for device in reports}
    whole = 4 * sum(_sizes(spec).values())
    return {
        "up": _mean(reports[device]["wire_up"] / count for device, count in taken.items() if count),
        "down": _mean(reports[device]["wire_down"] / count for device, count in taken.items() if count),
        "float32_full_model": {"up": whole, "down": whole},
    }


def _mean(values: "Iterator[float | None] | Sequence[float | None]") -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _worst_five(accuracies: Sequence[float | None]) -> float | None:
    return _mean(sorted(value for value in accuracies if value is not None)[:5])

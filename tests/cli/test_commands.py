"""Commands that answer: JSON on stdout for programs, nothing but it."""

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from msgspec import to_builtins
from msgspec.structs import replace

from fedeq_edge import modelfile, orders, storage
from fedeq_edge.deq.description import describe
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.onnx.reading import read_training
from fedeq_edge.onnx.trainer import TrainingGraph
from fedeq_edge.onnx.training import build_training
from fedeq_edge.storage import AggregatorFolder, locked
from fedeq_edge.storage.status import write_status
from fedeq_edge.training.step import Budget

if TYPE_CHECKING:
    from tests.cli.conftest import Fedeq

SPEC = ModelSpec(input_shape=(6,), classes=2, channels=8)


@pytest.fixture
def personal(place: Path) -> Path:
    """A device's model, as it began."""
    theta, head = initial(SPEC, 0)
    path = place / "personal.fedeq"
    modelfile.write(
        path,
        modelfile.ModelFile(
            model=to_builtins(SPEC), theta=theta, head=head, budget=Budget(forward=6, adjoint=2), device="a"
        ),
    )
    return path


@pytest.fixture
def image(place: Path) -> Path:
    """A model of images, and data for it in images.npz."""
    spec = ModelSpec(input_shape=(1, 6, 6), classes=2, cell="residual", channels=8, groups=4)
    theta, head = initial(spec, 0)
    path = place / "image.fedeq"
    modelfile.write(
        path, modelfile.ModelFile(model=to_builtins(spec), theta=theta, head=head, budget=Budget(forward=4, adjoint=2))
    )
    x = np.random.default_rng(0).normal(size=(40, 1, 6, 6)).astype(np.float32)
    np.savez(place / "images.npz", x=x, y=np.arange(40) % 2)
    return path


def _json(fedeq: "Fedeq", *arguments: str | Path) -> Any:
    told = fedeq(*arguments, "--json")
    assert told.status == 0, told.err
    return json.loads(told.out)


def test_device_probe_knows_this_machine(fedeq: "Fedeq") -> None:
    found = _json(fedeq, "device", "probe")
    assert found["effective_cores"] > 0
    assert found["effective_memory_bytes"] > 10**8
    assert {"arch", "cpu_part", "profile"} <= set(found)
    assert {"temperature_c", "throttled", "battery"} <= set(found["reading"])


def test_device_probe_measures_a_model_and_gives_its_budget(fedeq: "Fedeq", personal: Path) -> None:
    measured = _json(fedeq, "device", "probe", "--model", personal)["model"]
    assert measured["calibration"]["slowdown"] == 1.0
    assert measured["predicted_s"] > 0
    assert measured["budget"]["forward"] >= 1
    assert measured["budget"]["adjoint"] >= 0


def test_device_probe_measures_a_training_graph_as_well(fedeq: "Fedeq", personal: Path) -> None:
    measured = _json(fedeq, "device", "probe", "--model", personal, "--backend", "onnx")["model"]
    assert measured["predicted_s"] > 0


def test_aggregator_graph_writes_what_its_devices_train_by(fedeq: "Fedeq", place: Path) -> None:
    told = fedeq("aggregator", "graph", "--out", "plant.onnx")
    assert told.status == 0, told.err
    content = (place / "plant.onnx").read_bytes()
    assert hashlib.sha256(content).hexdigest() in told.err
    assert TrainingGraph(content).description == describe(ModelSpec(input_shape=(6,), classes=2))


def test_device_list_has_the_boards_of_the_kit(fedeq: "Fedeq") -> None:
    assert {"raspberry-pi-zero-2w", "raspberry-pi-4", "x86-64"} <= {
        board["id"] for board in _json(fedeq, "device", "list")
    }
    assert "raspberry-pi-4" in fedeq("device", "list").err


def test_data_inspect_counts_a_device_and_a_fleet(fedeq: "Fedeq", place: Path) -> None:
    alone = _json(fedeq, "data", "inspect", "data.npz")
    assert (alone["shape"], alone["classes"]) == ([6], 2)
    assert alone["clients"]["data"]["train"] == 32
    fleet = _json(fedeq, "data", "inspect", "fleet.npz", "--client", "client")
    assert {name: client["test"] for name, client in fleet["clients"].items()} == {"0": 4, "1": 4}


def test_aggregator_status_tells_whether_it_still_runs(fedeq: "Fedeq", place: Path) -> None:
    with locked(place / "state") as folder:
        told = {"run": "r", "status": "running", "round": 1, "rounds": 2, "online": [], "members": 0}
        counted = {"refusals": {"digest": 2}, "counters": {"accepted": 7, "duplicates": 0}, "denied": ["d9"]}
        AggregatorFolder(folder).write_status({**told, **counted, "broker": "connected", "pid": 2**22 + 1})
    found = _json(fedeq, "aggregator", "status")
    assert (found["run"], found["running"]) == ("r", False)
    shown = fedeq("aggregator", "status").err
    assert "not running" in shown
    assert "accepted 7, refused: digest 2" in shown
    assert "denied: d9" in shown


def test_agent_status_shows_why_the_aggregator_refused(fedeq: "Fedeq", place: Path) -> None:
    (place / "state").mkdir()
    told = {
        "device": "a",
        "pid": 2**22 + 1,
        "refusals": {"norm_bound": 1},
        "last_refusal": "device a: ten times larger",
    }
    write_status(place / "state", told)
    assert _json(fedeq, "agent", "status")["running"] is False
    shown = fedeq("agent", "status").err
    assert "norm_bound" in shown
    assert "ten times larger" in shown


def test_agent_status_without_an_agent_says_so(fedeq: "Fedeq", place: Path) -> None:
    told = fedeq("agent", "status")
    assert told.status == 2
    assert "has the agent run with this configuration?" in told.err


@pytest.mark.parametrize("order", ["deny", "allow", "retire"])
def test_an_order_waits_for_the_aggregator_in_its_folder(order: str, fedeq: "Fedeq", place: Path) -> None:
    (place / "state").mkdir()
    assert fedeq("aggregator", order, "pi-17").status == 0
    assert list(orders.taken(place / "state")) == [(order, "pi-17")]


def test_an_audit_without_a_trail_says_what_to_set(fedeq: "Fedeq", place: Path) -> None:
    with locked(place / "state") as folder:
        AggregatorFolder(folder).record({"kind": "round", "round": 1})
    told = fedeq("aggregator", "audit")
    assert told.status == 1
    assert "set audit = true before a federation begins" in told.err


def test_the_status_of_a_root_names_the_workers_that_it_waits_for(fedeq: "Fedeq", place: Path) -> None:
    told = {"run": "r", "status": "running", "round": 1, "rounds": 2, "workers": ["w0", "w1"], "contributed": ["w1"]}
    with locked(place / "state") as folder:
        AggregatorFolder(folder).write_status({**told, "broker": "connected", "refusals": {}, "pid": 2**22 + 1})
    shown = fedeq("aggregator", "status").err
    assert "shares of 1 of 2 workers are in" in shown
    assert "waits for w0" in shown


def test_a_model_is_exported_inspected_and_asked(fedeq: "Fedeq", place: Path, personal: Path) -> None:
    told = _json(fedeq, "model", "export", personal, "--out", "model.onnx", "--budget", "5", "--no-cross-check")
    assert told["max_abs_diff"] <= 1e-4
    assert told["bytes"] == (place / "model.onnx").stat().st_size
    assert _json(fedeq, "model", "inspect", personal)["device"] == "a"
    assert _json(fedeq, "model", "inspect", "model.onnx")["input_shape"] == [6]
    answer = _json(fedeq, "model", "infer", "model.onnx", "data.npz", "--budget", "1")
    assert answer["samples"] == 8
    assert answer["iterations_mean"] == 1.0


def test_a_personal_model_answers_as_the_file_exported_from_it(fedeq: "Fedeq", place: Path, personal: Path) -> None:
    fedeq("model", "export", personal, "--no-cross-check")
    ours, exported = (
        _json(fedeq, "model", "infer", model, "data.npz", "--budget", "5", "--tol", "1e-3")
        for model in (personal, "model.onnx")
    )
    assert ours["residual_max"] == pytest.approx(exported.pop("residual_max"), rel=1e-3)
    ours.pop("residual_max")
    assert ours == exported


def test_a_model_is_known_by_what_it_holds_whatever_its_name(fedeq: "Fedeq", place: Path, personal: Path) -> None:
    fedeq("model", "export", personal, "--out", "M2.ONNX", "--no-cross-check")
    personal.rename(place / "odd.onnx")
    for name, kind in (("M2.ONNX", {"kind": "inference"}), ("odd.onnx", {"device": "a"})):
        assert kind.items() <= _json(fedeq, "model", "inspect", name).items()
        assert _json(fedeq, "model", "infer", name, "data.npz")["samples"] == 8
    refused = fedeq("model", "export", "M2.ONNX")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "M2.ONNX is an ONNX file, and this needs the personal.fedeq that it was exported from" in refused.err


def test_inspecting_a_training_graph_does_not_print_the_graph_inside_it(fedeq: "Fedeq", place: Path) -> None:
    (place / "t.onnx").write_bytes(build_training(SPEC))
    told = _json(fedeq, "model", "inspect", "t.onnx")
    assert told["kind"] == "training"
    assert told["fedeq.solver_graph"].startswith("a graph of its own, ")
    assert fedeq("model", "inspect", "t.onnx").err.count("\n") < 40


def test_another_file_of_a_state_folder_is_no_model_and_nobody_is_told_to_delete_it(
    fedeq: "Fedeq", place: Path
) -> None:
    storage.save(place / "client.state", {"round": 3})
    refused = fedeq("model", "inspect", "client.state")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "client.state is whole, but no personal model" in refused.err
    assert "delete" not in refused.err


def test_an_export_replaces_an_earlier_one_and_nothing_else(fedeq: "Fedeq", place: Path, personal: Path) -> None:
    before = personal.read_bytes(), (place / "data.npz").read_bytes()
    for out in (personal, place / "data.npz"):
        refused = fedeq("model", "export", personal, "--out", out, "--no-cross-check")
        assert (refused.status, refused.err.count("\n")) == (2, 1)
        assert "is there already and is no ONNX file; name another" in refused.err
    assert (personal.read_bytes(), (place / "data.npz").read_bytes()) == before
    for _ in range(2):
        assert fedeq("model", "export", personal, "--out", "m.onnx", "--no-cross-check").status == 0


def test_a_personal_model_of_images_is_answered_with_the_whole_budget_if_no_sample_may_stop(
    fedeq: "Fedeq", place: Path, image: Path
) -> None:
    answer = _json(fedeq, "model", "infer", image, "images.npz", "--budget", "4", "--tol", "0")
    assert (answer["samples"], answer["iterations_mean"]) == (8, 4.0)


@pytest.mark.parametrize("exported", [True, False])
def test_a_sample_with_a_gap_is_left_without_an_answer_and_spoils_no_other(
    fedeq: "Fedeq", place: Path, personal: Path, exported: bool
) -> None:
    assert fedeq("model", "export", personal, "--no-cross-check").status == 0
    model = place / "model.onnx" if exported else personal
    clean = dict(np.load(place / "data.npz"))
    before = _json(fedeq, "model", "infer", model, "data.npz")
    x = clean["x"].astype(np.float32)
    x[14, 1] = np.nan  # every fifth row is a test row
    np.savez(place / "gaps.npz", **{**clean, "x": x})
    after = _json(fedeq, "model", "infer", model, "gaps.npz")
    assert (after["samples"], after["unanswered"]) == (before["samples"], 1)
    assert after["labels"] == [label if i != 2 else "?" for i, label in enumerate(before["labels"])]
    assert "8 samples, 1 without an answer, for NaN or infinity: " in fedeq("model", "infer", model, "gaps.npz").err


@pytest.mark.parametrize("lacking", ["torch", "the kind of the model"])
def test_a_personal_model_that_was_trained_by_a_graph_is_answered_by_it_where_nothing_else_can(
    fedeq: "Fedeq", place: Path, image: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    expected = _json(fedeq, "model", "infer", image, "images.npz", "--tol", "0")
    found = modelfile.read(image)
    brought = replace(found, solver=read_training(build_training(found.spec), "graph").solver)
    if lacking == "torch":
        monkeypatch.setitem(sys.modules, "torch", None)
        modelfile.write(image, brought)
    else:
        modelfile.write(image, replace(brought, model={**found.model, "cell": "unheard of"}))
    answer = _json(fedeq, "model", "infer", image, "images.npz")
    assert answer.pop("residual_max") == pytest.approx(expected.pop("residual_max"), rel=1e-3)
    assert answer == expected
    refused = fedeq("model", "infer", image, "images.npz", "--tol", "1e-3")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert "leave tol out" in refused.err


def test_model_bench_tells_the_curve_of_a_dense_model_by_both_libraries(
    fedeq: "Fedeq", place: Path, personal: Path
) -> None:
    told = _json(fedeq, "model", "bench", personal, "data.npz", "--budgets", "1..3,8", "--no-memory")
    assert [point["evaluations"] for point in told["points"]] == [1, 2, 3, 8]
    assert (told["samples"], told["own_budget"]) == (8, 6)
    for point in told["points"]:
        assert set(point["timings"]) == {"numpy", "torch", "onnx"}
        assert 0 <= point["accuracy"] <= 1
        assert point["certificate"]["evaluations"] == point["evaluations"]
    bounds = [point["certificate"]["bound"] for point in told["points"]]
    assert bounds == sorted(bounds, reverse=True)
    assert told["points"][-1]["change"] == 0


def test_model_bench_without_data_or_proof_leaves_out_what_it_cannot_know(fedeq: "Fedeq", image: Path) -> None:
    told = _json(fedeq, "model", "bench", image, "--budgets", "2", "--no-memory")
    (point,) = told["points"]
    assert (point["accuracy"], point["certificate"]) == (None, None)
    assert set(point["timings"]) == {"torch", "onnx"}
    shown = fedeq("model", "bench", image, "--budgets", "2", "--no-memory").err
    assert "no proof" in shown


def test_model_bench_measures_an_exported_file_with_its_memory(fedeq: "Fedeq", place: Path, personal: Path) -> None:
    for recipe, budgets in (("float16", [1, 4]), ("unrolled", [6])):
        fedeq("model", "export", personal, "--recipe", recipe, "--no-cross-check")
        more = [] if recipe == "float16" else ["--no-memory"]
        told = _json(fedeq, "model", "bench", "model.onnx", "data.npz", "--budgets", "1,4", *more)
        assert [point["evaluations"] for point in told["points"]] == budgets
        assert told["points"][0]["certificate"]["evaluations"] == budgets[0]
        assert set(told["points"][0]["timings"]) == {"onnx"}
        assert not more or told["memory_mb"] == {}
        assert more or 10 < told["memory_mb"]["onnx"] < 1000


def test_an_int8_file_is_calibrated_from_a_data_file(fedeq: "Fedeq", place: Path, image: Path) -> None:
    refused = fedeq("model", "export", image, "--recipe", "int8")
    assert (refused.status, refused.err.count("\n")) == (1, 1)
    assert "--data" in refused.err
    np.savez(place / "flat.npz", x=np.zeros((10, 7), np.float32), y=np.arange(10) % 2)
    assert "the model takes (n, 1, 6, 6)" in fedeq("model", "export", image, "--data", "flat.npz").err
    assert not (place / "model.onnx").exists()


@pytest.mark.parametrize("name", ["curve.html", "curve.svg"])
def test_model_bench_draws_its_curve(fedeq: "Fedeq", place: Path, personal: Path, name: str) -> None:
    told = fedeq("model", "bench", personal, "data.npz", "--budgets", "1,4", "--no-memory", "--out", name)
    assert told.status == 0, told.err
    assert f"drawn in {name}" in told.err
    assert "<svg" in (place / name).read_text()


def test_device_probe_finds_the_least_budget_that_is_proven(fedeq: "Fedeq", personal: Path) -> None:
    loose, tight = (
        _json(fedeq, "device", "probe", "--model", personal, "--accuracy", accuracy)["model"]["proven"]
        for accuracy in ("0.5", "0.001")
    )
    assert loose["budget"]["forward"] < tight["budget"]["forward"]
    assert min(loose["step_s"], tight["step_s"]) > 0


def test_device_probe_promises_no_accuracy_without_a_proof(fedeq: "Fedeq", image: Path) -> None:
    told = fedeq("device", "probe", "--model", image, "--accuracy", "0.1")
    assert (told.status, told.out) == (2, "")
    assert "nothing is proven of this model" in told.err


def test_data_of_another_shape_than_the_models_is_named(fedeq: "Fedeq", place: Path, personal: Path) -> None:
    fedeq("model", "export", personal, "--no-cross-check")
    np.savez(place / "wide.npz", x=np.zeros((10, 7), np.float32), y=np.arange(10) % 2)
    told = fedeq("model", "infer", "model.onnx", "wide.npz")
    assert told.status in (1, 2)
    assert told.err.startswith("fedeq: ")
    assert told.err.count("\n") == 1

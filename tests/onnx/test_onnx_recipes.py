"""Every recipe's file answers as promised, keeps samples apart, says what it is, and is refused where it may not be."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedeq_edge.consensus.constraint import project
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.layout import cell_weight, constraints
from fedeq_edge.deq.model import DEQ
from fedeq_edge.deq.spec import ModelSpec
from fedeq_edge.deq.wellposed import certificate
from fedeq_edge.errors import ConfigError, ExportError
from fedeq_edge.onnx import cross, graph, precision, wrap
from fedeq_edge.onnx.export import export
from fedeq_edge.onnx.recipe import recipes
from fedeq_edge.onnx.runtime import Predictor, describe
from fedeq_edge.training.curve import noise

Array = NDArray[np.float32]

SPECS = {
    "dense": ModelSpec(input_shape=(20,), classes=3, channels=24, shift=(0.5,), scale=(2.0,)),
    "monotone": ModelSpec(input_shape=(20,), classes=3, cell="monotone", channels=24, radius=0.5),
    "sequence": ModelSpec(input_shape=(3, 32), classes=3, channels=16, pool=4),
    "residual": ModelSpec(input_shape=(1, 8, 8), classes=3, cell="residual", channels=16, groups=4, pool=2),
}
SEQUENCE = SPECS["sequence"]
BUDGET = 40
needs_exporter = pytest.mark.skipif(cross.missing() is not None, reason=f"no exporter of torch's: {cross.missing()}")
RECIPES = ("float16", "int8", "onnxruntime", "unrolled")


def trained(spec: ModelSpec) -> tuple[Array, Array]:
    """Parameters whose answers differ between samples: a lively cell and a large head."""
    theta, head = initial(spec, 0)
    draw = np.random.default_rng(1)
    if spec.cell != "residual":
        wild = 0.1 if spec.cell == "monotone" else 1.0
        cell_weight(spec).view(theta)[:] = wild * draw.standard_normal(cell_weight(spec).shape)
        project(theta, constraints(spec))
    return theta, draw.standard_normal(head.shape).astype(np.float32)


def write(spec: ModelSpec, path: Path, recipe: str, *, budget: int = BUDGET, tol: float | None = None) -> Predictor:
    samples = noise(spec, np.random.default_rng(7), 64)
    export(spec, *trained(spec), path, budget=budget, tol=tol, recipe=recipe, samples=samples)
    return Predictor(path)


def test_these_are_all_the_recipes() -> None:
    assert set(RECIPES) <= set(recipes())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", SPECS)
def test_every_recipe_keeps_the_answers_of_every_cell_and_stops(name: str, recipe: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    x = noise(spec, np.random.default_rng(3), 40)
    budget = 4 if name == "residual" else BUDGET  # a block that is no contraction is trained for a few evaluations
    exact = write(spec, tmp_path / "exact.onnx", "onnxruntime").infer(x, tol=0.0, budget=budget)

    found = write(spec, tmp_path / "model.onnx", recipe, budget=budget).infer(x)

    error = np.linalg.norm(found.logits - exact.logits) / np.linalg.norm(exact.logits)
    assert error <= (0.1 if recipe == "int8" else 0.01)
    if recipe == "unrolled" or name == "residual":
        assert (found.iterations == budget).all()
    else:
        assert (found.iterations < budget).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_spoilt_sample_spoils_itself_alone_in_every_recipe(recipe: str, tmp_path: Path) -> None:
    predictor = write(SEQUENCE, tmp_path / "model.onnx", recipe)
    clean = noise(SEQUENCE, np.random.default_rng(3), 5)
    spoilt = clean.copy()
    spoilt[2, 1, 4] = np.nan
    others = [0, 1, 3, 4]

    before, after = predictor.infer(clean), predictor.infer(spoilt)

    np.testing.assert_array_equal(before.logits[others], after.logits[others])
    np.testing.assert_array_equal(before.iterations[others], after.iterations[others])
    assert (after.labels[2], after.iterations[2], after.residual[2]) == ("?", BUDGET, np.inf)


def test_int8_needs_samples_and_depends_on_nothing_else(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(SEQUENCE, tmp_path / f"{name}.onnx", "int8")

    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    with pytest.raises(ExportError, match="calibrated with real samples; name a file of them with --data"):
        export(SEQUENCE, *trained(SEQUENCE), tmp_path / "none.onnx", budget=4, recipe="int8")
    with pytest.raises(ExportError, match=r"samples have shape \(4, 2\), the model takes \(n, 3, 32\)"):
        export(SEQUENCE, *trained(SEQUENCE), tmp_path / "none.onnx", budget=4, samples=np.zeros((4, 2), np.float32))
    assert not (tmp_path / "none.onnx").exists()


def test_int8_weights_are_stored_in_int8_and_cannot_overflow_a_sum_of_two_products(tmp_path: Path) -> None:
    write(SEQUENCE, tmp_path / "model.onnx", "int8")

    body = next(node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "Loop").attribute[0].g
    (weight,) = (onnx.numpy_helper.to_array(c) for c in body.initializer if c.name == "cell.weight")

    assert weight.dtype == np.int8
    assert 2 * 255 * int(np.abs(weight.astype(int)).max()) < 2**15


def test_an_int8_cell_that_loses_the_answers_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_WEIGHT_STEPS", 1)

    with pytest.raises(ExportError, match="not written, in int8 the logits are off by"):
        write(SEQUENCE, tmp_path / "model.onnx", "int8")

    assert list(tmp_path.iterdir()) == []


def test_float16_halves_the_weights_and_certifies_the_rounded_ones(tmp_path: Path) -> None:
    spec = ModelSpec(input_shape=(64,), classes=10, channels=96)
    theta, head = trained(spec)
    for recipe in ("onnxruntime", "float16"):
        export(spec, theta, head, tmp_path / f"{recipe}.onnx", budget=9, recipe=recipe)

    whole, half = ((tmp_path / f"{recipe}.onnx").stat().st_size for recipe in ("onnxruntime", "float16"))
    told = json.loads(describe(tmp_path / "float16.onnx").metadata["fedeq.certificate"])

    proven = certificate(theta.astype(np.float16).astype(np.float32), spec, 9)
    assert proven is not None
    assert half <= 0.57 * whole
    assert told["bound"] == proven.bound


def test_a_weight_that_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    theta, head = trained(SEQUENCE)
    head[0] = 1e5
    with pytest.raises(ExportError, match="above 65504"):
        export(SEQUENCE, theta, head, tmp_path / "model.onnx", budget=4, recipe="float16")


def test_an_unrolled_file_has_no_control_flow_and_no_other_budget(tmp_path: Path) -> None:
    predictor = write(SEQUENCE, tmp_path / "model.onnx", "unrolled")
    operators = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    x = noise(SEQUENCE, np.random.default_rng(3), 2)

    assert not operators & {"Loop", "If", "Scan"}
    assert describe(tmp_path / "model.onnx").inputs == {"x": ["batch", 3, 32]}
    np.testing.assert_array_equal(predictor.infer(x).logits, predictor.infer(x, budget=BUDGET, tol=0.0).logits)
    for budget, tol in ((3, None), (None, 0.1)):
        with pytest.raises(ConfigError, match=r"unrolled for 40 evaluations .* recipe onnxruntime"):
            predictor.infer(x, budget=budget, tol=tol)
    with pytest.raises(ExportError, match="leave out tol"):
        write(SEQUENCE, tmp_path / "other.onnx", "unrolled", tol=0.1)


def _looped(spec: ModelSpec, *parts: graph.Part, evaluations: int) -> onnx.GraphProto:
    del evaluations
    return wrap.looped(spec, *parts)


def test_an_unrolled_graph_that_got_control_flow_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedeq_edge.onnx.export.unrolled", _looped)

    with pytest.raises(ExportError, match="the target has no control flow, and the graph holds Loop"):
        write(SEQUENCE, tmp_path / "model.onnx", "unrolled")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_file_tells_what_it_is(recipe: str, tmp_path: Path) -> None:
    write(SPECS["dense"], tmp_path / "model.onnx", recipe)

    found = describe(tmp_path / "model.onnx")
    told = found.metadata

    assert (found.kind, told["fedeq.recipe"]) == ("inference", recipe)
    assert told["fedeq.precision"] == (recipe if recipe in {"float16", "int8"} else "float32")
    assert told["fedeq.form"] == ("unrolled" if recipe == "unrolled" else "loop")
    assert json.loads(told["fedeq.input_norm"]) == {"shift": [0.5], "scale": [2.0], "applied": "in the graph"}
    assert ("fedeq.certificate" in told) == (recipe != "int8")
    assert found.size_bytes == (tmp_path / "model.onnx").stat().st_size
    assert str(tmp_path).encode() not in (tmp_path / "model.onnx").read_bytes()


def test_a_prediction_brings_the_certificate_of_the_evaluations_it_took(tmp_path: Path) -> None:
    spec = SPECS["dense"]
    predictor = write(spec, tmp_path / "model.onnx", "onnxruntime")
    x = noise(spec, np.random.default_rng(3), 4)
    x[1, 0] = np.nan

    found = predictor.infer(x, budget=30, tol=1e-3)

    expected = [certificate(trained(spec)[0], spec, int(count)) for count in found.iterations]
    expected[1] = None
    assert list(found.certificates) == expected
    assert write(spec, tmp_path / "int8.onnx", "int8").infer(x).certificates == (None,) * 4


def test_a_training_graph_is_described_and_asked_nothing(tmp_path: Path) -> None:
    write(SEQUENCE, tmp_path / "model.onnx", "onnxruntime")
    model = onnx.load(tmp_path / "model.onnx")
    onnx.helper.set_model_props(model, {"fedeq.schema_version": "1.7", "fedeq.kind": "training"})
    (tmp_path / "training.onnx").write_bytes(model.SerializeToString())

    assert describe(tmp_path / "training.onnx").kind == "training"
    with pytest.raises(ExportError, match="is a training graph, which does not answer; write one with"):
        Predictor(tmp_path / "training.onnx")


def test_a_file_whose_metadata_is_damaged_is_named(tmp_path: Path) -> None:
    write(SEQUENCE, tmp_path / "model.onnx", "onnxruntime")
    model = onnx.load(tmp_path / "model.onnx")
    onnx.helper.set_model_props(model, {"fedeq.schema_version": "1", "fedeq.solver": "{"})

    with pytest.raises(ExportError, match=r"metadata is damaged .*; export the model again"):
        Predictor(model.SerializeToString())


@pytest.mark.parametrize("labels", ["[1, 2, 3]", '["a"]', '"abc"', "{}"])
def test_labels_that_are_not_one_name_per_class_are_damage(labels: str, tmp_path: Path) -> None:
    write(SEQUENCE, tmp_path / "model.onnx", "onnxruntime")
    model = onnx.load(tmp_path / "model.onnx")
    told = {entry.key: entry.value for entry in model.metadata_props}
    onnx.helper.set_model_props(model, told | {"fedeq.labels": labels})

    with pytest.raises(ExportError, match=r"fedeq\.labels are not \d names\); export the model again"):
        Predictor(model.SerializeToString())


def test_a_spoilt_batch_mate_that_changes_an_answer_stops_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaking(part: graph.Part, spec: ModelSpec, images: list[str]) -> tuple[str, str]:
        states, residuals = honest(part, spec, images)
        worst = part.apply("ReduceMax", residuals, keepdims=1)
        return states, part.apply("Max", residuals, worst)

    honest = wrap._residuals
    monkeypatch.setattr(wrap, "_residuals", leaking)

    with pytest.raises(ExportError, match="not written"):
        write(SEQUENCE, tmp_path / "model.onnx", "onnxruntime")


@needs_exporter
def test_torchs_own_exporter_agrees(tmp_path: Path) -> None:
    spec = SPECS["dense"]
    found = export(spec, *trained(spec), tmp_path / "model.onnx", budget=12, cross_check=True)

    assert found.cross_check_diff is not None
    assert found.cross_check_diff <= 1e-5


def test_a_second_route_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross, "missing", lambda: "onnxscript is not installed")
    asked, unasked = (
        export(SEQUENCE, *trained(SEQUENCE), tmp_path / "m.onnx", budget=4, cross_check=wanted)
        for wanted in (True, False)
    )

    assert asked.cross_check == "not run: onnxscript is not installed"
    assert unasked.cross_check == "not asked for"


class _Head(nn.Module):
    """A head that does `break_it` to the features, in place of the model's own."""

    def __init__(self, break_it: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.break_it = break_it

    def forward(self, features: Tensor) -> Tensor:
        return self.break_it(features)[:, :3]


def second_route_does(monkeypatch: pytest.MonkeyPatch, break_it: Callable[[Tensor], Tensor]) -> None:
    """torch's exporter really runs, over a model that is not the one that was exported."""

    def broken(model: DEQ) -> DEQ:
        twin = honest(model)
        setattr(twin, "head", _Head(break_it))  # noqa: B010  # it is another kind of head
        return twin

    honest = cross._apart
    monkeypatch.setattr(cross, "_apart", broken)


def wrong_shape(features: Tensor) -> Tensor:
    return features @ torch.zeros(7, 7)


def forgotten(features: Tensor) -> Tensor:
    raise KeyError("weight")


@needs_exporter
def test_an_operator_that_torchs_exporter_does_not_know_leaves_the_comparison_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second_route_does(monkeypatch, torch.special.bessel_j0)

    found = export(SPECS["dense"], *trained(SPECS["dense"]), tmp_path / "m.onnx", budget=4, cross_check=True)

    assert found.cross_check.startswith(f"not run: torch {torch.__version__} cannot export it (DispatchError: ")
    assert "bessel" in found.cross_check
    assert "\n" not in found.cross_check
    assert (tmp_path / "m.onnx").exists()


@needs_exporter
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (torch.neg, "torch's own exporter answers otherwise by"),
        (wrong_shape, r"torch's own exporter fails \(RuntimeError: .*--no-cross-check"),
        (forgotten, r"torch's own exporter fails \(KeyError: 'weight'\); .*--no-cross-check"),
    ],
)
def test_a_second_route_that_fails_or_disagrees_stops_the_export(
    break_it: Callable[[Tensor], Tensor], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPECS["dense"]
    second_route_does(monkeypatch, break_it)

    with pytest.raises(ExportError, match=f"not written, {message}") as caught:
        export(spec, *trained(spec), tmp_path / "m.onnx", budget=4, cross_check=True)

    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@needs_exporter
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content[:200], "cannot load it"),
        (lambda content: content.replace(b"max_iter", b"most_itr"), "cannot run it"),
    ],
)
def test_a_second_file_that_does_not_run_stops_the_export(
    spoil: Callable[[bytes], bytes], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = SPECS["dense"]
    honest = cross.second_model
    monkeypatch.setattr(cross, "second_model", lambda *model: spoil(honest(*model)))

    with pytest.raises(ExportError, match=f"not written, the file of torch's own exporter: .*{message}") as caught:
        export(spec, *trained(spec), tmp_path / "m.onnx", budget=4, cross_check=True)

    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unrolled_file_of_very_many_evaluations_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"at most 256 and not 3000; .* recipe onnxruntime"):
        export(SEQUENCE, *trained(SEQUENCE), tmp_path / "m.onnx", budget=3000, recipe="unrolled")

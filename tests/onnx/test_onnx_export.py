"""An exported file answers as torch does, or it is not written."""

import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedeq_edge.consensus.constraint import project
from fedeq_edge.deq.initial import initial
from fedeq_edge.deq.layout import cell_weight, constraints, theta_layout
from fedeq_edge.deq.method import Picard
from fedeq_edge.deq.model import DEQ
from fedeq_edge.deq.spec import ModelSpec, published
from fedeq_edge.errors import ConfigError, ExportError
from fedeq_edge.onnx import graph, recipe, wrap
from fedeq_edge.onnx.export import export
from fedeq_edge.onnx.runtime import Predictor
from fedeq_edge.training.step import Budget

Vector = NDArray[np.float32]

SPECS = {
    "dense": ModelSpec(input_shape=(20,), classes=5, channels=12, shift=(0.5,), scale=(2.0,)),
    "dense unconstrained": ModelSpec(input_shape=(7,), classes=3, channels=9, radius=None),
    "dense spectral": ModelSpec(input_shape=(20,), classes=5, channels=12, norm="spectral"),
    "monotone": ModelSpec(input_shape=(20,), classes=5, cell="monotone", channels=12, radius=0.5, shift=(0.5,)),
    "sequence": ModelSpec(input_shape=(9, 64), classes=6, channels=16, stem_kernel=12, stem_stride=4),
    "sequence, pooled": ModelSpec(input_shape=(2, 21), classes=4, channels=8, pool=4, shift=(1.0, -3.0)),
    "image": ModelSpec(input_shape=(1, 8, 8), classes=10, channels=16, pool=2),
    "image, uneven pool": ModelSpec(input_shape=(3, 7, 11), classes=3, channels=8, pool=2, scale=(1.0, 2.0, 3.0)),
    "image, two-stage stem": ModelSpec(
        input_shape=(1, 28, 28), classes=10, channels=16, groups=4, stem_kernel=5, stem_stride=2, stem_width=8, pool=2
    ),
    "residual relu": ModelSpec(input_shape=(1, 8, 8), classes=10, cell="residual", channels=16, groups=4, pool=2),
    "residual damped": ModelSpec(
        input_shape=(1, 8, 8), classes=10, cell="residual", damping=0.6, channels=16, groups=4, pool=2
    ),
    "residual softplus": ModelSpec(
        input_shape=(4, 16), classes=3, cell="residual", activation="softplus", channels=8, inner_channels=16, groups=4
    ),
    "published": msgspec.structs.replace(published((3, 8, 8), 10, "S"), channels=16, inner_channels=32),
}
IMAGE = SPECS["image"]


def lively(spec: ModelSpec, seed: int = 0) -> tuple[Vector, Vector]:
    """Parameters away from the start: norms with scales and shifts of their own, heads that tell classes apart."""
    theta, head = initial(spec, seed)
    draw = np.random.default_rng(seed)
    for slot in theta_layout(spec):
        if ".norm" in slot.name or slot.name.endswith("bias"):
            slot.view(theta)[:] += 0.1 * draw.standard_normal(slot.shape)
    return theta, 2 * head


def torch_answer(spec: ModelSpec, theta: Vector, head: Vector, x: Vector, K: int, tol: float) -> tuple[Vector, Vector]:
    model = DEQ(spec)
    model.load(theta, head)
    with torch.no_grad():
        output = model(
            torch.from_numpy(x), budget=Budget(forward=K, adjoint=0), tol=tol or None, solver=Picard(check_every=1)
        )
    return output.logits.numpy(), output.evaluations.numpy()


@pytest.mark.parametrize("name", SPECS)
def test_every_kind_of_model_answers_as_torch_does(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    theta, head = lively(spec)

    verification = export(spec, theta, head, tmp_path / "model.onnx", budget=12)

    assert verification.max_abs_diff <= 3e-5  # 1e-4 is allowed; the published block amplifies most
    assert verification.iterations_equal
    assert 1 <= verification.iterations_mean <= 12
    assert verification.samples == 82


@pytest.mark.parametrize("name", ["dense", "monotone", "sequence", "image", "residual relu"])
@pytest.mark.parametrize(("budget", "tol"), [(1, 1e-4), (3, 1e-4), (30, 1e-2), (30, 1e-5), (13, 0.0)])
def test_budget_and_tolerance_given_per_call_are_honoured(name: str, budget: int, tol: float, tmp_path: Path) -> None:
    spec = SPECS[name]
    theta, head = lively(spec)
    export(spec, theta, head, tmp_path / "model.onnx", budget=8)
    x = np.random.default_rng(5).standard_normal((6, *spec.input_shape), dtype=np.float32)

    found = Predictor(tmp_path / "model.onnx").infer(x, budget=budget, tol=tol)

    logits, evaluations = torch_answer(spec, theta, head, x, budget, tol)
    np.testing.assert_allclose(found.logits, logits, atol=1e-5)
    np.testing.assert_array_equal(found.iterations, evaluations)
    assert found.iterations.max() <= budget
    assert ((found.residual <= tol) | (found.iterations == budget)).all()


specs: st.SearchStrategy[dict[str, object]] = st.builds(
    dict,
    input_shape=st.one_of(
        st.tuples(st.integers(1, 9)),
        st.tuples(st.integers(1, 4), st.integers(1, 24)),
        st.tuples(st.integers(1, 3), st.integers(1, 11), st.integers(1, 11)),
    ),
    classes=st.integers(2, 5),
    cell=st.sampled_from(["contractive", "monotone", "residual"]),
    activation=st.sampled_from(["relu", "softplus"]),
    channels=st.sampled_from([4, 8]),
    groups=st.sampled_from([1, 2, 4]),
    radius=st.sampled_from([0.5, 0.9]),
    norm=st.sampled_from(["max", "spectral"]),
    stem_kernel=st.integers(1, 5),
    stem_stride=st.integers(1, 3),
    stem_width=st.sampled_from([None, 8]),
    pool=st.integers(1, 3),
)


@settings(max_examples=40, deadline=None)
@given(values=specs, seed=st.integers(0, 99))
def test_any_model_that_the_specification_allows_becomes_a_valid_graph(values: dict[str, object], seed: int) -> None:
    try:
        spec = msgspec.convert(values, ModelSpec)
    except ConfigError:
        assume(False)
    weights = graph.named_weights(spec, *lively(spec, seed))

    parts = graph.stem(spec, weights), graph.cell(spec, weights), graph.head(spec, weights)
    for written in (wrap.looped(spec, *parts), wrap.unrolled(spec, *parts, evaluations=3)):
        model = wrap.model(written, opset=18, ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        logits = inferred.graph.output[0].type.tensor_type.shape.dim
        assert [logits[0].dim_param, logits[1].dim_value] == ["batch", spec.classes]


def test_equal_arguments_give_equal_bytes_that_name_no_path(tmp_path: Path) -> None:
    theta, head = lively(IMAGE)
    for name, extra in (("a", {"x": "1", "y": "2"}), ("b", {"y": "2", "x": "1"})):
        export(IMAGE, theta, head, tmp_path / f"{name}.onnx", budget=6, metadata=extra)

    content = (tmp_path / "a.onnx").read_bytes()

    assert content == (tmp_path / "b.onnx").read_bytes()
    assert str(tmp_path).encode() not in content
    assert str(Path.cwd()).encode() not in content


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    path, labels = tmp_path / "model.onnx", ["zéro", *"123456789"]
    export(
        IMAGE, *lively(IMAGE), path, budget=6, tol=1e-3, labels=labels, round_number=15, metadata={"device": "pi4-02"}
    )

    predictor = Predictor(path)
    model = onnx.load(path)

    assert (model.ir_version, [(o.domain, o.version) for o in model.opset_import]) == (8, [("", 18)])
    assert model.producer_name == "fedeq-edge"
    assert json.loads(predictor.metadata["fedeq.solver"]) == {"name": "picard", "tol": 1e-3, "max_iter": 6}
    assert (predictor.budget, predictor.tol, predictor.labels) == (6, 1e-3, tuple(labels))
    assert predictor.metadata["fedeq.round"] == "15"
    assert predictor.metadata["device"] == "pi4-02"
    assert float(predictor.metadata["fedeq.gamma"]) == pytest.approx(0.9, abs=1e-3)
    assert json.loads(predictor.metadata["fedeq.certificate"]) == {
        "norm": "max",
        "gamma": pytest.approx(0.9, abs=1e-3),
        "evaluations": 6,
        "bound": pytest.approx(0.9**7, rel=1e-2),
        "unit": "state",
    }
    assert len(predictor.metadata["fedeq.weights_sha256"]) == 64


def test_the_certificate_of_a_monotone_file_holds_for_what_the_file_computes(tmp_path: Path) -> None:
    """Logits of K and of very many evaluations differ by no more than the head can make of the certified error."""
    spec = SPECS["monotone"]
    theta, head = lively(spec)
    cell_weight(spec).view(theta)[:] *= 3.0
    project(theta, constraints(spec))
    export(spec, theta, head, tmp_path / "model.onnx", budget=8)
    predictor = Predictor(tmp_path / "model.onnx")
    certificate = json.loads(predictor.metadata["fedeq.certificate"])
    x = np.random.default_rng(6).standard_normal((16, 20), dtype=np.float32)

    early, late = (predictor.infer(x, budget=K, tol=0.0).logits for K in (8, 2000))

    injection = (x - 0.5) @ theta_layout(spec)[0].view(theta).T + theta_layout(spec)[1].view(theta)
    norms = np.linalg.norm(injection, axis=1)
    steepest = np.linalg.norm(head[: 5 * 12].reshape(5, 12), 2)
    assert certificate["unit"] == "injection"
    assert np.linalg.norm(cell_weight(spec).view(theta), 2) > 1.0
    assert (np.linalg.norm(early - late, axis=1) <= steepest * certificate["bound"] * norms).all()
    assert np.abs(early - late).max() > 1e-4


@pytest.mark.parametrize(("name", "stretch"), [("residual relu", 1), ("image", 2)])
def test_a_cell_that_is_not_well_posed_claims_no_rate(name: str, stretch: int, tmp_path: Path) -> None:
    theta, head = lively(SPECS[name])
    export(SPECS[name], stretch * theta, head, tmp_path / "model.onnx", budget=3)

    assert not {"fedeq.gamma", "fedeq.certificate"} & Predictor(tmp_path / "model.onnx").metadata.keys()


def test_weights_stand_inside_the_loop(tmp_path: Path) -> None:
    export(IMAGE, *lively(IMAGE), tmp_path / "model.onnx", budget=3)

    model = onnx.load(tmp_path / "model.onnx")
    (body,) = [node.attribute[0].g for node in model.graph.node if node.op_type == "Loop"]

    assert "cell.weight" in {constant.name for constant in body.initializer}
    assert "stem.map.weight" in {constant.name for constant in model.graph.initializer}


def test_a_graph_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, path = SPECS["residual relu"], tmp_path / "model.onnx"
    monkeypatch.setattr(graph, "NORM_EPSILON", 1.0)

    with pytest.raises(ExportError, match="not written, logits differ from torch") as caught:
        export(spec, *lively(spec), path, budget=4)

    assert str(path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_loop_that_stops_elsewhere_is_not_written_over_an_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"older")
    monkeypatch.setattr(wrap, "SMALLEST_NORM", 1e4)  # every residual looks tiny

    with pytest.raises(ExportError, match="not written"):
        export(IMAGE, *lively(IMAGE), path, budget=8, tol=1e-3)

    assert path.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_recipe_that_asks_for_an_opset_we_do_not_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = msgspec.structs.replace(recipe.load_recipe(), opset=13)
    monkeypatch.setattr("fedeq_edge.onnx.export.load_recipe", lambda _: older)

    with pytest.raises(ExportError, match="onnx refuses the graph"):
        export(IMAGE, *lively(IMAGE), tmp_path / "model.onnx", budget=4)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda theta, head: (theta[:-1], head), r"theta has shape \(\d+,\), this model needs \(\d+,\)"),
        (lambda theta, head: (theta, np.append(head, head)), "head has shape"),
        (lambda theta, head: (theta * np.float32("nan"), head), "theta holds NaN"),
    ],
)
def test_parameters_that_do_not_fit_are_named(
    break_it: Callable[[Vector, Vector], tuple[Vector, Vector]], message: str, tmp_path: Path
) -> None:
    theta, head = break_it(*lively(IMAGE))

    with pytest.raises(ExportError, match=message):
        export(IMAGE, theta, head, tmp_path / "model.onnx", budget=4)


def test_other_misuse_is_named_too(tmp_path: Path) -> None:
    theta, head = lively(IMAGE)

    with pytest.raises(ExportError, match="2 labels for 10 classes"):
        export(IMAGE, theta, head, tmp_path / "m.onnx", budget=4, labels=["a", "b"])
    with pytest.raises(ExportError, match="budget 0 must be at least 1"):
        export(IMAGE, theta, head, tmp_path / "m.onnx", budget=0)
    with pytest.raises(ExportError, match=r"cannot write .*m\.onnx: the folder .*missing does not exist"):
        export(IMAGE, theta, head, tmp_path / "missing" / "m.onnx", budget=4)
    with pytest.raises(ConfigError, match=r"no recipe 'tpu'; choose from .*int8"):
        recipe.load_recipe("tpu")

"""What applications on a device are told, by the server itself on a real socket."""

import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec.structs import replace

from fedeq_edge.deq.engine import TorchEngine
from fedeq_edge.deq.numeric import NumpyDEQ
from fedeq_edge.deq.wellposed import certificate
from fedeq_edge.onnx.reading import read_training
from fedeq_edge.onnx.training import build_training
from fedeq_edge.serving.address import Address, listen
from fedeq_edge.serving.newest import MOST_SAMPLES, Newest
from fedeq_edge.serving.server import LARGEST_BODY, AnswerHandler, AnswerServer
from fedeq_edge.transport.broker import free_port
from tests.serving.asking import CONVOLUTIONAL, EXAMPLE, FEATURES, JSON, NPY, Application, keep, npy, personal, samples

PATIENCE_S = 60.0


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder with a dense personal model."""
    keep(tmp_path / "state", personal())
    return tmp_path / "state"


def served(address: Address, state: Path) -> Iterator[Application]:
    """An application that asks a server over `state`, until the test ends."""
    with listen(address) as listening:
        server = AnswerServer(listening, Newest(state))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Application(address)
        server.shutdown()
        thread.join()


@pytest.fixture
def application(tmp_path: Path, state: Path) -> Iterator[Application]:
    yield from served(Address(tmp_path / "infer.sock", None), state)


@pytest.fixture
def neighbour(state: Path) -> Iterator[Application]:
    """One that comes over the loopback."""
    yield from served(Address(None, free_port()), state)


def test_an_answer_is_the_models_own_with_what_is_proven_of_it(application: Application) -> None:
    model, x = personal(), samples(5)
    expected = NumpyDEQ(model.spec, model.theta, model.head).infer(x, budget=4, tol=1e-3)
    reply = application.infer(x, "?budget=4&tol=1e-3")
    assert reply.status == 200
    answers = reply.body["answers"]
    np.testing.assert_allclose([answer["logits"] for answer in answers], expected.logits, rtol=1e-5)
    np.testing.assert_allclose([answer["residual"] for answer in answers], expected.residual, rtol=1e-3)
    assert [answer["evaluations"] for answer in answers] == expected.evaluations.tolist()
    assert [answer["label"] for answer in answers] == [str(row.argmax()) for row in expected.logits]
    for answer in answers:
        proven = certificate(model.theta, model.spec, answer["evaluations"])
        assert proven is not None
        assert answer["certificate"]["bound"] == pytest.approx(proven.bound)
    assert reply.body["model"] == {"file": "personal.fedeq", "run": "r", "round": 3, "device": ""}
    assert (reply.body["budget"], reply.body["tol"]) == (4, 1e-3)


def test_json_and_npy_of_any_number_type_get_the_same_answer(application: Application) -> None:
    x = np.round(samples(3), 2).astype(np.float64)
    forms = [application.infer_json(x), application.infer(x), application.infer(x.astype(np.float32))]
    forms.append(application.infer(np.asfortranarray(x)))
    assert all(form.body == forms[0].body for form in forms)


def test_a_single_sample_needs_no_batch_dimension(application: Application) -> None:
    x = samples(1)
    assert application.infer_json(x[0]).body == application.infer_json(x).body


def test_more_budget_is_spent_where_no_tolerance_stops_it(application: Application) -> None:
    for budget in (1, 7, 12):
        answers = application.infer(samples(2), f"?budget={budget}&tol=0").body["answers"]
        assert [answer["evaluations"] for answer in answers] == [budget, budget]


def test_a_sample_with_nan_spoils_its_own_answer_alone(application: Application) -> None:
    x = samples(3)
    clean = application.infer(x).body["answers"]
    x[1, 0] = np.nan
    answers = application.infer(x).body["answers"]
    assert (answers[1]["label"], answers[1]["residual"], answers[1]["certificate"]) == (None, None, None)
    assert (answers[0], answers[2]) == (clean[0], clean[2])


def test_a_new_personal_model_answers_from_the_next_request_on(application: Application, state: Path) -> None:
    before = application.infer(samples(1)).body
    keep(state, personal(seed=1, round_number=4))
    after = application.infer(samples(1)).body
    assert (before["model"]["round"], after["model"]["round"]) == (3, 4)
    assert before["answers"] != after["answers"]


def test_an_exported_model_that_is_newer_answers_in_place_of_the_personal_one(
    application: Application, state: Path
) -> None:
    shutil.copy(EXAMPLE / "model.onnx", state / "personal.onnx")
    assert application.health().body["model"]["file"] == "personal.onnx"
    reply = application.infer(np.load(EXAMPLE / "samples.npy"))
    assert [answer["label"] for answer in reply.body["answers"]] == [str(digit) for digit in range(10)]
    np.testing.assert_allclose(
        [answer["logits"] for answer in reply.body["answers"]], np.load(EXAMPLE / "logits.npy"), atol=1e-5
    )
    keep(state, personal(round_number=9))
    assert application.health().body["model"]["round"] == 9


def test_an_exported_models_certificate_holds_for_every_count(application: Application, state: Path) -> None:
    shutil.copy(EXAMPLE / "model.onnx", state / "personal.onnx")
    x = np.load(EXAMPLE / "samples.npy")
    bounds = [
        application.infer(x[:1], f"?budget={K}&tol=0").body["answers"][0]["certificate"]["bound"]
        for K in (1, 5, 30, 40)
    ]
    gamma = 0.95
    assert bounds[0] >= gamma**2 * (1 - 1e-6)
    assert bounds[1] == pytest.approx(bounds[0] * gamma**4, rel=1e-5)
    assert bounds[2] == bounds[3] >= gamma**31 * (1 - 1e-6)


def test_a_damaged_model_leaves_the_older_one_answering(application: Application, state: Path) -> None:
    shutil.copy(EXAMPLE / "model.onnx", state / "personal.onnx")
    (state / "personal.fedeq").write_bytes(b"half a file")
    assert application.health().body["model"]["file"] == "personal.onnx"


@pytest.mark.parametrize("key", ["fedeq.round", "fedeq.weights_sha256"])
def test_an_exported_model_without_its_facts_leaves_the_older_one_answering(
    key: str, application: Application, state: Path
) -> None:
    model = onnx.load(EXAMPLE / "model.onnx")
    facts = {entry.key: entry.value for entry in model.metadata_props if entry.key != key}
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, state / "personal.onnx")
    assert application.health().body["model"]["file"] == "personal.fedeq"


def test_a_convolutional_model_says_how_to_make_it_answer(application: Application, state: Path) -> None:
    keep(state, personal(CONVOLUTIONAL))
    reply = application.health()
    assert reply.status == 503
    assert "fedeq model export" in reply.error


def test_a_convolutional_model_is_answered_by_the_solver_that_it_brings(application: Application, state: Path) -> None:
    model, x = personal(CONVOLUTIONAL), samples(5).reshape(5, 1, 4, 4)
    keep(state, replace(model, solver=read_training(build_training(CONVOLUTIONAL), "graph").solver))
    expected = TorchEngine(model.spec, model.theta, model.head).infer(x, budget=4)
    reply = application.infer(x, "?budget=4")
    assert reply.status == 200
    answers = reply.body["answers"]
    np.testing.assert_allclose([answer["logits"] for answer in answers], expected.logits, atol=1e-5)
    assert [answer["evaluations"] for answer in answers] == [4] * 5
    assert application.infer(x, "?tol=1e-3").status == 400


def test_a_model_that_its_solver_does_not_fit_is_named(application: Application, state: Path) -> None:
    model = personal(CONVOLUTIONAL)
    solver = read_training(build_training(CONVOLUTIONAL), "graph").solver
    keep(state, replace(model, theta=model.theta[1:], solver=solver))
    reply = application.health()
    assert reply.status == 503
    assert "of another model than its solver" in reply.error


def test_without_a_model_every_question_is_answered_with_why(application: Application, state: Path) -> None:
    (state / "personal.fedeq").unlink()
    for reply in (application.health(), application.infer(samples(1))):
        assert reply.status == 503
        assert "no personal model" in reply.error
    keep(state, personal())
    assert application.health().status == 200


def claiming(shape: str, *, descr: str = "<f4") -> bytes:
    """An .npy file of eight bytes whose header claims something else."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(8)


BAD: dict[str, tuple[str, str, dict[str, str], bytes, int]] = {
    "another path": ("GET", "/", {}, b"", 404),
    "a path that climbs": ("GET", "/../personal.fedeq", {}, b"", 404),
    "GET where POST belongs": ("GET", "/v1/infer", {}, b"", 405),
    "POST where GET belongs": ("POST", "/v1/health", JSON, b"[]", 405),
    "an unknown method": ("DELETE", "/v1/infer", {}, b"", 405),
    "no content type": ("POST", "/v1/infer", {}, b"[1]", 415),
    "a form": ("POST", "/v1/infer", {"Content-Type": "application/x-www-form-urlencoded"}, b"[1]", 415),
    "a length in words": ("POST", "/v1/infer", {**JSON, "Content-Length": "ten"}, b"", 411),
    "chunks": ("POST", "/v1/infer", {**JSON, "Transfer-Encoding": "chunked"}, b"0\r\n\r\n", 411),
    "too large a body": ("POST", "/v1/infer", {**JSON, "Content-Length": str(LARGEST_BODY + 1)}, b"", 413),
    "an absurd length": ("POST", "/v1/infer", {**JSON, "Content-Length": "9" * 400}, b"", 413),
    "no JSON": ("POST", "/v1/infer", JSON, b"[[1, 2", 400),
    "an empty body": ("POST", "/v1/infer", JSON, b"", 400),
    "words": ("POST", "/v1/infer", JSON, b'["1", "2"]', 400),
    "an object": ("POST", "/v1/infer", JSON, b'{"x": 1}', 400),
    "gaps": ("POST", "/v1/infer", JSON, b"[[1, null]]", 400),
    "lists of unequal lengths": ("POST", "/v1/infer", JSON, b"[[1, 2], [3]]", 400),
    "deep lists": ("POST", "/v1/infer", JSON, b"[" * 100_000, 400),
    "a number beyond float64": ("POST", "/v1/infer", JSON, b"[" + b"9" * 400 + b"]", 400),
    "no samples": ("POST", "/v1/infer", NPY, npy(np.zeros((0, FEATURES))), 400),
    "another shape": ("POST", "/v1/infer", JSON, b"[[1, 2, 3]]", 400),
    "no .npy": ("POST", "/v1/infer", NPY, b"PK\x03\x04", 400),
    "objects": ("POST", "/v1/infer", NPY, npy(np.array([{}], dtype=object)), 400),
    "half an .npy": ("POST", "/v1/infer", NPY, npy(np.zeros((2, FEATURES)))[:-8], 400),
    "an .npy of terabytes": ("POST", "/v1/infer", NPY, claiming("(1000000000000, 16)"), 400),
    "an .npy of negative size": ("POST", "/v1/infer", NPY, claiming("(-2, -1)"), 400),
    "an .npy of nothing": ("POST", "/v1/infer", NPY, claiming("(8,)", descr="|V0"), 400),
    "an .npy of complex numbers": ("POST", "/v1/infer", NPY, claiming("(1,)", descr="<c8"), 400),
    "an .npy of a later version": ("POST", "/v1/infer", NPY, b"\x93NUMPY\x09\x00" + bytes(64), 400),
    "too many samples": ("POST", "/v1/infer", NPY, npy(np.zeros((MOST_SAMPLES + 1, FEATURES), np.float32)), 400),
    "no budget": ("POST", "/v1/infer?budget=0", JSON, b"[1]", 400),
    "a budget in words": ("POST", "/v1/infer?budget=all", JSON, b"[1]", 400),
    "a budget without end": ("POST", "/v1/infer?budget=1000000000", JSON, b"[1]", 400),
    "a negative tolerance": ("POST", "/v1/infer?tol=-1", JSON, b"[1]", 400),
    "no tolerance at all": ("POST", "/v1/infer?tol=nan", JSON, b"[1]", 400),
    "an unknown option": ("POST", "/v1/infer?budgt=1", JSON, b"[1]", 400),
    "a hundred options": ("POST", "/v1/infer?" + "&".join(["tol=1"] * 100), JSON, b"[1]", 400),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_gets_4xx_and_one_line(case: str, application: Application) -> None:
    method, target, headers, body, status = BAD[case]
    reply = application.send(method, target, body, headers)
    assert reply.status == status
    assert reply.error.strip()
    assert "\n" not in reply.error
    assert application.health().status == 200


def test_a_caller_reads_its_refusal_while_it_still_sends(application: Application) -> None:
    large = bytes(3 * LARGEST_BODY)
    assert application.send("POST", "/v1/infer", large, NPY).status == 413


def test_a_body_that_stops_is_given_up(application: Application, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AnswerHandler, "timeout", 0.2)
    assert application.send("POST", "/v1/infer", b"[1", {**JSON, "Content-Length": "100"}).status == 408


def test_one_connection_serves_many_questions(application: Application) -> None:
    connection = application.connect()
    for _ in range(3):
        connection.request("POST", "/v1/infer", json.dumps([0.0] * FEATURES), JSON)
        response = connection.getresponse()
        assert (response.status, len(json.loads(response.read())["answers"])) == (200, 1)
    connection.close()


def test_more_applications_than_places_are_all_answered(application: Application) -> None:
    inputs = [samples(4, seed) for seed in range(24)]
    with ThreadPoolExecutor(len(inputs)) as pool:
        together = list(pool.map(application.infer, inputs))
    assert [reply.body for reply in together] == [application.infer(x).body for x in inputs]


def test_a_page_that_came_by_a_name_of_its_own_is_refused(neighbour: Application) -> None:
    assert neighbour.health().status == 200
    assert neighbour.send("GET", "/v1/health", headers={"Host": "evil.example:80"}).status == 403
    assert neighbour.send("GET", "/v1/health", headers={"Host": "localhost:80"}).status == 200
    # What a browser sends before a request that is not simple, and nothing allows it.
    assert neighbour.send("OPTIONS", "/v1/infer", headers={"Origin": "http://evil.example"}).status == 405


def test_what_is_no_http_at_all_harms_nobody(neighbour: Application) -> None:
    for junk in (b"\x00\xff" * 500, b"GET\r\n\r\n", b"POST /v1/infer HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n"):
        with socket.create_connection(("127.0.0.1", neighbour.address.port or 0), PATIENCE_S) as caller:
            caller.sendall(junk)
            caller.shutdown(socket.SHUT_WR)
            while caller.recv(2**16):
                pass
    assert neighbour.health().status == 200


def test_a_server_that_nobody_asks_rests(state: Path, tmp_path: Path) -> None:
    address = Address(tmp_path / "infer.sock", None)
    with listen(address) as listening:
        server = AnswerServer(listening, Newest(state))
        thread = threading.Thread(target=server.serve_until_idle, args=(0.05,))
        thread.start()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def test_models_of_the_same_instant_are_told_apart(state: Path) -> None:
    newest = Newest(state)
    first = newest.model()
    assert newest.model() is first
    moment = (state / "personal.fedeq").stat().st_mtime_ns
    keep(state, personal(seed=1))
    os.utime(state / "personal.fedeq", ns=(moment, moment))
    assert newest.model() is not first


def test_a_model_that_an_update_has_brought_answers_and_a_training_graph_does_not(state: Path, tmp_path: Path) -> None:
    (brought := tmp_path / "models").mkdir()
    newest = Newest(state, [brought, tmp_path / "nowhere"])
    own = newest.model()
    shutil.copy(EXAMPLE / "model.onnx", brought / "digits.onnx")
    assert newest.model().facts["file"] == "digits.onnx"
    (brought / "digits.onnx").write_bytes(build_training(CONVOLUTIONAL))
    assert newest.model().facts == own.facts


def test_a_large_batch_is_answered_whole(application: Application) -> None:
    assert len(application.infer(samples(MOST_SAMPLES)).body["answers"]) == MOST_SAMPLES

"""The service on a loopback socket with real TLS: who is let in, who is not, and what each is told."""

import contextlib
import http.client
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509

from fedeq_edge.errors import Exit, ProvisionError
from fedeq_edge.provision import enrol as board
from fedeq_edge.provision import service as service_module
from fedeq_edge.provision.actions import ActionState, Report
from fedeq_edge.provision.ca import DEVICE_LIFETIME, Authority, common_name, issued_at
from fedeq_edge.provision.desk import ENROL, RENEW, REPORT, Desk
from fedeq_edge.provision.fleet import Fleet, FleetSettings
from fedeq_edge.provision.founding import new_gateway
from fedeq_edge.provision.service import Service
from fedeq_edge.provision.tokens import Token
from tests.conftest import until

NOW = 1_800_000_000.0
DAY_S = 86_400.0
OWN, OTHER = "pi-01", "pi-02"
SETTINGS = FleetSettings(name="plant", broker="mqtts://g", service="https://g", federation="plant")
REPORTED = Report(version="1.0+aa", confirmed=True, healthy=True)


@dataclass(slots=True)
class Time:
    """The clock of the host."""

    now: float = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def host_time() -> Time:
    return Time()


@pytest.fixture(scope="module")
def founded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fleet with two devices."""
    folder = tmp_path_factory.mktemp("founded") / "fleet"
    fleet = Fleet.init(folder, SETTINGS, ["127.0.0.1"], clock=lambda: NOW)
    fleet.add(OWN, "raspberry-pi-4")
    fleet.add(OTHER, "raspberry-pi-4")
    return folder


@pytest.fixture
def fleet(founded: Path, tmp_path: Path, host_time: Time) -> Fleet:
    return Fleet.open(shutil.copytree(founded, tmp_path / "fleet"), host_time)


@pytest.fixture
def service(fleet: Fleet, host_time: Time) -> Iterator[Service]:
    desk = Desk(fleet, Authority.open(fleet.folder / "ca", clock=host_time), host_time)
    with serving(Service(desk, fleet.folder / "gateway", ("127.0.0.1", 0))) as running:
        yield running


@contextlib.contextmanager
def serving(service: Service) -> Iterator[Service]:
    with service:
        thread = threading.Thread(target=service.serve_forever, args=(0.01,))
        thread.start()
        yield service
        service.shutdown()
        thread.join()


@pytest.fixture
def url(service: Service) -> str:
    return f"https://127.0.0.1:{service.port}"


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    """Where the board keeps its identity."""
    return tmp_path / "etc"


@pytest.fixture
def enrolled(fleet: Fleet, url: str, etc: Path) -> Path:
    board.enrol(url, str(fleet.issue_token(OWN)), etc, OWN)
    return etc


def ask(
    url: str, path: str, body: bytes | None = None, *, identity: Path | None = None, ca: Path, name: str = "device"
) -> tuple[int, Any]:
    """Status and JSON (or bytes) of one request, with a certificate or without."""
    context = ssl.create_default_context(cafile=ca)
    if identity is not None:
        context.load_cert_chain(identity / f"{name}.crt", identity / f"{name}.key")
    link = http.client.HTTPSConnection(url.removeprefix("https://"), timeout=30, context=context)
    with contextlib.closing(link):
        link.request("GET" if body is None else "POST", path, body)
        answer = link.getresponse()
        content = answer.read()
    return answer.status, json.loads(content) if content.startswith(b"{") else content


def report(url: str, folder: Path, said: Report = REPORTED) -> tuple[int, Any]:
    return ask(url, REPORT, msgspec.json.encode(said), identity=folder, ca=folder / "ca.crt")


def refusal(url: str, token: str, folder: Path, device: str = OWN) -> ProvisionError:
    with pytest.raises(ProvisionError) as refused:
        board.enrol(url, token, folder, device)
    assert "\n" not in str(refused.value)
    return refused.value


def certificate(folder: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / "device.crt").read_bytes())


def test_a_board_makes_its_own_key_and_gets_a_certificate_for_a_token(enrolled: Path, fleet: Fleet) -> None:
    assert (enrolled / "device.key").stat().st_mode & 0o777 == 0o600
    assert common_name(certificate(enrolled)) == OWN
    assert (enrolled / "ca.crt").read_bytes() == (fleet.folder / "ca" / "ca.crt").read_bytes()
    private = (enrolled / "device.key").read_bytes()
    assert not [path for path in fleet.folder.rglob("*") if path.is_file() and private in path.read_bytes()]


def test_the_host_keeps_no_secret_of_a_token(fleet: Fleet) -> None:
    token = fleet.issue_token(OWN)
    stored = fleet.folder / "tokens.json"
    assert token.secret not in stored.read_text()
    assert stored.stat().st_mode & 0o777 == 0o600
    assert token.secret not in repr(token)


def test_a_token_that_has_expired_is_refused(fleet: Fleet, url: str, etc: Path, host_time: Time) -> None:
    token = fleet.issue_token(OWN, lifetime_s=3600)
    host_time.now += 3600
    refused = refusal(url, str(token), etc)
    assert refused.exit == Exit.TOKEN_EXPIRED
    assert f"fedeq fleet token {OWN}" in str(refused)
    assert not (etc / "device.crt").exists()


def test_a_token_serves_one_board(fleet: Fleet, url: str, etc: Path, tmp_path: Path) -> None:
    token = str(fleet.issue_token(OWN))
    board.enrol(url, token, etc, OWN)
    assert refusal(url, token, tmp_path / "thief").exit == Exit.TOKEN_USED


def test_of_many_boards_with_one_token_at_once_one_is_let_in(fleet: Fleet, url: str, tmp_path: Path) -> None:
    token = str(fleet.issue_token(OWN))
    ended: list[int] = []

    def enrol(number: int) -> None:
        try:
            board.enrol(url, token, tmp_path / str(number), OWN)
            ended.append(Exit.OK)
        except ProvisionError as error:
            ended.append(error.exit)

    threads = [threading.Thread(target=enrol, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ended) == [Exit.OK, *[Exit.TOKEN_USED] * 5]


def test_a_board_whose_answer_was_lost_may_ask_again(fleet: Fleet, url: str, etc: Path) -> None:
    token = str(fleet.issue_token(OWN))
    board.enrol(url, token, etc, OWN)
    (etc / "device.crt").unlink()
    board.enrol(url, token, etc, OWN)
    assert common_name(certificate(etc)) == OWN


def test_a_token_of_another_device_is_refused_on_the_board_and_on_the_host(fleet: Fleet, url: str, etc: Path) -> None:
    token = fleet.issue_token(OTHER)
    assert refusal(url, str(token), etc).exit == Exit.VERIFICATION
    renamed = Token(device=OWN, secret=token.secret, pin=token.pin)
    refused = refusal(url, str(renamed), etc)
    assert refused.exit == Exit.VERIFICATION
    assert f"for device {OTHER}, not {OWN}" in str(refused)
    board.enrol(url, str(token), etc, OTHER)  # it was not used up by those who may not


def test_a_newer_token_makes_an_older_one_void(fleet: Fleet, url: str, etc: Path) -> None:
    old, new = str(fleet.issue_token(OWN)), str(fleet.issue_token(OWN))
    assert refusal(url, old, etc).exit == Exit.VERIFICATION
    board.enrol(url, new, etc, OWN)


def test_what_is_no_token_is_not_repeated(url: str, etc: Path) -> None:
    refused = refusal(url, "fedeq1.pi-01.secret", etc)
    assert refused.exit == Exit.MISUSED
    assert "secret" not in str(refused)


def test_a_gateway_of_another_fleet_learns_nothing(fleet: Fleet, url: str, etc: Path) -> None:
    token = fleet.issue_token(OWN)
    foreign = Token(device=OWN, secret=token.secret, pin="0" * 32)
    refused = refusal(url, str(foreign), etc)
    assert refused.exit == Exit.VERIFICATION
    assert "nothing was sent" in str(refused)
    assert fleet.tokens.waiting(OWN, now=NOW) is not None
    assert not (etc / "ca.crt").exists()


def test_a_gateway_under_another_name_is_refused_with_the_command_that_names_it(
    fleet: Fleet, service: Service, etc: Path
) -> None:
    refused = refusal(f"https://localhost:{service.port}", str(fleet.issue_token(OWN)), etc)
    assert refused.exit == Exit.VERIFICATION
    assert "fedeq fleet gateway --host localhost" in str(refused)


def test_nobody_at_the_address_is_said_so(fleet: Fleet, etc: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert refusal(f"https://127.0.0.1:{port}", str(fleet.issue_token(OWN)), etc).exit == Exit.LOST
    assert refusal("http://127.0.0.1", str(fleet.issue_token(OWN)), etc).exit == Exit.MISUSED


def test_a_new_gateway_certificate_changes_no_device(fleet: Fleet, enrolled: Path, host_time: Time) -> None:
    authority = (fleet.folder / "ca" / "ca.key").read_bytes()
    new_gateway(fleet.folder, ["127.0.0.1", "localhost"], clock=host_time)
    assert (fleet.folder / "ca" / "ca.key").read_bytes() == authority
    desk = Desk(fleet, Authority.open(fleet.folder / "ca", clock=host_time), host_time)
    with serving(Service(desk, fleet.folder / "gateway", ("127.0.0.1", 0))) as second:
        assert report(f"https://localhost:{second.port}", enrolled)[0] == 200


def test_a_revoked_device_is_refused_at_once_and_told_why(fleet: Fleet, enrolled: Path, url: str) -> None:
    assert report(url, enrolled)[0] == 200
    fleet.revoke(OWN)
    said = (403, {"exit": Exit.VERIFICATION, "error": f"the certificate of device {OWN} was revoked"})
    assert report(url, enrolled) == said
    csr = board.csr(enrolled, OWN)
    assert ask(url, RENEW, csr, identity=enrolled, ca=enrolled / "ca.crt") == said
    assert ask(url, "/tuf/metadata/root.json", identity=enrolled, ca=enrolled / "ca.crt") == said


def test_revoking_voids_the_token_of_the_device_and_of_no_other(fleet: Fleet, url: str, etc: Path) -> None:
    own, other = fleet.issue_token(OWN), fleet.issue_token(OTHER)
    assert fleet.revoke(OWN).tokens == 1
    assert refusal(url, str(own), etc).exit == Exit.VERIFICATION
    board.enrol(url, str(other), etc, OTHER)


def test_a_board_that_enrols_while_it_is_revoked_is_refused_or_revoked(fleet: Fleet, url: str, tmp_path: Path) -> None:
    for turn in range(5):
        if turn:
            fleet.add(OWN, "raspberry-pi-4")
        token, etc = str(fleet.issue_token(OWN)), tmp_path / str(turn)
        revoking = threading.Thread(target=fleet.revoke, args=(OWN,))
        revoking.start()
        with contextlib.suppress(ProvisionError):  # the token was void already
            board.enrol(url, token, etc, OWN)
        revoking.join()
        assert not (etc / "device.crt").exists() or report(url, etc)[0] == 403


def test_a_revoked_device_gets_a_token_once_it_is_added_again(fleet: Fleet, enrolled: Path, url: str) -> None:
    fleet.revoke(OWN)
    with pytest.raises(ProvisionError, match=f"was revoked on .*fedeq fleet add {OWN} --profile raspberry-pi-4"):
        fleet.issue_token(OWN)
    fleet.add(OWN, "raspberry-pi-4")
    board.enrol(url, str(fleet.issue_token(OWN)), enrolled, OWN)
    assert report(url, enrolled)[0] == 200


def shown(service: Service, ca: Path) -> int:
    """Serial of the certificate that the service shows now."""
    context = ssl.create_default_context(cafile=ca)
    with (
        socket.create_connection(("127.0.0.1", service.port), 30) as link,
        context.wrap_socket(link, server_hostname="127.0.0.1") as tls,
    ):
        return x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"").serial_number


def test_a_new_certificate_of_the_gateway_is_shown_without_a_restart(
    fleet: Fleet, service: Service, host_time: Time
) -> None:
    ca, before = fleet.folder / "ca/ca.crt", shown(service, fleet.folder / "ca/ca.crt")
    new_gateway(fleet.folder, ["127.0.0.1", "gateway.local"], clock=host_time)
    until(lambda: shown(service, ca) != before, "the new certificate is shown")
    new = x509.load_pem_x509_certificate((fleet.folder / "gateway/server.crt").read_bytes())
    assert shown(service, ca) == new.serial_number


def test_a_new_certificate_that_cannot_be_used_leaves_the_one_before_it(fleet: Fleet, service: Service) -> None:
    ca, before = fleet.folder / "ca/ca.crt", shown(service, fleet.folder / "ca/ca.crt")
    asked: list[Path] = []
    load = service_module._context

    def told(gateway: Path) -> ssl.SSLContext:
        asked.append(gateway)
        return load(gateway)

    service_module._context = told
    try:
        (fleet.folder / "gateway/server.crt").write_text("half a certif")
        until(lambda: bool(asked), "the service looks at it")
    finally:
        service_module._context = load
    assert shown(service, ca) == before


def test_a_damaged_list_of_revocations_lets_nobody_in(fleet: Fleet, enrolled: Path, url: str) -> None:
    (fleet.folder / "ca" / "revoked.json").write_text("{")
    status, said = report(url, enrolled)
    assert status == 500
    assert "revoked.json is damaged" in said["error"]


def test_a_server_certificate_is_no_client(fleet: Fleet, url: str) -> None:
    gateway = fleet.folder / "gateway"
    body = msgspec.json.encode(REPORTED)
    with pytest.raises(ssl.SSLError, match=r"(?i)unsupported.certificate"):
        ask(url, REPORT, body, identity=gateway, ca=gateway / "ca.crt", name="server")


def test_a_certificate_of_another_authority_is_no_client(fleet: Fleet, url: str, etc: Path, tmp_path: Path) -> None:
    foreign = Authority.create(tmp_path / "foreign", "plant")
    request = board.csr(etc, OWN)
    (etc / "device.crt").write_bytes(foreign.device_certificate(request, OWN))
    with pytest.raises(ssl.SSLError, match=r"(?i)unknown.ca"):
        ask(url, REPORT, b"{}", identity=etc, ca=fleet.folder / "ca" / "ca.crt")


def test_a_client_of_the_fleet_that_is_no_device_reports_nothing(fleet: Fleet, url: str) -> None:
    gateway = fleet.folder / "gateway"
    body = msgspec.json.encode(REPORTED)
    status, said = ask(url, REPORT, body, identity=gateway, ca=gateway / "ca.crt", name="aggregator")
    assert status == 403
    assert "'aggregator' is no device of this fleet" in said["error"]


def test_a_device_that_was_taken_out_of_fleet_toml_is_no_device(fleet: Fleet, enrolled: Path, url: str) -> None:
    token = str(fleet.issue_token(OTHER))
    path = fleet.folder / "fleet.toml"
    path.write_text(path.read_text().partition("[devices.")[0])
    assert report(url, enrolled)[0] == 403
    assert "'pi-02' is no device of this fleet" in str(refusal(url, token, enrolled.parent / "other", OTHER))


def test_reports_and_renewals_need_a_certificate(fleet: Fleet, url: str) -> None:
    for path in (REPORT, RENEW):
        assert ask(url, path, b"{}", ca=fleet.folder / "ca" / "ca.crt")[0] == 401


def test_a_certificate_is_renewed_at_half_its_life_and_not_before(enrolled: Path, url: str, host_time: Time) -> None:
    old, half_s = certificate(enrolled), DEVICE_LIFETIME.total_seconds() / 2
    key = (enrolled / "device.key").read_bytes()
    assert not board.renew_if_due(url, enrolled, lambda: NOW + half_s - 1)
    host_time.now = NOW + half_s
    assert board.renew_if_due(url, enrolled, host_time)
    assert issued_at(certificate(enrolled)) - issued_at(old) == DEVICE_LIFETIME / 2
    assert (enrolled / "device.key").read_bytes() == key
    assert report(url, enrolled)[0] == 200


def test_a_board_that_slept_through_its_end_renews_and_does_nothing_else_before(
    enrolled: Path, url: str, host_time: Time
) -> None:
    host_time.now = NOW + 3 * 365 * DAY_S
    status, said = report(url, enrolled)
    assert status == 403
    assert "has expired; renew it first" in said["error"]
    assert board.renew_if_due(url, enrolled, host_time)
    assert report(url, enrolled)[0] == 200


def test_a_renewal_that_fails_leaves_the_certificate(enrolled: Path, url: str, fleet: Fleet, host_time: Time) -> None:
    old = (enrolled / "device.crt").read_bytes()
    fleet.revoke(OWN)
    host_time.now = NOW + 200 * DAY_S
    with pytest.raises(ProvisionError, match="was revoked"):
        board.renew_if_due(url, enrolled, host_time)
    assert (enrolled / "device.crt").read_bytes() == old


def test_a_board_in_1970_takes_the_time_of_the_service(enrolled: Path, url: str, host_time: Time) -> None:
    """The service says the real time in its answers; by that, the certificate of 2027 is not half used."""
    old = (enrolled / "device.crt").read_bytes()
    assert not board.renew_if_due(url, enrolled, lambda: 5.0)
    assert (enrolled / "device.crt").read_bytes() == old


def test_a_board_in_1970_renews_by_the_time_of_the_service(tmp_path: Path, etc: Path) -> None:
    with old_fleet(tmp_path, age_s=200 * DAY_S) as (fleet, url):
        board.enrol(url, str(fleet.issue_token(OWN)), etc, OWN)
        assert board.renew_if_due(url, etc, lambda: 5.0)


def test_a_board_whose_clock_is_past_the_gateways_certificate_is_told_to_set_it(tmp_path: Path, etc: Path) -> None:
    """What a clock that runs ahead sees; here the certificate is old instead."""
    with old_fleet(tmp_path, age_s=11 * 365 * DAY_S) as (fleet, url):
        refused = refusal(url, str(fleet.issue_token(OWN)), etc)
    assert refused.exit == Exit.CLOCK
    assert "timedatectl set-ntp true" in str(refused)


@contextlib.contextmanager
def old_fleet(folder: Path, age_s: float) -> Iterator[tuple[Fleet, str]]:
    """A fleet that was made so long ago and still has the clock of that day, and the address of its service."""
    then = time.time() - age_s
    fleet = Fleet.init(folder / "old", SETTINGS, ["127.0.0.1"], clock=lambda: then)
    fleet.add(OWN, "raspberry-pi-4")
    desk = Desk(fleet, Authority.open(fleet.folder / "ca", clock=lambda: then), lambda: then)
    with serving(Service(desk, fleet.folder / "gateway", ("127.0.0.1", 0))) as service:
        yield fleet, f"https://127.0.0.1:{service.port}"


def test_certificates_are_valid_for_a_board_whose_clock_stands_in_1970(fleet: Fleet, enrolled: Path) -> None:
    """OpenSSL asked to judge by that clock: what a board verifies (CA, gateway) and what it shows."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed: apt-get install openssl")
    gateway = fleet.folder / "gateway"
    checks = (("sslserver", gateway / "server.crt"), ("sslclient", enrolled / "device.crt"))
    for purpose, path in checks:
        arguments = f"verify -attime 5 -x509_strict -purpose {purpose} -CAfile {gateway}/ca.crt {path}"
        assert subprocess.run([openssl, *arguments.split()], check=False).returncode == 0


def test_a_report_is_kept_and_answered_with_what_is_due(fleet: Fleet, enrolled: Path, url: str) -> None:
    action = fleet.give_action(OWN, "update", "1.1+bb", 600)
    assert report(url, enrolled) == (200, {"action": msgspec.to_builtins(action), "service": SETTINGS.service})
    heard = fleet.heard(OWN)
    assert heard is not None
    assert (heard.report, heard.at) == (REPORTED, NOW)
    done = msgspec.structs.replace(REPORTED, action=ActionState(id=action.id, state="done"))
    assert report(url, enrolled, done) == (200, {"action": None, "service": SETTINGS.service})


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\xff\xfe", id="no JSON"),
        pytest.param(b"[]", id="no object"),
        pytest.param(b'{"version": 1, "confirmed": true, "healthy": true}', id="wrong type"),
        pytest.param(json.dumps({"version": "v" * 300, "confirmed": True, "healthy": True}).encode(), id="too long"),
        pytest.param(b"[" * 60_000, id="nested"),
        pytest.param(b'{"more":' + b"[" * 60_000 + b"]" * 60_000 + b"}", id="nested where nobody looks"),
    ],
)
def test_a_report_that_is_none_changes_nothing(body: bytes, fleet: Fleet, enrolled: Path, url: str) -> None:
    status, said = ask(url, REPORT, body, identity=enrolled, ca=enrolled / "ca.crt")
    assert (status, said["exit"]) == (400, Exit.MISUSED)
    assert fleet.heard(OWN) is None


@pytest.mark.parametrize("length", ["262145", "-1", "x"])
def test_a_body_of_a_length_that_is_none_is_not_read(length: str, fleet: Fleet, service: Service) -> None:
    context = ssl.create_default_context(cafile=fleet.folder / "ca" / "ca.crt")
    with (
        socket.create_connection(("127.0.0.1", service.port), 30) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as link,
    ):
        link.sendall(f"POST /v1/report HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode())
        assert link.recv(64).startswith(b"HTTP/1.0 413")


def test_files_of_the_repository_are_served_to_devices_and_no_others(fleet: Fleet, enrolled: Path, url: str) -> None:
    inside = fleet.folder / "tuf" / "targets" / "sub"
    inside.mkdir(parents=True)
    (inside / "model.onnx").write_bytes(b"x" * 200_000)
    (inside / "link").symlink_to(fleet.folder / "ca" / "ca.key")
    ca = fleet.folder / "ca" / "ca.crt"
    assert ask(url, "/tuf/targets/sub/model.onnx", identity=enrolled, ca=ca) == (200, b"x" * 200_000)
    outside = ("keys/root", "targets/../keys/root", "targets/%2e%2e/keys/root", "targets/sub/link", "targets/sub", "")
    strange = ("targets/%00", "targets/" + "x" * 5000, "targets//", "targets/%ff", "[")
    assert {ask(url, f"/tuf/{path}", identity=enrolled, ca=ca)[0] for path in (*outside, *strange)} == {404}
    assert ask(url, "/elsewhere", ca=ca)[0] == 404
    assert ask(url, "/elsewhere", b"", ca=ca)[0] == 404
    status, told = ask(url, "/tuf/targets/sub/model.onnx", ca=ca)
    assert (status, told["exit"]) == (401, Exit.VERIFICATION)


def test_asking_for_the_root_after_the_newest_is_how_tuf_works_and_warns_nobody(
    fleet: Fleet, enrolled: Path, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    ca = fleet.folder / "ca" / "ca.crt"
    for path in ("/tuf/metadata/2.root.json", "/tuf/metadata/2.targets.json"):
        assert ask(url, path, identity=enrolled, ca=ca)[0] == 404
    warned = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [record.__dict__["path"] for record in warned] == ["'/tuf/metadata/2.targets.json'"]


def test_a_client_that_says_nothing_stops_nobody(fleet: Fleet, enrolled: Path, service: Service, url: str) -> None:
    with socket.create_connection(("127.0.0.1", service.port)):
        assert report(url, enrolled)[0] == 200


def test_a_client_that_dribbles_is_cut(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "_REQUEST_S", 0.0)
    with socket.create_connection(("127.0.0.1", service.port), 30) as plain:
        plain.sendall(b"\x16\x03\x01")  # a handshake begins, and no more comes
        assert plain.recv(1) == b""


def test_more_clients_than_there_is_room_for_are_sent_away_until_one_leaves(
    enrolled: Path, fleet: Fleet, host_time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "_CONNECTIONS", 1)
    desk = Desk(fleet, Authority.open(fleet.folder / "ca", clock=host_time), host_time)
    with serving(Service(desk, fleet.folder / "gateway", ("127.0.0.1", 0))) as full:
        with socket.create_connection(("127.0.0.1", full.port)) as first:
            first.sendall(b"\x16\x03\x01")
            with socket.create_connection(("127.0.0.1", full.port), 30) as second:
                assert second.recv(1) == b""
        until(lambda: answers(f"https://127.0.0.1:{full.port}", enrolled), "the place of the first is free")


def answers(url: str, folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return report(url, folder)[0] == 200
    return False


def test_a_request_with_another_name_than_the_tokens_is_refused(fleet: Fleet, url: str, etc: Path) -> None:
    ca = fleet.folder / "ca" / "ca.crt"
    context = ssl.create_default_context(cafile=ca)
    bodies = {"none": b"", "other": board.csr(etc, OTHER), "no PEM": b"\0" * 64}
    for name, body in bodies.items():
        headers = {"Authorization": f"Bearer {fleet.issue_token(OWN)}"}
        with contextlib.closing(http.client.HTTPSConnection(url.removeprefix("https://"), context=context)) as link:
            link.request("POST", ENROL, body, headers)
            answer = link.getresponse()
            assert (name, answer.status, json.loads(answer.read())["exit"]) == (name, 403, Exit.VERIFICATION)
    assert fleet.tokens.waiting(OWN, now=NOW) is not None


def test_join_toml_is_gone_once_it_was_used(fleet: Fleet, url: str, etc: Path, tmp_path: Path) -> None:
    path = tmp_path / "join.toml"
    path.write_bytes(msgspec.toml.encode(board.Join(service=url, token=str(fleet.issue_token(OWN)))))
    assert board.join(path, etc) == OWN
    assert not path.exists()
    assert report(url, etc)[0] == 200


def test_join_toml_whose_token_expired_is_gone_where_the_board_has_its_certificate_and_stays_elsewhere(
    fleet: Fleet, url: str, etc: Path, tmp_path: Path, host_time: Time
) -> None:
    """The power went between the certificate and the deletion of the file."""
    path = tmp_path / "join.toml"
    content = msgspec.toml.encode(board.Join(service=url, token=str(fleet.issue_token(OWN))))
    path.write_bytes(content)
    board.join(path, etc)
    path.write_bytes(content)
    host_time.now += 2 * DAY_S
    with pytest.raises(ProvisionError, match="used already"):
        board.join(path, tmp_path / "another board")
    board.join(path, etc)
    assert not path.exists()


def test_join_toml_stays_where_enrolment_failed(fleet: Fleet, etc: Path, tmp_path: Path) -> None:
    path = tmp_path / "join.toml"
    path.write_bytes(msgspec.toml.encode(board.Join(service="https://127.0.0.1:1", token=str(fleet.issue_token(OWN)))))
    with pytest.raises(ProvisionError, match="cannot be reached"):
        board.join(path, etc)
    assert path.exists()

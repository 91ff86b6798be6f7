"""The fleet folder: made once, edited by people and programs, its owner's alone; its authority, and what it signs."""

import threading
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, SECP384R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key, load_pem_public_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedeq_edge import orders
from fedeq_edge.errors import ConfigError, Exit, ProvisionError, StateError
from fedeq_edge.provision import enrol
from fedeq_edge.provision.actions import ActionState, Report
from fedeq_edge.provision.ca import AUTHORITY_LIFETIME, Authority, revoked, serial_of
from fedeq_edge.provision.fleet import Fleet, FleetSettings

NOW = 1_800_000_000.0
OWN, OTHER = "pi-01", "pi-02"
SETTINGS = FleetSettings(name="plant", broker="mqtts://g", service="https://g", federation="plant")
REPORTED = Report(version="1.0+aa", confirmed=True, healthy=True)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where a fleet is made."""
    return tmp_path / "fleet"


@pytest.fixture
def fleet(place: Path) -> Fleet:
    made = Fleet.init(place, SETTINGS, ["gateway.local", "192.168.1.10"], clock=lambda: NOW)
    made.add(OWN, "raspberry-pi-4")
    made.add(OTHER, "x86-64")
    return made


@pytest.fixture
def authority(fleet: Fleet) -> Authority:
    return Authority.open(fleet.folder / "ca", clock=lambda: NOW)


@pytest.fixture
def request_pem(tmp_path: Path) -> bytes:
    """A certificate request of the device."""
    return enrol.csr(tmp_path / "etc", OWN)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def extension(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> tuple[x509.ExtensionType, bool]:
    found = certificate.extensions.get_extension_for_class(kind)
    return found.value, found.critical


def test_a_fleet_is_its_owners_alone(fleet: Fleet) -> None:
    assert fleet.folder.stat().st_mode & 0o777 == 0o700
    secrets = ("ca/ca.key", "keys/bundle.key", "gateway/server.key", "gateway/aggregator.key", "fleet.toml")
    assert {name: (fleet.folder / name).stat().st_mode & 0o777 for name in secrets} == dict.fromkeys(secrets, 0o600)


def test_a_fleet_is_not_made_where_there_is_one(fleet: Fleet) -> None:
    before = everything(fleet.folder)
    with pytest.raises(StateError, match="nothing makes a fleet's CA anew"):
        Fleet.init(fleet.folder, SETTINGS, ["g"])
    assert everything(fleet.folder) == before
    assert [path.name for path in fleet.folder.parent.iterdir()] == ["fleet"]


def test_an_authority_is_not_made_where_there_is_one(fleet: Fleet) -> None:
    before = everything(fleet.folder)
    with pytest.raises(StateError, match="would lock every device out"):
        Authority.create(fleet.folder / "ca", "plant")
    assert everything(fleet.folder) == before


@pytest.mark.parametrize("host", ["gäteway", "", "https://gateway", "a b", "x" * 254])
def test_a_fleet_that_could_not_be_finished_leaves_nothing(host: str, place: Path) -> None:
    with pytest.raises(ConfigError, match="neither a DNS name"):
        Fleet.init(place, SETTINGS, [host])
    assert list(place.parent.iterdir()) == []


def test_an_empty_folder_becomes_a_fleet(place: Path) -> None:
    place.mkdir()
    assert Fleet.init(place, SETTINGS, ["g"]).devices == {}


def test_the_key_of_releases_signs_and_is_verified(fleet: Fleet) -> None:
    private = load_pem_private_key((fleet.folder / "keys" / "bundle.key").read_bytes(), None)
    public = load_pem_public_key((fleet.folder / "keys" / "bundle.pub").read_bytes())
    assert isinstance(private, Ed25519PrivateKey)
    assert isinstance(public, Ed25519PublicKey)
    public.verify(private.sign(b"manifest"), b"manifest")


def test_the_authority_may_sign_leaves_and_lists_alone(authority: Authority) -> None:
    usage, critical = extension(authority.certificate, x509.KeyUsage)
    assert isinstance(usage, x509.KeyUsage)
    assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature, critical) == (True, True, False, True)
    assert extension(authority.certificate, x509.BasicConstraints) == (x509.BasicConstraints(True, 0), True)


def test_a_device_certificate_says_who_it_is_and_is_for_clients_alone(authority: Authority, request_pem: bytes) -> None:
    certificate = x509.load_pem_x509_certificate(authority.device_certificate(request_pem, OWN))
    certificate.verify_directly_issued_by(authority.certificate)
    assert certificate.subject.rfc4514_string() == f"CN={OWN},O=plant"
    name = x509.UniformResourceIdentifier(f"urn:fedeq:plant:device:{OWN}")
    assert extension(certificate, x509.SubjectAlternativeName)[0] == x509.SubjectAlternativeName([name])
    purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    assert extension(certificate, x509.ExtendedKeyUsage)[0] == purpose
    assert extension(certificate, x509.BasicConstraints) == (x509.BasicConstraints(False, None), True)
    assert (authority.folder / "issued" / f"{serial_of(certificate)}.crt").exists()


def test_the_gateway_has_its_names_and_is_for_servers_alone(fleet: Fleet) -> None:
    certificate = x509.load_pem_x509_certificate((fleet.folder / "gateway" / "server.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["gateway.local"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["192.168.1.10"]
    purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    assert extension(certificate, x509.ExtendedKeyUsage)[0] == purpose


def test_a_request_gets_nothing_but_its_key_into_the_certificate(authority: Authority, tmp_path: Path) -> None:
    """It wishes to be an authority, for servers, under another organisation."""
    key = load_pem_private_key(_key_of(tmp_path), None)
    name = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "evil"), x509.NameAttribute(NameOID.COMMON_NAME, OWN)]
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(name))
    builder = builder.add_extension(x509.BasicConstraints(True, None), critical=True)
    request = builder.sign(key, SHA256())  # type: ignore[arg-type]  # of the kinds that a PEM file may hold it is EC
    made = authority.device_certificate(request.public_bytes(Encoding.PEM), OWN)
    certificate = x509.load_pem_x509_certificate(made)
    assert extension(certificate, x509.BasicConstraints)[0] == x509.BasicConstraints(False, None)
    assert certificate.subject.rfc4514_string() == f"CN={OWN},O=plant"


def _key_of(folder: Path) -> bytes:
    enrol.csr(folder / "etc", OWN)
    return (folder / "etc" / "device.key").read_bytes()


def test_a_request_that_was_changed_is_refused(authority: Authority, request_pem: bytes) -> None:
    der = bytearray(x509.load_pem_x509_csr(request_pem).public_bytes(Encoding.DER))
    der[-1] ^= 1
    changed = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM)
    with pytest.raises(ProvisionError, match="was not signed by its own key") as refused:
        authority.device_certificate(changed, OWN)
    assert refused.value.exit == Exit.VERIFICATION


@pytest.mark.parametrize("request_pem", [b"", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n", b"\xff" * 100])
def test_what_is_no_request_is_refused(authority: Authority, request_pem: bytes) -> None:
    with pytest.raises(ProvisionError, match="is none, or damaged"):
        authority.device_certificate(request_pem, OWN)


def test_a_request_of_another_device_or_on_another_curve_is_refused(authority: Authority, request_pem: bytes) -> None:
    with pytest.raises(ProvisionError, match=f"names '{OWN}'"):
        authority.device_certificate(request_pem, OTHER)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, OWN)])
    key = generate_private_key(SECP384R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, SHA256())
    with pytest.raises(ProvisionError, match="not on P-256"):
        authority.device_certificate(request.public_bytes(Encoding.PEM), OWN)


def test_the_list_of_revoked_has_every_certificate_of_the_device_and_of_no_other(
    fleet: Fleet, authority: Authority, request_pem: bytes, tmp_path: Path
) -> None:
    first = x509.load_pem_x509_certificate(authority.device_certificate(request_pem, OWN))
    second = x509.load_pem_x509_certificate(authority.device_certificate(request_pem, OWN))
    other = authority.device_certificate(enrol.csr(tmp_path / "other", OTHER), OTHER)
    done = fleet.revoke(OWN)
    assert (done.certificates, done.denied) == (2, False)
    listed = x509.load_pem_x509_crl((fleet.folder / "gateway" / "crl.pem").read_bytes())
    assert {one.serial_number for one in listed} == {first.serial_number, second.serial_number}
    assert x509.load_pem_x509_certificate(other).serial_number not in {one.serial_number for one in listed}
    assert listed.is_signature_valid(authority.certificate.public_key())  # type: ignore[arg-type]  # it is EC
    assert listed.next_update_utc == authority.certificate.not_valid_after_utc
    assert fleet.revoke(OWN).certificates == 0


def test_a_certificate_that_was_revoked_meanwhile_is_not_renewed(authority: Authority, request_pem: bytes) -> None:
    old = serial_of(x509.load_pem_x509_certificate(authority.device_certificate(request_pem, OWN)))
    authority.revoke(OWN)
    with pytest.raises(ProvisionError, match="was revoked"):
        authority.device_certificate(request_pem, OWN, renews=old)
    assert list(revoked(authority.folder)) == [old]


def test_revoking_a_device_tells_the_aggregator(place: Path, tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    fleet = Fleet.init(place, msgspec.structs.replace(SETTINGS, aggregator=str(state)), ["g"])
    fleet.add(OWN, "x86-64")
    assert fleet.revoke(OWN).denied
    assert list(orders.taken(state)) == [("deny", OWN)]


def test_an_aggregator_that_cannot_be_told_keeps_nothing_from_being_revoked(place: Path, request_pem: bytes) -> None:
    fleet = Fleet.init(place, msgspec.structs.replace(SETTINGS, aggregator="../nowhere"), ["g"])
    fleet.add(OWN, "x86-64")
    Authority.open(place / "ca").device_certificate(request_pem, OWN)
    done = fleet.revoke(OWN)
    assert (done.certificates, done.denied) == (1, False)
    assert "has an aggregator run here?" in done.trouble


def test_the_key_under_a_passphrase_opens_with_it_alone(place: Path) -> None:
    Fleet.init(place, SETTINGS, ["g"], passphrase="correct horse battery staple")
    with pytest.raises(ConfigError, match="FEDEQ_CA_PASSPHRASE"):
        Authority.open(place / "ca")
    with pytest.raises(ConfigError, match="does not open"):
        Authority.open(place / "ca", "wrong")
    assert Authority.open(place / "ca", "correct horse battery staple").fleet == "plant"


def test_a_damaged_or_foreign_authority_is_named(fleet: Fleet, tmp_path: Path) -> None:
    folder = fleet.folder / "ca"
    Authority.create(tmp_path / "other", "plant")
    (folder / "ca.crt").write_bytes((tmp_path / "other" / "ca.crt").read_bytes())
    with pytest.raises(StateError, match="do not belong together; restore"):
        Authority.open(folder)
    (folder / "ca.key").write_bytes(b"rubbish")
    with pytest.raises(StateError, match="restore ca/ from your backup"):
        Authority.open(folder)
    (folder / "ca.key").unlink()
    with pytest.raises(StateError, match="restore ca/ from your backup"):
        Authority.open(folder)


def test_a_host_whose_clock_is_before_its_authority_signs_nothing(authority: Authority, request_pem: bytes) -> None:
    early = Authority.open(authority.folder, clock=lambda: 5.0)
    with pytest.raises(ProvisionError, match="timedatectl set-ntp true") as refused:
        early.device_certificate(request_pem, OWN)
    assert refused.value.exit == Exit.CLOCK


def test_no_certificate_outlives_its_authority(authority: Authority, request_pem: bytes) -> None:
    late = Authority.open(authority.folder, clock=lambda: NOW + AUTHORITY_LIFETIME.total_seconds() - 60)
    certificate = x509.load_pem_x509_certificate(late.device_certificate(request_pem, OWN))
    assert certificate.not_valid_after_utc == authority.certificate.not_valid_after_utc


def test_adding_and_flashing_a_device_leaves_every_other_line_as_it_was(fleet: Fleet) -> None:
    path = fleet.folder / "fleet.toml"
    path.write_text("# ours\n" + path.read_text().replace("[devices.pi-02]", "# on the roof\n[devices.pi-02]"))
    before = path.read_text().splitlines()
    fleet.add("pi-03", "raspberry-pi-5")
    assert path.read_text().splitlines()[: len(before)] == before
    fleet.flashed(OWN, "ssh://pi@10.0.0.5")
    after = path.read_text().splitlines()
    assert [line for line in after if line not in before and "pi-03" not in line] == [
        'target = "ssh://pi@10.0.0.5"',
        'profile = "raspberry-pi-5"',
    ]
    assert Fleet.open(fleet.folder).device(OWN).target == "ssh://pi@10.0.0.5"


def test_a_table_written_by_hand_in_another_way_is_understood(fleet: Fleet) -> None:
    path = fleet.folder / "fleet.toml"
    path.write_text(path.read_text().replace("[devices.pi-01]", '[devices."pi-01"]'))
    fleet.flashed(OWN, "local:")
    assert Fleet.open(fleet.folder).device(OWN).target == "local:"
    assert fleet.device(OTHER).profile == "x86-64"


@pytest.mark.parametrize(
    ("device", "profile", "reason"),
    [
        (OWN, "x86-64", "is in .* already"),
        ("Pi", "x86-64", "a-z 0-9"),
        ("aggregator", "x86-64", "the broker gives this name other rights"),
        ("pi-03", "raspberry-pi-6", "did you mean 'raspberry-pi-"),
    ],
)
def test_a_device_that_cannot_be_is_not_added(device: str, profile: str, reason: str, fleet: Fleet) -> None:
    before = (fleet.folder / "fleet.toml").read_text()
    with pytest.raises(ConfigError, match=reason):
        fleet.add(device, profile)
    assert (fleet.folder / "fleet.toml").read_text() == before


def test_an_unknown_device_is_refused_with_the_nearest(fleet: Fleet) -> None:
    with pytest.raises(ConfigError, match="did you mean pi-01"):
        fleet.device("pi-1")


def test_what_is_no_fleet_is_said_with_the_way_to_one(place: Path) -> None:
    with pytest.raises(ConfigError, match="fedeq fleet init NAME"):
        Fleet.open(place)
    place.mkdir()
    (place / "fleet.toml").write_text("[fleet]\nnme = 1\n")
    with pytest.raises(ConfigError, match=r"fleet.toml: .*mend it by hand"):
        Fleet.open(place)


def test_devices_added_by_many_at_once_are_all_there(fleet: Fleet) -> None:
    """As two terminals would, each with the folder opened by itself."""

    def add(number: int) -> None:
        Fleet.open(fleet.folder).add(f"d-{number}", "x86-64")

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(fleet.devices) == {OWN, OTHER, *(f"d-{number}" for number in range(8))}


def test_an_action_is_due_until_it_expires_or_has_ended(place: Path) -> None:
    now = NOW
    fleet = Fleet.init(place, SETTINGS, ["g"], clock=lambda: now)
    fleet.add(OWN, "x86-64")
    action = fleet.give_action(OWN, "update", "1.1", 600)
    assert fleet.action_for(OWN) == action
    running = msgspec.structs.replace(REPORTED, action=ActionState(id=action.id, state="running"))
    assert fleet.take_report(OWN, running) == action
    now += 600
    assert fleet.action_for(OWN) is None
    now -= 600
    failed = ActionState(id=action.id, state="rolled_back", detail="no READY in 90 s")
    assert fleet.take_report(OWN, msgspec.structs.replace(REPORTED, action=failed)) is None
    fleet.take_report(OWN, running)  # late
    given = fleet.given_action(OWN)
    assert given is not None
    assert given.state == failed


def test_the_newest_action_takes_the_place_of_another_and_hears_nothing_of_its_state(fleet: Fleet) -> None:
    old = fleet.give_action(OWN, "update", "1.1", 600)
    new = fleet.give_action(OWN, "rollback", "", 600)
    told = msgspec.structs.replace(REPORTED, action=ActionState(id=old.id, state="done"))
    assert fleet.take_report(OWN, told) == new


def test_a_report_of_a_device_that_is_unknown_is_not_kept(fleet: Fleet) -> None:
    with pytest.raises(ConfigError):
        fleet.take_report("pi-99", REPORTED)
    assert list((fleet.folder / "reports").iterdir()) == []


def test_a_damaged_file_is_named_and_stays(fleet: Fleet) -> None:
    path = fleet.folder / "reports" / f"{OWN}.json"
    path.write_text('{"report": ')
    with pytest.raises(StateError, match=r"pi-01.json is damaged .*restore it from a backup"):
        fleet.heard(OWN)
    assert path.read_text() == '{"report": '


def test_a_key_signs_for_the_masking_identity(fleet: Fleet, authority: Authority, tmp_path: Path) -> None:
    """What masking wants of a device's certificate: the fleet's CA issued it, and its key signs by ECDSA."""
    folder = tmp_path / "etc"
    certificate = x509.load_pem_x509_certificate(authority.device_certificate(enrol.csr(folder, OWN), OWN))
    key = load_pem_private_key((folder / "device.key").read_bytes(), None)
    signature = key.sign(b"keys", ECDSA(SHA256()))  # type: ignore[union-attr,call-arg,arg-type]  # it is EC
    certificate.public_key().verify(signature, b"keys", ECDSA(SHA256()))  # type: ignore[union-attr,call-arg,arg-type]

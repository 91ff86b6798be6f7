"""Devices that check each other's keys against certificates of the fleet."""

import datetime as dt
import functools

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from fedeq_edge.errors import ConfigError, RemoteWireError
from fedeq_edge.masking import CertificateIdentity, Keys, MaskingDevice, Member, Roster
from fedeq_edge.masking.keys import Pair
from fedeq_edge.masking.messages import PROOF_BYTES_MOST
from tests.masking.masked_session import Session, terms, vectors

Key = ec.EllipticCurvePrivateKey
CLAIM = b"what is signed"


def issued(name: str, public: Key | ed25519.Ed25519PrivateKey, issuer: str, by: Key) -> x509.Certificate:
    start = dt.datetime(2020, 1, 1)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(public.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + dt.timedelta(days=365))  # long over: boards without a clock cannot tell
        .sign(by, SHA256())
    )


class Fleet:
    """An authority and the identities that it issues."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.authority = issued("fleet", self.key, "fleet", self.key)

    def identity(self, device: str) -> CertificateIdentity:
        key = ec.generate_private_key(ec.SECP256R1())
        return CertificateIdentity(key, issued(device, key, "fleet", self.key), self.authority)


@functools.cache
def fleet() -> Fleet:
    return Fleet()


@functools.cache
def d0() -> CertificateIdentity:
    return fleet().identity("d0")


def signed_session() -> Session:
    session = Session(terms(), vectors(4))
    session.devices = {name: MaskingDevice(name, terms(), fleet().identity(name)) for name in session.data}
    return session


def test_signed_keys_are_taken_and_the_sum_is_the_same() -> None:
    session = signed_session()
    assert (session.run(masked_nothing=["d3"]).total == session.plain(["d0", "d1", "d2"])).all()
    assert len(session.devices["d0"].keys().proof) < PROOF_BYTES_MOST / 2


@pytest.mark.parametrize("proof", ["own", "none", "of-another"])
def test_a_server_that_slips_in_keys_of_its_making_gets_no_shares(proof: str) -> None:
    session = signed_session()
    members = list(session.keys().members)
    keys = Keys(
        mask=Pair.drawn().public,
        seal=Pair.drawn().public,
        proof={"own": members[3].keys.proof, "none": b"", "of-another": members[2].keys.proof}[proof],
    )
    members[3] = Member(device="d3", keys=keys)
    with pytest.raises(RemoteWireError, match=r"keys of d3 .* not signed"):
        session.devices["d0"].share(Roster(members=tuple(members)))


def test_keys_of_another_session_are_not_taken_for_this_one() -> None:
    old = signed_session().keys().members
    session = signed_session()
    roster = session.keys()
    mixed = Roster(members=(*roster.members[:3], old[3]))
    session.devices["d0"].share(mixed)  # the same session bytes: signed for it, so it is theirs
    other = type(terms())(session=bytes(32), length=5, bound=1000)
    device = MaskingDevice("d0", other, d0())
    with pytest.raises(RemoteWireError, match="keys of d1"):
        device.share(Roster(members=(Member(device="d0", keys=device.keys()), *roster.members[1:])))


def test_a_proof_is_of_one_device_one_statement_and_one_fleet() -> None:
    proof = d0().prove(CLAIM)
    assert d0().accepts("d0", CLAIM, proof)
    assert not d0().accepts("d1", CLAIM, proof)
    assert not d0().accepts("d0", CLAIM + b".", proof)
    assert not Fleet().identity("d0").accepts("d0", CLAIM, proof)


def test_a_certificate_that_a_device_issued_itself_proves_nothing() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    liar = CertificateIdentity(key, issued("d1", key, "fleet", key), fleet().authority)
    assert not d0().accepts("d1", CLAIM, liar.prove(CLAIM))


def test_a_certificate_with_another_kind_of_key_proves_nothing() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    certificate = issued("d1", key, "fleet", fleet().key).public_bytes(Encoding.DER)
    assert not d0().accepts("d1", CLAIM, len(certificate).to_bytes(2, "little") + certificate + key.sign(CLAIM))


@given(proof=st.binary(max_size=300))
def test_invented_proofs_are_refused_and_raise_nothing(proof: bytes) -> None:
    assert not d0().accepts("d0", CLAIM, proof)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # cryptography warns of what it will refuse one day
def test_a_proof_with_any_bit_turned_or_cut_anywhere_is_refused_and_raises_nothing() -> None:
    sound = d0().prove(CLAIM)
    end = 2 + int.from_bytes(sound[:2], "little")
    certificate = x509.load_der_x509_certificate(sound[2:end])
    # DER's count of unused bits before the authority's signature: 1 reads the same where the last bit is 0
    unused_bits = end - len(certificate.signature) - 1
    for place in range(len(sound)):
        assert not d0().accepts("d0", CLAIM, sound[:place])
        for bit in range(8):
            damaged = bytearray(sound)
            damaged[place] ^= 1 << bit
            assert not d0().accepts("d0", CLAIM, bytes(damaged)) or place == unused_bits


def test_a_key_that_is_not_the_certificates_is_refused_at_the_start() -> None:
    key, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(ConfigError, match="does not belong"):
        CertificateIdentity(other, issued("d0", key, "fleet", fleet().key), fleet().authority)

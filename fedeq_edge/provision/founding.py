"""A fleet's beginning: its authority, its keys, its gateway's certificates."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from fedeq_edge.atomic import write_atomically

if TYPE_CHECKING:
    from fedeq_edge.provision.fleet import FleetSettings

Clock = Callable[[], float]


def found(folder: Path, settings: "FleetSettings", hosts: Sequence[str], passphrase: str | None, clock: Clock) -> None:
    """`folder`, which is not there yet, is a fleet: nothing of it is ever made anew."""
    from fedeq_edge.provision.ca import Authority  # noqa: PLC0415  # cryptography: this command needs it, few do
    from fedeq_edge.provision.repository import Repository  # noqa: PLC0415  # tuf, likewise

    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700)
    for name in ("ca", "gateway", "keys", "bundles", "actions", "reports"):
        (folder / name).mkdir(mode=0o700)
    authority = Authority.create(folder / "ca", settings.name, passphrase, clock)
    new_gateway(folder, hosts, passphrase=passphrase, clock=clock)
    certificate, key = authority.aggregator_certificate()
    write_atomically(folder / "gateway" / "aggregator.key", key, mode=0o600)
    write_atomically(folder / "gateway" / "aggregator.crt", certificate)
    write_atomically(folder / "gateway" / "ca.crt", authority.pem)
    write_atomically(folder / "gateway" / "crl.pem", authority.crl())
    _make_bundle_key(folder / "keys")
    Repository.create(folder / "tuf", passphrase, clock)
    text = msgspec.toml.encode({"fleet": settings})
    write_atomically(folder / "fleet.toml", text, mode=0o600)


def new_gateway(folder: Path, hosts: Sequence[str], *, passphrase: str | None = None, clock: Clock = time.time) -> None:
    """`gateway/` has a certificate for these names; CA and devices stay as they are. folder: of the fleet."""
    from fedeq_edge.provision.ca import Authority  # noqa: PLC0415  # cryptography: this command needs it, few do

    authority = Authority.open(folder / "ca", passphrase, clock)
    certificate, key = authority.server_certificate(hosts)
    gateway = folder / "gateway"
    write_atomically(gateway / "server.key", key, mode=0o600)
    write_atomically(gateway / "server.crt", certificate)


def _make_bundle_key(folder: Path) -> None:
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415  # only this command needs it
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey  # noqa: PLC0415  # as above

    key = Ed25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    write_atomically(folder / "bundle.key", private, mode=0o600)
    write_atomically(folder / "bundle.pub", public)

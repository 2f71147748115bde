"""Certificates for tests: an authority, and a server certificate that it signed. Deployments get theirs from an authority of their own."""

from __future__ import annotations

import ipaddress
import os
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from hetlora.errors import ConfigError

DAYS = 365


def write_certificates(folder: Path, hosts: list[str]) -> list[Path]:
    """ca.crt, server.pem and server.key, for a server that is reached under these names and addresses; the files written.

    The authority's own key is thrown away: nobody can sign another certificate with it.
    """
    names = ["ca.crt", "server.pem", "server.key"]
    if taken := [name for name in names if (folder / name).exists()]:
        raise ConfigError(f"{folder / taken[0]}: exists; choose a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hetlora test authority")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
    ca = _signed(authority, authority, authority_key, authority_key, x509.BasicConstraints(ca=True, path_length=0), None)
    server = _signed(subject, authority, key, authority_key, x509.BasicConstraints(ca=False, path_length=None), x509.SubjectAlternativeName(_names(hosts)))
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    for name, content in zip(names, (ca.public_bytes(pem), server.public_bytes(pem), private), strict=True):
        with os.fdopen(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
    return [folder / name for name in names]


def _names(hosts: list[str]) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = []
    for host in hosts:
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            found.append(x509.DNSName(host))
    return found


def _signed(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePrivateKey,
    constraints: x509.BasicConstraints,
    names: x509.SubjectAlternativeName | None,
) -> x509.Certificate:
    now = datetime.now(timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=DAYS))
        .add_extension(constraints, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    builder = builder if names is None else builder.add_extension(names, critical=False)
    return builder.sign(signer, hashes.SHA256())

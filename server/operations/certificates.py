"""A server's certificates: a CA that devices trust, and one behind the proxy whose key is not kept.

**Guarantee**: a leaf holds for the names it was made for and for TLS servers only; the CA's own
certificate signs leaves and nothing else. Keys are P-256, signatures SHA-256.
"""

import datetime
import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ...common.errors import StateError
from ...common.files import explain_os_errors, write_atomic

__all__ = [
    "ALWAYS",
    "Authority",
    "authority_of",
    "new_authority",
    "pem",
    "valid_until",
    "write_certificates",
]

ALWAYS = ("localhost", "127.0.0.1", "::1")
CLOCKS_DIFFER = datetime.timedelta(hours=1)


@dataclass(frozen=True)
class Authority:
    """A certificate and the key that signs with it."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def __repr__(self) -> str:
        return f"Authority({self.certificate.subject.rfc4514_string()})"


def write_certificates(
    folder: Path, hosts: Iterable[str], authority: Authority, days: int, now: datetime.datetime
) -> None:
    """The server's certificate, and one for the hop behind it.

    The inner hop has a CA of its own whose key is never stored: the CA that devices are given
    says nothing about who may speak to the SuperLink.
    """
    folder.mkdir(mode=0o700)
    inner = new_authority("privet inner CA", days, now)
    outer_hosts = dict.fromkeys((*hosts, *ALWAYS))
    for name, signer, names in (
        ("server", authority, tuple(outer_hosts)),
        ("internal", inner, ALWAYS),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _leaf(key.public_key(), names, signer, days, now)
        write_atomic(folder / f"{name}.key", pem(key))
        write_atomic(folder / f"{name}.crt", pem(certificate))
    write_atomic(folder / "internal-ca.crt", pem(inner.certificate))


def new_authority(name: str, days: int, now: datetime.datetime) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(name)
    usage = _usage(sign_certificates=True)
    certificate = (
        _begun(subject, subject, key.public_key(), days, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def _leaf(
    public: ec.EllipticCurvePublicKey,
    hosts: Sequence[str],
    signer: Authority,
    days: int,
    now: datetime.datetime,
) -> x509.Certificate:
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key())
    return (
        _begun(_name(f"privet {hosts[0]}"), signer.certificate.subject, public, days, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_alternative(h) for h in hosts]), False)
        .add_extension(issuer, critical=False)
        .sign(signer.key, hashes.SHA256())
    )


def _begun(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    days: int,
    now: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS_DIFFER)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def pem(thing: x509.Certificate | ec.EllipticCurvePrivateKey) -> bytes:
    if isinstance(thing, x509.Certificate):
        return thing.public_bytes(serialization.Encoding.PEM)
    return thing.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def authority_of(key_path: Path, certificate_path: Path) -> Authority:
    """Load the CA whose certificate devices have.

    Raises:
        StateError: the key is not there, damaged, or another CA's.
    """
    if not key_path.is_file():
        raise StateError(
            f"the CA's key is not at {key_path}; put it back for a moment, or say where it is with "
            "--ca-key PATH"
        )
    with explain_os_errors(key_path, "read"):
        data = key_path.read_bytes()
    with explain_os_errors(certificate_path, "read"):
        certificate_data = certificate_path.read_bytes()
    try:
        key = serialization.load_pem_private_key(data, None)
        certificate = x509.load_pem_x509_certificate(certificate_data)
    except (ValueError, TypeError):
        raise StateError(
            f"{key_path} and {certificate_path} should be an unencrypted private key and a "
            "certificate, both PEM; restore them from a copy"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or (
        key.public_key() != certificate.public_key()
    ):
        raise StateError(
            f"{key_path} is the key of another CA than {certificate_path}; give its own"
        )
    return Authority(certificate, key)


def valid_until(path: Path) -> datetime.datetime:
    """When the certificate in a file runs out.

    Raises:
        StateError: it is missing or damaged.
    """
    with explain_os_errors(path, "read"):
        data = path.read_bytes()
    try:
        return x509.load_pem_x509_certificate(data).not_valid_after_utc
    except ValueError:
        raise StateError(
            f"{path} is no certificate; make new ones: privet server init --renew"
        ) from None

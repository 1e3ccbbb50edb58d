"""How is the connection of gateway and engine kept private where it leaves the machine?

Each engine makes a certificate when it starts. Ray tells the gateways of it, as it tells them the
address and the secret; they trust this one alone, and whoever has another is not the engine. And
each gateway has a certificate of the application's authority, without which no engine listens to
anybody. Nobody has to make, hand out or renew anything.
"""

import datetime
import ssl
import tempfile
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

# It lives as long as its engine. Clocks of machines differ.
_LIFETIME = datetime.timedelta(days=3650)
_CLOCK_SKEW = datetime.timedelta(days=2)

HANDSHAKE_TIMEOUT_S = 5.0


class Authority(NamedTuple):
    """Who says which processes are an application's gateways."""

    certificate: str  # PEM, for those that are asked by gateways
    key: str  # PEM, for gateways, who sign for themselves


class Identity(NamedTuple):
    """What a gateway shows that it is one."""

    certificate: str  # PEM
    key: str  # PEM; it stays in the process that has made it


def make_authority() -> Authority:
    """Return a new authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("headway application")
    certificate = (
        _builder(name, name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Authority(_pem(certificate), _key_pem(key))


def make_identity(authority: Authority) -> Identity:
    """Return a new certificate of the authority's, by which a gateway is known to be one."""
    issuer = x509.load_pem_x509_certificate(authority.certificate.encode())
    issuer_key = serialization.load_pem_private_key(authority.key.encode(), password=None)
    assert isinstance(issuer_key, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(_name("headway gateway"), issuer.subject, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=True)
        .sign(issuer_key, hashes.SHA256())
    )
    return Identity(_pem(certificate), _key_pem(key))


def make_certificate(clients: str = "") -> tuple[str, ssl.SSLContext]:
    """Return a new certificate as PEM, and the context of the server that has its key.

    Only clients with a certificate of the authority `clients`, PEM, are let in; all if there is
    none.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("headway engine")
    certificate = _pem(
        _builder(name, name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    _load(context, certificate, _key_pem(key))
    if clients:
        context.load_verify_locations(cadata=clients)
        context.verify_mode = ssl.CERT_REQUIRED
    return certificate, context


def trust_only(certificate: str, identity: Identity | None = None) -> ssl.SSLContext:
    """Return the context of a client that talks to the owner of this certificate, PEM.

    The client is known by its `identity`, if it has one.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the certificate names no host: it is known as it is
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=certificate)
    if identity is not None:
        _load(context, identity.certificate, identity.key)
    return context


def _load(context: ssl.SSLContext, certificate: str, key: str) -> None:
    # Python reads keys from files only. Nobody else can read this one, and it is gone at once.
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:
        file.write((key + certificate).encode())
        file.flush()
        context.load_cert_chain(file.name)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + _LIFETIME)
    )


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()

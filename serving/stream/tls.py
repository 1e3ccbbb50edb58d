"""How is the connection of gateway and engine kept private where it leaves the machine?

Each engine makes a certificate when it starts. Ray tells the gateways of it, as it tells them the
address and the secret; they trust this one alone, and whoever has another is not the engine. Nobody
has to make, hand out or renew anything.
"""

import datetime
import ssl
import tempfile

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

# It lives as long as its engine. Clocks of machines differ.
_LIFETIME = datetime.timedelta(days=3650)
_CLOCK_SKEW = datetime.timedelta(days=2)

HANDSHAKE_TIMEOUT_S = 5.0


def make_certificate() -> tuple[str, ssl.SSLContext]:
    """Return a new certificate as PEM, and the context of the server that has its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "headway engine")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + _LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    key_pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Python reads keys from files only. Nobody else can read this one, and it is gone at once.
    with tempfile.NamedTemporaryFile(suffix=".pem") as file:
        file.write(key_pem + pem)
        file.flush()
        context.load_cert_chain(file.name)
    return pem.decode(), context


def trust_only(certificate: str) -> ssl.SSLContext:
    """Return the context of a client that talks to the owner of this certificate, PEM."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the certificate names no host: it is known as it is
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=certificate)
    return context

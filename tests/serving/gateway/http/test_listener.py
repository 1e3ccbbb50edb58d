"""The ports that a gateway listens on: with TLS, and one of its own."""

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from prometheus_client.parser import text_string_to_metric_families

from serving.config import ConfigError, parse
from serving.gateway.app import Gateway
from serving.gateway.http.listener import Listener
from tests.serving.gateway.http.raw_client import connected, get
from tests.support.running_gateway import CHAT, System, free_port, running


class Certificate:
    """A certificate for this machine, and its key."""

    def __init__(self, folder: Path, name: str, passphrase: bytes | None = None) -> None:
        self.cert, self.key = folder / f"{name}.crt", folder / f"{name}.key"
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        self.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        encryption = (
            serialization.BestAvailableEncryption(passphrase)
            if passphrase
            else serialization.NoEncryption()
        )
        pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        self.key.write_bytes(key.private_bytes(pem, pkcs8, encryption))

    @property
    def settings(self) -> dict[str, str]:
        return {"tls_cert_file": str(self.cert), "tls_key_file": str(self.key)}

    def replace(self, other: "Certificate") -> None:
        """Become another, as renewal does it: one file after the other."""
        other.cert.replace(self.cert)
        other.key.replace(self.key)


@contextlib.asynccontextmanager
async def trusting(system: System, certificate: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client on a new connection that trusts this certificate alone."""
    url = f"https://127.0.0.1:{system.gateway.config.gateway.port}"
    context = ssl.create_default_context(cafile=str(certificate))
    async with httpx.AsyncClient(base_url=url, verify=context) as client:
        yield client


async def test_with_a_certificate_clients_use_tls(tmp_path):
    certificate = Certificate(tmp_path, "ours")
    async with running(num_engines=1, gateway=certificate.settings) as system:
        async with trusting(system, certificate.cert) as client:
            for _ in range(3):
                reply = await client.post(CHAT, json=system.chat(max_tokens=1000))
                assert reply.text.count("data: {}") == 1000
                assert reply.text.endswith("data: [DONE]\n\n")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            async with trusting(system, Certificate(tmp_path, "other").cert) as client:
                await client.get("/v1/models")
        async with connected(system) as plain:
            plain.send(get("/v1/models"))
            with contextlib.suppress(ConnectionResetError):
                assert not (await plain.reader.read()).startswith(b"HTTP")
        system.assert_empty()


async def test_the_limits_hold_with_tls_too(tmp_path):
    certificate = Certificate(tmp_path, "ours")
    limits = {**certificate.settings, "max_head_bytes": 2_000, "stall_timeout_s": 0.3}
    async with running(num_engines=1, gateway=limits) as system:
        async with trusting(system, certificate.cert) as client:
            reply = await client.get("/v1/models", headers={"x": "y" * 3_000})
            assert reply.status_code == 431
            assert reply.json()["error"]["code"] == 431
            system.engines[0].chunk = b"x" * 100_000
            body = system.chat(max_tokens=4_000)
            async with client.stream("POST", CHAT, json=body):
                await system.until(lambda: system.outcomes["reneged"] == 1)
        system.assert_empty()


async def test_a_renewed_certificate_is_used_without_a_restart(tmp_path):
    first, second = Certificate(tmp_path, "first"), Certificate(tmp_path, "second")
    renewed = tmp_path / "renewed.crt"
    renewed.write_bytes(second.cert.read_bytes())
    async with (
        running(num_engines=1, gateway=first.settings) as system,
        trusting(system, first.cert) as client,
    ):
        assert (await client.get("/v1/models")).status_code == 200
        first.replace(second)

        async def is_renewed() -> bool:
            with contextlib.suppress(httpx.ConnectError):
                async with trusting(system, renewed) as other:
                    return (await other.get("/v1/models")).status_code == 200
            return False

        async with asyncio.timeout(10):
            while not await is_renewed():
                await asyncio.sleep(0.1)
        assert (await client.get("/v1/models")).status_code == 200  # who is in stays in


async def test_half_of_a_new_certificate_leaves_the_old_one_in_use(tmp_path):
    first, second = Certificate(tmp_path, "first"), Certificate(tmp_path, "second")
    trusted = tmp_path / "trusted.crt"
    trusted.write_bytes(first.cert.read_bytes())
    async with running(num_engines=1, gateway=first.settings) as system:
        second.cert.replace(first.cert)
        await asyncio.sleep(2.5)  # past the next look at the files
        async with trusting(system, trusted) as client:
            assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize("trouble", ["missing", "no PEM", "another's key", "a passphrase"])
async def test_a_certificate_that_cannot_be_used_is_named_at_the_start(trouble, tmp_path):
    certificate = Certificate(tmp_path, "ours", b"secret" if trouble == "a passphrase" else None)
    if trouble == "missing":
        certificate.key.unlink()
    elif trouble == "no PEM":
        certificate.cert.write_text("hello")
    elif trouble == "another's key":
        Certificate(tmp_path, "other").key.replace(certificate.key)
    with pytest.raises(ConfigError, match=r"gateway\.tls_cert_file: .*ours\.crt"):
        async with running(num_engines=0, gateway=certificate.settings):
            pass


@pytest.mark.parametrize(
    "settings",
    [
        {"tls_cert_file": "/a.crt"},
        {"tls_key_file": "/a.key"},
        {"tls_cert_file": "/a.crt", "tls_key_file": "/a.key", "front": "haproxy"},
        {"metrics_port": 65_535, "replicas": 2},
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings):
    with pytest.raises(ConfigError, match=r"tls_cert_file|metrics_port"):
        parse({"gateway": settings})


# --- a port for each gateway -----------------------------------------------------------


def _gateways_of(text: str) -> set[str | None]:
    """The label `gateway` of every sample there is."""
    return {
        sample.labels.get("gateway")
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_every_metric_tells_its_gateway():
    async with running(num_engines=1) as system:
        await system.client.post(CHAT, json=system.chat())
        assert _gateways_of((await system.client.get("/metrics")).text) == {"0"}


async def test_each_of_several_gateways_answers_for_itself_on_its_port():
    """The port of clients leads to any of them."""
    async with running(num_engines=1, gateway={"metrics_port": free_port()}) as system:
        config = system.gateway.config
        own = Listener(system.gateway.own_app, config.gateway, system.gateway.metrics_port)
        other = Gateway(config, "other", rank=1)
        others = Listener(other.own_app, config.gateway, other.metrics_port)
        for listener in (own, others):
            await listener.start()
        await system.client.post(CHAT, json=system.chat())
        for gateway, num_completed in ((system.gateway, 1), (other, 0)):
            assert gateway.metrics_port == config.gateway.metrics_port + gateway.rank
            url = f"http://127.0.0.1:{gateway.metrics_port}"
            text = (await system.client.get(f"{url}/metrics")).text
            assert _gateways_of(text) == {str(gateway.rank)}
            state = (await system.client.get(f"{url}/headway/state")).json()
            assert state["gateway_id"] == gateway.gateway_id
            assert (state["rank"], state["metrics_port"]) == (gateway.rank, gateway.metrics_port)
            assert state["outcomes"]["completed"] == num_completed
            usage = (await system.client.get(f"{url}/headway/usage")).json()
            assert usage["gateway_id"] == gateway.gateway_id
            assert (await system.client.get(f"{url}/health/live")).status_code == 200
            for path in ("/v1/models", CHAT):  # it is for whoever watches, not for clients
                assert (await system.client.get(f"{url}{path}")).status_code == 404
        for listener in (own, others):
            await listener.stop()
        other.close()
        elsewhere = Gateway(config, "elsewhere", rank=5, local_rank=0)  # the first of its node
        assert elsewhere.metrics_port == config.gateway.metrics_port
        elsewhere.close()

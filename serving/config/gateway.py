"""How is the gateway's HTTP server configured?"""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from serving.config.section import AbsolutePath, Section


class GatewayConfig(Section):
    """The OpenAI-compatible HTTP server."""

    front: Literal["own", "haproxy"] = Field(
        "own",
        description="own: the gateway listens itself; haproxy: Ray Serve's HAProxy in front",
    )
    host: str = Field("127.0.0.1", description="address of the gateway's own listener")
    insecure: bool = Field(
        False,
        description="whether a host that a network reaches may be open to whoever reaches it, "
        "without keys; else that is refused",
    )
    port: int = Field(8000, ge=1, le=65535, description="port of the gateway's own listener")
    replicas: int | Literal["auto"] = Field(
        1,
        description="gateways; on one node they share the port; auto: as many as the engines' "
        "tokens need, of the cores that engines leave (`headway plan` tells)",
    )
    placement: Literal["head", "nodes"] = Field(
        "head",
        description="over several nodes, with the own front: head puts all gateways on Ray's head "
        "node, whose address clients connect to; nodes puts `replicas` of them on every node, "
        "each listening on its own node's address, for a load balancer in front",
    )
    max_body_bytes: int = Field(
        16 * 2**20, ge=1024, description="a larger request body is answered 413"
    )
    max_incoming_bytes: int = Field(
        256 * 2**20,
        ge=1024,
        description="total size of request bodies that are being received, bytes; beyond it "
        "requests are answered 429",
    )
    max_connections: int | None = Field(
        None,
        ge=1,
        description="beyond this many connections requests on further ones are answered 503; "
        "unset: as many as the limit of open files has room for, at most 20,000",
    )
    max_connections_per_client: int | None = Field(
        None,
        ge=1,
        description="beyond this many connections from one address (IPv6: one /64) requests on "
        "further ones are answered 429; unset: no bound, as behind a proxy all have its address",
    )
    max_head_bytes: int = Field(
        64 * 2**10, ge=1024, description="a larger request head is answered 431"
    )
    head_timeout_s: float = Field(
        30.0, gt=0, description="time for a client to send a whole request head, seconds"
    )
    body_timeout_s: float = Field(
        120.0, gt=0, description="time for a client to send a whole request body, seconds"
    )
    stall_timeout_s: float = Field(
        60.0, gt=0, description="time for a client to read from a full send buffer, seconds"
    )
    max_record_bytes: int = Field(
        256 * 2**20,
        ge=0,
        description="total size of the records of what engines have generated for open requests, "
        "bytes (12 per token); a request without a record cannot be resumed by another engine",
    )
    keepalive_s: float | None = Field(
        None,
        gt=0,
        description="a comment is sent on an event stream that has not begun whenever so many "
        "seconds have passed, for proxies that cut silent connections; the first one commits the "
        "reply to status 200; unset: none is sent",
    )
    lengths_file: AbsolutePath | None = Field(
        None,
        description="where each gateway keeps over restarts what it has learned of answers' "
        "lengths; its rank is added to the name; unset: it learns anew",
    )
    reply_headers: bool = Field(
        True,
        description="whether replies say which engine answered (x-headway-engine) and for how "
        "long the request was held before (x-headway-held-ms)",
    )
    cors_origins: tuple[str, ...] = Field(
        (), description="web pages that may call, e.g. https://chat.example.com; * for all"
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="names beside this machine's own by which /headway/* and /metrics may be "
        "asked for where no key is needed",
    )
    metrics_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="port on which each gateway answers /metrics, /headway/* and /health for "
        "itself: this one plus the gateway's rank on its node; 0: none",
    )
    tls_cert_file: AbsolutePath | None = Field(
        None, description="PEM file of the certificate and its chain; set, clients have to use TLS"
    )
    tls_key_file: AbsolutePath | None = Field(
        None, description="PEM file of the certificate's private key, without a passphrase"
    )
    max_sequences: int = Field(
        16_384,
        ge=1,
        description="a request for more sequences (its prompts times its n) is answered 400",
    )
    max_logprob_entries: int = Field(
        50_000,
        ge=1,
        description="a request whose reply could hold more log probabilities (of tokens of the "
        "prompt or of the answer, times n), or of whose stream one event could, is answered 400; "
        "writing so many takes an engine up to 0.7 s",
    )
    stream_window_bytes: int = Field(
        64 * 2**10,
        ge=4096,
        description="bytes of one response that may be on their way to a slow client",
    )

    @property
    def num_replicas(self) -> int:
        """The number of gateways. Raises `ValueError` while it is auto, which the plan replaces."""
        if self.replicas == "auto":
            raise ValueError("gateway.replicas is auto: only the plan knows how many")
        return self.replicas

    @field_validator("replicas")
    @classmethod
    def _check_replicas(cls, replicas: int | Literal["auto"]) -> int | Literal["auto"]:
        if replicas != "auto" and replicas < 1:
            raise ValueError(f"{replicas} gateways cannot serve; set 1 or more, or auto")
        return replicas

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            scheme, separator, host = origin.partition("://")
            if (origin != "*" and not (scheme and separator and host)) or "/" in host:
                raise ValueError(f"{origin!r} is not of the form https://HOST[:PORT]")
        return origins

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file go together")
        if self.tls_cert_file is not None and self.front == "haproxy":
            raise ValueError("tls_cert_file: with front haproxy TLS has to end before HAProxy")
        fewest = 1 if self.replicas == "auto" else self.replicas
        if self.metrics_port and self.metrics_port + fewest > 65536:
            raise ValueError("metrics_port: leaves no port for each gateway")
        return self

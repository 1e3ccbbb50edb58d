"""How is the gateway's HTTP server configured?"""

from typing import Literal

from pydantic import Field

from serving.config.section import Section


class GatewayConfig(Section):
    """The OpenAI-compatible HTTP server."""

    front: Literal["own", "haproxy"] = Field(
        "own",
        description="own: the gateway listens itself; haproxy: Ray Serve's HAProxy in front",
    )
    host: str = Field("127.0.0.1", description="address of the gateway's own listener")
    port: int = Field(8000, ge=1, le=65535, description="port of the gateway's own listener")
    replicas: int = Field(1, ge=1, description="gateways; on one node they share the port")
    max_body_bytes: int = Field(
        16 * 2**20, ge=1024, description="a larger request body is answered 413"
    )
    max_incoming_bytes: int = Field(
        256 * 2**20,
        ge=1024,
        description="total size of request bodies that are being received, bytes; beyond it "
        "requests are answered 429",
    )
    max_connections: int = Field(
        20_000, ge=1, description="beyond this many connections requests are answered 503"
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
    stream_window_bytes: int = Field(
        64 * 2**10,
        ge=4096,
        description="bytes of one response that may be on their way to a slow client",
    )

"""What is written and sent of requests: how are logs and traces configured?"""

from typing import Literal

from pydantic import Field

from serving.config.section import AbsolutePath, Section


class LogConfig(Section):
    """Logs: of requests, and of our own processes."""

    dir: AbsolutePath | None = Field(
        None,
        description="folder for logs: each gateway's `requests-RANK.log`, a line per request, and "
        "at the end what Ray, gateways and engines have logged; unset: no line per request, and "
        "the rest is removed at the end",
    )
    format: Literal["json", "text"] = Field(
        "json", description="of a line: a JSON object, or words for people"
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="of what gateways and engines say of themselves, vLLM included"
    )
    requests: bool = Field(True, description="a line per request, where there is a folder")
    bodies: bool = Field(
        False, description="the line of a request has its whole body in it: prompts, too"
    )
    max_bytes: int = Field(
        100 * 2**20, ge=4096, description="size at which a log of requests is put aside, bytes"
    )
    num_kept: int = Field(4, ge=1, description="logs of requests put aside that are kept")


class TracingConfig(Section):
    """Traces by OpenTelemetry; needs the extra `tracing`, which comes with vLLM."""

    endpoint: str | None = Field(
        None,
        description="URL of an OTLP receiver over HTTP, e.g. http://localhost:4318/v1/traces; "
        "unset: no traces. Other `OTEL_…` variables are the exporter's",
    )
    sample_ratio: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of requests that are traced; one with a `traceparent` goes by that",
    )
    service_name: str = Field("headway", description="`service.name` of the spans")

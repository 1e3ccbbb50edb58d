"""Which responses are stored, where, and for how long?"""

from pydantic import Field, SecretStr

from serving.config.section import Section


class CacheConfig(Section):
    """Responses to deterministic requests, stored to answer the same requests again."""

    enabled: bool = Field(False, description="answer repeated deterministic requests from a cache")
    ttl_s: float = Field(3600.0, gt=0, description="time that a response is stored, seconds")
    max_bytes: int = Field(
        256 * 2**20,
        ge=2**16,
        description="bound in memory, including responses that are still arriving",
    )
    max_entry_bytes: int = Field(
        4 * 2**20,
        ge=1024,
        description="a larger response is neither stored nor shared between requests",
    )
    tools: bool = Field(False, description="whether requests with tools are cached too")
    revision: str = Field(
        "", description="part of every key: with a new value no stored response is found"
    )
    redis_url: SecretStr | None = Field(
        None,
        description="store responses in this Redis, shared by gateways and bounded "
        "by its own maxmemory, e.g. redis://:password@host:6379/0; unset: in each gateway's memory",
    )

"""Who may use the service, and how much of it?"""

from typing import Self

from pydantic import Field, model_validator

from router import RequestClass
from serving.config.section import AbsolutePath, Section


class AuthConfig(Section):
    """Who may use the service."""

    keys_file: AbsolutePath | None = Field(
        None,
        description="file of API keys, made by `headway key create`; unset: nobody needs a key. "
        "With several nodes it must be at this path on each that runs a gateway",
    )
    open_metrics: bool = Field(False, description="whether /metrics needs no admin key")
    share_prefix_cache: bool = Field(
        False,
        description="whether prompts of one tenant may begin with what an engine has computed for "
        "another: faster where they do, but usage and times tell that somebody sent the same",
    )


class TenantConfig(Section):
    """One tenant: what it may ask for, and how much. An unset limit does not limit."""

    requests_per_min: float | None = Field(None, ge=1, description="requests per minute")
    tokens_per_min: float | None = Field(
        None, gt=0, description="prompt and output tokens per minute"
    )
    max_concurrent_requests: int | None = Field(
        None, ge=1, description="requests at the same time, including held ones"
    )
    weight: float = Field(
        1.0, gt=0, description="share of tokens under overload, relative to other tenants"
    )
    models: frozenset[str] | None = Field(None, description="models allowed; unset: all")
    classes: tuple[RequestClass, ...] | None = Field(
        None, min_length=1, description="classes allowed; unset: all"
    )
    default_class: RequestClass | None = Field(
        None,
        description="class of requests that name none; unset: router.default_class if it is "
        "allowed, else the first of `classes`",
    )

    @model_validator(mode="after")
    def _check_default_class(self) -> Self:
        if self.classes and self.default_class and self.default_class not in self.classes:
            raise ValueError("default_class is not among classes")
        return self

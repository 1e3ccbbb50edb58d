"""Where are batches kept, and how much may they take? OpenAI's Batch API."""

from typing import Self

from pydantic import Field, model_validator

from serving.config.section import AbsolutePath, Section


class BatchConfig(Section):
    """Files of requests that are answered when engines have room for them."""

    dir: AbsolutePath | None = Field(
        None,
        description="folder for batches and their files, which all gateways share: on a disk of "
        "their node, not on a network's; unset: there is no /v1/files and no /v1/batches",
    )
    max_bytes: int = Field(
        10 * 2**30,
        ge=2**20,
        description="bound of all files together, bytes; beyond it uploads are answered 413 and "
        "batches wait, once what has ended is removed",
    )
    max_file_bytes: int = Field(
        200 * 2**20, ge=1024, description="a larger upload is answered 413, bytes"
    )
    max_lines: int = Field(
        50_000, ge=1, description="a batch of more requests fails in its validation"
    )
    keep_s: float = Field(
        30 * 86_400.0,
        gt=0,
        description="files, and batches that have ended, are removed after so long, seconds; the "
        "oldest before that where max_bytes is reached",
    )
    max_inflight: int | None = Field(
        None,
        ge=1,
        description="requests of batches that a gateway has open at a time; unset: as many as "
        "engines take, and a few that wait",
    )
    max_slowdown: float = Field(
        0.05,
        gt=0,
        le=10,
        description="share of the engines' time that batches may take while others have requests "
        "open",
    )

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.max_file_bytes > self.max_bytes:
            raise ValueError("max_file_bytes: is more than max_bytes")
        return self

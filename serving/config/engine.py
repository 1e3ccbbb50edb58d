"""How is one engine configured?"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from serving.config.section import AbsolutePath, Section

_VLLM = "serving.engine.vllm.engine:VllmEngine"
_EMULATED = "serving.engine.emulated.engine:EmulatedEngine"


class EngineConfig(Section):
    """One engine replica. The value `emulated` alone means an emulated engine."""

    factory: str = Field(
        _VLLM,
        description="module:class of the engine",
    )
    args: dict[str, Any] = Field(
        default_factory=dict,
        description="vLLM engine arguments by their Python names, e.g. max_model_len; "
        "they override what Headway would set",
    )
    itl_target_s: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(
        "auto",
        description="longest time between two tokens of a reply that the prompts of others should "
        "cause, seconds: a step prefills no more than fits into it; shorter is smoother and makes "
        "long prompts wait; auto: 0.15 on GPUs, null on CPUs, where a step takes longer; null: "
        "as much as max_num_batched_tokens lets it",
    )
    start_timeout_s: float = Field(900.0, gt=0, description="time for engines to start, seconds")
    hang_timeout_s: float = Field(
        30.0,
        gt=0,
        description="an engine whose core has not answered between two steps for this long is "
        "restarted, seconds; must be longer than the longest step and any compilation",
    )
    block_timeout_s: float = Field(
        120.0,
        gt=0,
        description="an engine whose API layer has been busy with one thing for this long, and "
        "answers nobody else, is restarted, seconds",
    )
    max_growth_bytes: Annotated[int, Field(gt=0)] | Literal["auto"] | None = Field(
        "auto",
        description="an engine core that takes so much more memory than when it was ready is "
        "killed and restarted, bytes; auto: its share of an eighth of the node's memory, at least "
        "1 GiB; null: no bound",
    )
    tls: Literal["auto", "on", "off"] = Field(
        "auto",
        description="whether gateways and engines encrypt what they say to each other; auto: where "
        "engines listen on a network's address and not on loopback",
    )
    grammar_timeout_s: float = Field(
        3.0,
        gt=0,
        description="a request whose structured output takes longer to compile, in processor "
        "time, is answered 400, seconds",
    )
    grammar_max_bytes: int = Field(
        256 * 2**20,
        ge=2**20,
        description="a request whose structured output takes more memory to compile is answered "
        "400, bytes",
    )
    step_log: AbsolutePath | None = Field(
        None,
        description="folder in which every replica writes a file with one line of JSON per step of "
        "its engine, for the study of step times; it grows without bound",
    )
    drain_timeout_s: float = Field(
        60.0, ge=0, description="time for running streams to finish on shutdown, seconds"
    )

    @property
    def is_ours(self) -> bool:
        """Whether the engine serves its model by the names that it is configured with."""
        return self.factory in (_VLLM, _EMULATED)

    @property
    def is_vllm(self) -> bool:
        """Whether it is vLLM, which needs a model and memory for it."""
        return self.factory == _VLLM

    @property
    def is_emulated(self) -> bool:
        """Whether it is an emulation, by a profile."""
        return self.factory == _EMULATED

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, section: Any) -> Any:
        return {"factory": _EMULATED} if section == "emulated" else section

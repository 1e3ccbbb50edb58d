"""What can an engine hold, and what do its steps cost? The numbers of one kind of engine."""

from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from router.simulation.engine.step_cost import StepCost

_MEMORY_TERMS = ("base_s", "floor_s", "s_per_decode_req", "s_per_context_token")
_COMPUTE_TERMS = ("s_per_token", "s_per_prefill_pair")


@dataclass(frozen=True, slots=True)
class StepTimeFactors:
    """How many times as long a machine takes as it did when the profile was measured.

    Both drift on a shared machine with its other load, memory by a third and computing by less
    (docs/simulator.md).
    """

    memory: float  # to read weights and KV cache
    compute: float  # for what each token adds


class Profile(BaseModel):
    """One engine: vLLM's limits by vLLM's names, and the terms of a scheduler step's time.

    A step's matrix products take the longer of reading the weights (`floor_s`) and computing its
    tokens, prefilled and decoded alike (roofline; Williams et al. 2009). Attention adds terms that
    grow with context. The formula is in `StepCost`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    model: str = Field(description="the model that was measured")
    device: str = Field(description="the hardware, in words")
    source: str = Field(description="where the numbers come from: measured how, when, on what")

    max_model_len: int = Field(ge=1, description="tokens, prompt and output together")
    max_num_seqs: int = Field(ge=1, description="sequences in one step")
    max_num_batched_tokens: int = Field(ge=1, description="token budget of one step")
    max_prefill_chunk: int = Field(
        0,
        ge=0,
        description="of that, what one prompt may take while others wait, if the engine is told "
        "so (`long_prefill_token_threshold`); 0: all",
    )
    num_kv_tokens: int = Field(ge=1, description="capacity of the KV cache")
    block_size: int = Field(16, ge=1, description="tokens per KV block")
    start_s: float = Field(60.0, ge=0, description="from start to ready")
    path_s: float = Field(
        0.0005,  # loopback, measured
        ge=0,
        description="of a request's time to first token, what is spent outside of any step: on "
        "its way there and back",
    )

    base_s: float = Field(ge=0, description="of every step")
    s_per_token: float = Field(ge=0, description="of each token in it")
    floor_s: float = Field(0.0, ge=0, description="no step is shorter: the weights are read")
    s_per_decode_req: float = Field(0.0, ge=0, description="more for each decoding sequence")
    s_per_context_token: float = Field(0.0, ge=0, description="of KV read by decoding sequences")
    s_per_prefill_pair: float = Field(
        0.0, ge=0, description="attention of a prefill: its tokens times those before each"
    )
    noise: float = Field(
        0.0, ge=0, le=0.3, description="standard deviation of a step's time, relative to it"
    )
    contention: float = Field(
        0.0,
        ge=0,
        description="how much longer a step takes, as a share of it, while all other engines of "
        "the machine step too: those that share its cores and memory, not GPUs",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_kv_tokens // self.block_size * self.block_size < self.max_model_len:
            raise ValueError("num_kv_tokens: less than max_model_len, as vLLM too refuses")
        if self.step_cost.step_s(1, 0, 0, 0.0) <= 0.0:
            raise ValueError("base_s, s_per_token, floor_s: a step would take no time")
        return self

    @property
    def num_kv_blocks(self) -> int:
        return self.num_kv_tokens // self.block_size

    @property
    def step_cost(self) -> StepCost:
        """What its steps take; ask once for many steps."""
        return StepCost(
            base_s=self.base_s,
            floor_s=self.floor_s,
            s_per_token=self.s_per_token,
            s_per_decode_req=self.s_per_decode_req,
            s_per_context_token=self.s_per_context_token,
            s_per_prefill_pair=self.s_per_prefill_pair,
        )

    def slowed(self, by: StepTimeFactors) -> "Profile":
        """Return the same engine on a machine whose steps take so many times as long."""
        factors = dict.fromkeys(_MEMORY_TERMS, by.memory)
        factors |= dict.fromkeys(_COMPUTE_TERMS, by.compute)
        return self.model_copy(
            update={name: factor * getattr(self, name) for name, factor in factors.items()}
        )

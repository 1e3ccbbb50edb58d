"""What users were promised, and which requests got it."""

from dataclasses import dataclass

import numpy as np

from router.settings import RouterSettings
from router.simulation.journal import Run


@dataclass(frozen=True)
class Slo:
    """A first token in time, and then a steady flow: both, or the reply does not count.

    Goodput as in DistServe (Zhong et al., OSDI 2024).
    """

    ttft_s: float | None = None  # unset: as the router promises, by the size of the prompt
    tpot_s: float = 0.05  # 20 tokens/s, about four times as fast as people read

    def promised_ttft_s(self, run: Run) -> np.ndarray:
        """Return the time to first token that each request was promised, [num_requests]."""
        if self.ttft_s is not None:
            return np.full(len(run), self.ttft_s)
        defaults = RouterSettings()
        return (
            defaults.ttft_target_base_s + defaults.ttft_target_s_per_token * run.num_prompt_tokens
        )

    def met(self, run: Run) -> np.ndarray:
        """Return which requests got what was promised, [num_requests]; none that failed."""
        first = run.ttft_s <= self.promised_ttft_s(run)  # false for nan
        flow = (run.tpot_s <= self.tpot_s) | (run.num_output_tokens < 2)
        return run.completed & first & flow

    def __str__(self) -> str:
        ttft = "the router's promise" if self.ttft_s is None else f"{self.ttft_s:g} s"
        return f"TTFT within {ttft}, TPOT within {self.tpot_s:g} s"

"""When does a breaker open, and how much may be retried?"""

from pydantic import BaseModel, ConfigDict, Field


class BreakerSettings(BaseModel):
    """When a breaker opens, for how long, and how it closes again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_consecutive_failures: int = Field(5, ge=1, description="this many in a row open it")
    max_consecutive_timeouts: int = Field(
        2, ge=1, description="the same for timeouts, each of which has cost a client much more"
    )
    window_s: float = Field(30.0, gt=0, description="calls older than this are forgotten, seconds")
    window_calls: int = Field(100, ge=1, description="as are all but the last so many")
    min_calls: int = Field(10, ge=1, description="shares of fewer calls say nothing")
    max_failure_share: float = Field(0.5, gt=0, le=1, description="failed share that opens it")
    max_slow_share: float = Field(0.8, gt=0, le=1, description="slow share that opens it")
    slow_factor: float = Field(
        5.0, gt=1, description="a call is slow if it takes so many times what was predicted"
    )
    slow_floor_s: float = Field(
        2.0, ge=0, description="but never if it takes less than this, seconds"
    )
    cooldown_s: float = Field(1.0, gt=0, description="open for so long at first, seconds")
    max_cooldown_s: float = Field(
        60.0, gt=0, description="bound of the cooldown, which doubles with each failed probe"
    )
    cooldown_jitter: float = Field(
        0.25, ge=0, description="cooldowns are drawn up to this share longer"
    )
    slow_start_s: float = Field(
        10.0, ge=0, description="from the first call after a probe to full traffic, seconds"
    )

    def is_slow(self, actual_s: float, predicted_s: float) -> bool:
        """Whether a first token, or the gap between two, came far later than predicted."""
        return actual_s > max(self.slow_floor_s, self.slow_factor * predicted_s)


class RetryBudgetSettings(BaseModel):
    """How much may be retried."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: float = Field(0.2, ge=0, description="retries per request, in the long run")
    reserve_per_s: float = Field(1.0, ge=0, description="and so many a second beside")
    max_balance: float = Field(
        100.0, ge=0, description="retries that can be saved up, and are there at the start"
    )

"""How many engines a model may have, and what is promised; the same names in YAML and in code."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ScalingSettings(BaseModel):
    """Bounds, aim and pace of a model's autoscaling."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: int = Field(1, ge=0, description="engines that always run; 0: none while nobody asks")
    max: int = Field(ge=1, description="engines at most")
    initial: int | None = Field(None, ge=0, description="engines at the start; unset: min, or 1")
    goodput: float = Field(
        0.9,
        gt=0.5,
        lt=1.0,
        description="share of the work that shall find room at once, by how far forecasts were "
        "off: higher takes more engines",
    )
    max_load: float = Field(
        0.6,
        gt=0.0,
        lt=1.0,
        description="load of an engine up to which it keeps promises; time per token is 1 / (1 - "
        "load) times that of an idle one",
    )
    start_s: float = Field(
        60.0, ge=0, description="time for an engine to start, seconds, until it has been measured"
    )
    season_s: float = Field(
        86_400.0, ge=0, description="period in which demand repeats, seconds; 0: it does not"
    )
    keep_s: float | None = Field(
        None,
        ge=0,
        description="an engine is kept so long after it was last needed, seconds; unset: as long "
        "as one takes to start, at least 60",
    )
    zero_after_s: float = Field(
        300.0, ge=0, description="with min 0: the last engine stops after so long without a request"
    )

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min: {self.min} engines are more than max allows, {self.max}")
        if self.initial is not None and not self.min <= self.initial <= self.max:
            raise ValueError(f"initial: {self.initial} is not between min and max")
        return self

    @property
    def num_initial(self) -> int:
        """Engines at the start."""
        return self.initial if self.initial is not None else self.min

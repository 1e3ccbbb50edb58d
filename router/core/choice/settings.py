"""Routes that choose a model: the same names in YAML and in code."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from router.types import RequestClass

# What is told in headers has to be plain.
_Name = Annotated[str, StringConstraints(pattern=r"^[!-~]([ -~]*[!-~])?$", max_length=200)]
# What the wording of an instruction may ask for: `serving.gateway.intake.length.cues`.
Cue = Literal[
    "one word",
    "one sentence",
    "brief",
    "few",
    "classify",
    "fill",
    "fact",
    "edit",
    "extract",
    "summary",
    "list",
    "explain",
    "compose",
    "long",
    "code",
    "format",
]
# What else can be seen of a prompt without knowing what it means.
Trait = Literal[
    "question",
    "code block",
    "not Latin",
    "system prompt",
    "second turn",
    "later turn",
    "json",
    "tools",
    "stop",
    "low effort",
    "high effort",
    "images",
    "audio",
    "video",
]
Input = Literal["tools", "images", "audio", "video"]
Preference = Literal["best", "cheapest", "fastest"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WhenSettings(_Section):
    """For which prompts a rule is: all that is said has to hold, of a list any."""

    asks: frozenset[Cue] | None = Field(
        None, description="what the instruction asks for, by its wording"
    )
    has: frozenset[Trait] | None = Field(None, description="what the request has, or is")
    has_not: frozenset[Trait] | None = Field(None, description="nothing of this")
    min_prompt_tokens: int | None = Field(None, ge=0, description="as estimated")
    max_prompt_tokens: int | None = Field(None, ge=0, description="as estimated")
    tenants: frozenset[str] | None = Field(None, description="whose key it is")
    classes: frozenset[RequestClass] | None = Field(None, description="how urgent it is")


class RuleSettings(_Section):
    """A row of the table."""

    name: _Name | None = Field(None, description="by which replies name it; unset: its number")
    when: WhenSettings | None = Field(
        None, description="unset: for all prompts, as the last one has to be"
    )
    models: tuple[_Name, ...] = Field(
        (), description="which may answer, by the names of the route's `models`; empty: all"
    )
    prefer: Preference = Field(
        "best",
        description="best: the highest quality; cheapest: the lowest cost; fastest: the earliest "
        "predicted end. Of those whose first token is predicted in time",
    )
    max_ttft_s: float | None = Field(
        None,
        gt=0,
        description="in time is within so long, seconds; unset: the TTFT target of the request's "
        "class and model",
    )


class ModelChoiceSettings(_Section):
    """A model as a route sees it, thinking or not."""

    model: _Name | None = Field(
        None, description="the name by which clients would ask for it; unset: the key"
    )
    quality: float = Field(1.0, description="higher is better; only the order counts")
    cost: float = Field(1.0, ge=0, description="lower is cheaper; only the order counts")
    takes: frozenset[Input] | None = Field(
        None, description="of tools, images, audio and video what it takes; unset: all"
    )
    thinking: bool | None = Field(
        None,
        description="sets `chat_template_kwargs.enable_thinking`, unless the client says itself "
        "how much to think; unset: as the model does",
    )


class RouteSettings(_Section):
    """What stands behind one name that clients ask for as if it were a model."""

    models: dict[_Name, ModelChoiceSettings] = Field(
        min_length=1, description="the models that it chooses among, by name"
    )
    rules: tuple[RuleSettings, ...] = Field(
        (RuleSettings(),),
        min_length=1,
        description="the first one that holds counts; unset: the best of all models",
    )
    explore: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the requests that any model which may answer gets at random, so that "
        "answers can be compared",
    )

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        for index, rule in enumerate(self.rules):
            if unknown := [name for name in rule.models if name not in self.models]:
                raise ValueError(
                    f"rules.{index}.models: {unknown[0]!r} is none of the route's models "
                    f"({', '.join(self.models)})"
                )
        if self.rules[-1].when is not None:
            raise ValueError(
                "rules: the last one has to be without `when`, so that no prompt is left over"
            )
        return self

    @property
    def model_names(self) -> list[str]:
        """The models that it may choose, by the names by which clients would ask for them."""
        return [each.model or name for name, each in self.models.items()]

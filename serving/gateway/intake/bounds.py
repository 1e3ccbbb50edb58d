"""Can any model do this, and would its reply be small enough to be written in one go?

Asked before anything is booked: a number beyond all sense must reach neither a tenant's bucket nor
the router's sums. What passes may still be refused by vLLM.
"""

from serving.gateway.http.errors import ApiError
from serving.gateway.intake.fields import CompletionFields, Fields
from serving.gateway.intake.prompt_size import PromptSize
from serving.gateway.intake.served_models import Capacity

# Where an engine does not say: the largest vocabulary in use (Gemma 3).
_MAX_VOCABULARY = 262_144
# So many log probabilities of a prompt, or of a completion, take vLLM no longer than one of a chat
# (vLLM 0.32 on a Zen 4 core: 3.9 and 1.6 µs to 14.3).
_CHEAPER = 3


def check_numbers(
    fields: Fields, size: PromptSize, capacity: Capacity | None, *, max_sequences: int
) -> None:
    """Raise `ApiError` 400, in vLLM's words, for numbers that no engine of the model can use.

    Without a `capacity` it is not known yet how long a reply may be.
    """
    if not fields.generates:
        return
    _check_at_least("n", fields.num_choices, 1)
    if (num_sequences := size.num_prompts * fields.num_choices) > max_sequences:
        raise ApiError(
            400,
            f"{num_sequences} sequences (n of each prompt) are more than gateway.max_sequences "
            f"({max_sequences}).",
            param="n",
        )
    name, limit = fields.output_limit
    _check_at_least("min_tokens", fields.least_tokens, 0)
    for field, number in (
        (fields.logprobs_field, fields.num_token_logprobs),
        ("prompt_logprobs", fields.num_prompt_logprobs),
    ):
        if number is not None:
            _check_at_least(field, number, -1)
    if limit is None:
        return
    _check_at_least(name, limit, 1)
    if capacity is not None and limit > capacity.longest_context:
        raise ApiError(
            400,
            f"{name}={limit} cannot be greater than max_model_len={capacity.longest_context}. "
            "Please request fewer output tokens.",
            param=name,
        )
    if fields.least_tokens > limit:
        raise ApiError(
            400,
            f"min_tokens must be less than or equal to {name}={limit}, got {fields.least_tokens}.",
            param="min_tokens",
        )


def check_logprobs(
    fields: Fields, size: PromptSize, capacity: Capacity | None, *, max_entries: int
) -> int | None:
    """Return which limit of tokens a reply without one must get for its log probabilities.

    None if none. vLLM writes a whole reply, or one event of a stream, in one go, and its engine
    does nothing else meanwhile. Raise `ApiError` 400 where that would take longer than
    `max_entries` of a chat do.
    """
    is_chat = not isinstance(fields, CompletionFields)
    per_token = float(_num_entries(fields.num_token_logprobs, capacity))
    per_token *= size.num_prompts * fields.num_choices / (1.0 if is_chat else _CHEAPER)
    of_prompt = _num_entries(fields.num_prompt_logprobs, capacity) * size.num_tokens / _CHEAPER
    if not is_chat:
        of_prompt *= fields.num_choices  # each choice says them all
    if not (per_token or of_prompt):
        return None
    name, limit = fields.output_limit
    if fields.is_stream:  # vLLM refuses those of the prompt
        _check_entries(fields.logprobs_field, per_token, max_entries)
        return None
    _check_entries("prompt_logprobs", of_prompt, max_entries)
    if not per_token:
        return None
    of_answer = per_token * (1 if limit is None else limit)
    advice = f", set a lower {name} or stream"
    _check_entries(fields.logprobs_field, of_prompt + of_answer, max_entries, advice)
    most = int((max_entries - of_prompt) / per_token)
    # Past the context vLLM would refuse it, and nothing needs it.
    if limit is None and capacity is not None and most < capacity.shortest_context:
        return most
    return None


def _num_entries(num_logprobs: int | None, capacity: Capacity | None) -> int:
    """Return how many log probabilities a token gets, its own one included."""
    if num_logprobs is None:
        return 0
    if num_logprobs >= 0:
        return num_logprobs + 1
    return capacity.vocab_size if capacity and capacity.vocab_size else _MAX_VOCABULARY


def _check_at_least(field: str, number: int, least: int) -> None:
    if number < least:
        raise ApiError(400, f"{field} must be at least {least}, got {number}.", param=field)


def _check_entries(field: str, num_entries: float, max_entries: int, advice: str = "") -> None:
    if num_entries > max_entries:
        raise ApiError(
            400,
            "The reply could hold more log probabilities than can be written in one go "
            f"(gateway.max_logprob_entries, {max_entries}): ask for fewer of each token{advice}.",
            param=field,
        )

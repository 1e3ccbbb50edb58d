r"""How many engines does a rate of tokens need?

An engine that gets λ requests per second, each with P tokens to prefill and O to decode, takes
steps of

    T = step_base_s + token_s * λ P T + decode_s * n,    n = λ O T   (Little: a token is a step)
      = step_base_s / (1 - load),                        load = λ (P token_s + O decode_s)

so its load says by how much the time per token is above that of an idle engine, and from a load of
1 on nothing ends any more. What the KV cache must hold, n sequences of the mean context, follows,
too. All rates are learned from the engines' own steps (`router.estimators.step_time`).
"""

from router.scaling.demand import EngineRates

# vLLM preempts when its cache is full, and what is cached for others is lost long before.
_MAX_KV_USAGE = 0.8


def load_of(rates: EngineRates, prefill_tokens_per_s: float, decode_tokens_per_s: float) -> float:
    """Return the load in engines: seconds of an engine's time per second, steps' base aside."""
    return prefill_tokens_per_s * rates.token_s + decode_tokens_per_s * rates.decode_s


def engines_for(
    rates: EngineRates,
    load: float,
    decode_tokens_per_s: float,
    context_tokens: float,
    max_load: float,
) -> float:
    """Return how many engines a load needs so that none has more than `max_load`, 0 to below 1.

    `context_tokens`: of one sequence while it decodes, on average. A fraction: the caller rounds.
    """
    by_load = load / max_load
    # Sequences that decode at once, at that load.
    num_decoding = decode_tokens_per_s * rates.step_base_s / (1.0 - max_load)
    by_kv = num_decoding * context_tokens / (_MAX_KV_USAGE * max(1, rates.num_kv_tokens))
    return max(by_load, by_kv)

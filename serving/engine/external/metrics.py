"""What do the metrics of a server say of its scheduler? vLLM's, in Prometheus's text format.

Only a dozen series of vLLM's thousand lines are asked for (`name[]`, which the application of
prometheus-client takes): the server writes them on the event loop that serves tokens. A server
that does not know `name[]` sends all, and the lines are looked for.
"""

import re

import msgspec

_LINE = re.compile(r"^(vllm:\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_CONFIG = "vllm:cache_config_info"
_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")  # the latter until 0.9
_NAMES = {
    "vllm:num_requests_running": "num_running",
    "vllm:num_requests_waiting": "num_waiting",
    "vllm:prompt_tokens_total": "num_prompt_tokens",
    "vllm:prompt_tokens_cached_total": "num_cached_tokens",
    "vllm:generation_tokens_total": "num_output_tokens",
    "vllm:prefix_cache_queries_total": "num_prefix_queries",
    "vllm:prefix_cache_hits_total": "num_prefix_hits",
    "vllm:num_preemptions_total": "num_preemptions",
    "vllm:iteration_tokens_total_count": "num_steps",
    "vllm:time_to_first_token_seconds_count": "num_first_tokens",
    "vllm:request_prefill_time_seconds_sum": "prefill_s",
    "vllm:request_prefill_kv_computed_tokens_sum": "num_prefilled_tokens",
}
# With the slash it is prometheus-client's application that answers; without it, another one.
PATH = "/metrics/?" + "&".join(f"name[]={name}" for name in (*_NAMES, *_USAGE))
PATH_OF_ALL = "/metrics"
PATH_OF_CONFIG = f"/metrics/?name[]={_CONFIG}"


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """What a server tells, over all its engines. Counters grow from its start."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0  # 0-1, the mean of its engines
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of these, not computed
    num_output_tokens: int = 0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    num_first_tokens: int = 0
    prefill_s: float = 0.0  # that the prompts of requests took which have ended
    num_prefilled_tokens: int = 0  # of these prompts, not cached

    @property
    def prefill_tokens_per_s(self) -> float:
        """Its rate of prefill since its start, as one prompt sees it; 0: not known."""
        return self.num_prefilled_tokens / self.prefill_s if self.prefill_s > 0.0 else 0.0

    @property
    def num_computed_tokens(self) -> int:
        """Tokens of prompts that were computed."""
        return max(0, self.num_prompt_tokens - self.num_cached_tokens)

    @property
    def mean_prompt_tokens(self) -> float:
        """Tokens of a prompt, on average since its start; 0 if there was none."""
        return self.num_prompt_tokens / self.num_first_tokens if self.num_first_tokens else 0.0


class CacheSize(msgspec.Struct, frozen=True):
    """How large the KV cache is, over all engines of the server."""

    num_tokens: int
    block_size: int


def read_metrics(text: str) -> Metrics | None:
    """Return what the text says; None if it has none of vLLM's series."""
    sums: dict[str, float] = {}
    usages: list[float] = []
    for name, _, value in _LINE.findall(text):
        if (field := _NAMES.get(name)) is not None:
            sums[field] = sums.get(field, 0.0) + _number(value)
        elif name in _USAGE:
            usages.append(_number(value))
    if not sums:
        return None
    prefill_s = sums.pop("prefill_s", 0.0)
    numbers = {field: int(value) for field, value in sums.items()}
    usage = sum(usages) / len(usages) if usages else 0.0
    return Metrics(kv_cache_usage=min(1.0, max(0.0, usage)), prefill_s=prefill_s, **numbers)


def read_cache_size(text: str) -> CacheSize | None:
    """Return the size of the KV cache; None if the text does not say it."""
    num_tokens = block_size = 0
    for name, labels, _ in _LINE.findall(text):
        if name == _CONFIG:
            said = dict(_LABEL.findall(labels))
            try:
                block_size = int(said["block_size"])
                num_tokens += block_size * int(said["num_gpu_blocks"])
            except (KeyError, ValueError):
                return None
    return CacheSize(num_tokens, block_size) if num_tokens > 0 else None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if 0.0 <= value < 2**60 else 0.0  # neither NaN nor infinite

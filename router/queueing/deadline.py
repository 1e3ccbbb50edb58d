"""When a request's first token is promised, and whose turn that makes it."""

from router.settings import RouterSettings
from router.types import Request, RequestClass

# How far a prompt may be put behind shorter ones, in terms of the time that its prefill takes:
# eight times leaves the p99 of all first tokens within 11 % of that of first come, first
# served, the median at half, and the p99 of the shorter half of the prompts at three quarters
# (simulated, Azure code on eight H100s at 80 % load). A promise that is less stands, as on CPUs.
_MAX_SLOWDOWN = 8.0


def ttft_deadline_s(request: Request, settings: RouterSettings) -> float:
    """When its first token is due, on the clock of `request.arrival_s`, seconds.

    Whoever sends a long document expects to wait, so the promise grows with the
    prompt; interactive users expect half of it; batch work is promised so much
    later that it fills gaps only, yet as promises age it comes before fresh
    work in the end, so nothing starves (earliest deadline first).
    """
    return _ttft_deadline_s(request, settings, settings.ttft_target_s_per_token)


def edf_key_s(request: Request, settings: RouterSettings) -> float:
    """Its place in the order of service: the promise as the engines at hand would make it.

    Where they prefill far faster than promised, nobody is ever late, and the promise alone
    would be shortest first: a long prompt would wait for every burst to pass.
    """
    s_per_token = min(settings.ttft_target_s_per_token, _MAX_SLOWDOWN * request.prefill_s_per_token)
    return _ttft_deadline_s(request, settings, s_per_token)


def _ttft_deadline_s(request: Request, settings: RouterSettings, s_per_token: float) -> float:
    ttft_target_s = settings.ttft_target_base_s + s_per_token * request.num_prompt_tokens
    if request.priority_class is RequestClass.INTERACTIVE:
        ttft_target_s *= settings.ttft_target_interactive_factor
    elif request.priority_class is RequestClass.BATCH:
        ttft_target_s += settings.ttft_target_batch_s
    return request.arrival_s + ttft_target_s

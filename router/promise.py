"""When a request's first token is promised: the order in which requests are served."""

from router.settings import RouterSettings
from router.types import Request, RequestClass


def promised_s(request: Request, settings: RouterSettings) -> float:
    """When its first token is due, on the clock of `request.arrival_s`, seconds.

    Whoever sends a long document expects to wait, so the promise grows with the
    prompt; interactive users expect half of it; batch work is promised so much
    later that it fills gaps only, yet as promises age it comes before fresh
    work in the end, so nothing starves (earliest deadline first).
    """
    promise_s = settings.promise_base_s + settings.promise_s_per_token * request.num_prompt_tokens
    if request.priority_class is RequestClass.INTERACTIVE:
        promise_s *= settings.promise_interactive_factor
    elif request.priority_class is RequestClass.BATCH:
        promise_s += settings.promise_batch_s
    return request.arrival_s + promise_s

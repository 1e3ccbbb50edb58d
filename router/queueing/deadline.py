"""When is a request's first token due, and where does that place it in the order of service?"""

from typing import Final

from router.core.settings import RouterSettings
from router.types import Request, RequestClass

# How far a prompt may be put behind shorter ones, in terms of the time that its prefill takes.
# First come, first served (0) is best for long prompts, shortest first (infinite) for short ones;
# docs/routing.md has figures. Where the TTFT target is less than that, as on CPUs, it counts.
_MAX_SLOWDOWN = 1.5

# Looked up once: a member of an enumeration costs 0.1 µs each time (Python 3.11).
_INTERACTIVE: Final = RequestClass.INTERACTIVE
_BATCH: Final = RequestClass.BATCH


def ttft_deadline_s(request: Request, settings: RouterSettings) -> float:
    """Return when the first token is due, seconds on the clock of `request.arrival_s`.

    The TTFT target grows with the prompt, because whoever sends a long document
    expects to wait. Interactive requests have half of it. Batch work is due so much
    later that it only fills gaps.
    """
    return _ttft_deadline_s(request, settings, _target_s_per_token(request, settings))


def edf_key_s(request: Request, settings: RouterSettings) -> float:
    """Return the place in the order of service: lower is earlier, seconds on the same clock.

    Earliest deadline first (Liu and Layland 1973): deadlines only come nearer, so nothing
    starves. The deadline is one that suits the engines at hand. Where they prefill far
    faster than the TTFT target asks for, nobody is ever late, and the target alone would mean
    shortest first: a long prompt would wait until every burst has passed. A client's own
    priority puts its request off, or forward.
    """
    return unshifted_edf_key_s(request, settings) + request.put_off_s


def unshifted_edf_key_s(request: Request, settings: RouterSettings) -> float:
    """Return the place that a request would have without its client's own priority."""
    target_s_per_token = _target_s_per_token(request, settings)
    s_per_token = min(target_s_per_token, _MAX_SLOWDOWN * request.prefill_s_per_token)
    return _ttft_deadline_s(request, settings, s_per_token)


def engine_put_off_s(request: Request) -> float:
    """Return by how much a client's own priority puts its request off inside an engine.

    There the requests of all tenants are in one order: none comes forward at others' expense.
    """
    return max(0.0, request.put_off_s) if request.tenant else request.put_off_s


def _target_s_per_token(request: Request, settings: RouterSettings) -> float:
    own = request.ttft_target_s_per_token
    return settings.ttft_target_s_per_token if own is None else own


def _ttft_deadline_s(request: Request, settings: RouterSettings, s_per_token: float) -> float:
    own = request.ttft_target_base_s
    base_s = settings.ttft_target_base_s if own is None else own
    ttft_target_s = base_s + s_per_token * request.num_prompt_tokens
    if request.priority_class is _INTERACTIVE:
        ttft_target_s *= settings.ttft_target_interactive_factor
    elif request.priority_class is _BATCH:
        ttft_target_s += settings.ttft_target_batch_s
    return request.arrival_s + ttft_target_s

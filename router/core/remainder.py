"""What is asked for when an attempt at a request has broken off: the rest of its reply.

What was generated joins the prompt, whose text blocks then cover less of it.
"""

import msgspec

from router.types import Request


def retried(
    request: Request, replica_id: str, num_output_tokens: int, now_s: float, *, has_begun: bool
) -> Request:
    """The request after this engine generated so many tokens that another has to prefill."""
    return msgspec.structs.replace(
        _grown(request, num_output_tokens),
        tried=(*request.tried, replica_id),
        num_stuck=1 if num_output_tokens > 0 else request.num_stuck + 1,
        retried_s=now_s,
        has_begun=has_begun,
    )


def continued(request: Request, num_output_tokens: int) -> Request:
    """A request for the rest of a reply of which a provider has sent so many tokens."""
    most = request.max_output_tokens
    return msgspec.structs.replace(
        _grown(request, num_output_tokens),
        max_output_tokens=None if most is None else max(1, most - num_output_tokens),
        has_begun=True,
    )


def _grown(request: Request, num_output_tokens: int) -> Request:
    num_prompt_tokens = request.num_prompt_tokens + num_output_tokens
    prefix_tokens_each = request.prefix_block_share * request.num_prompt_tokens
    return msgspec.structs.replace(
        request,
        num_prompt_tokens=num_prompt_tokens,
        prefix_block_share=prefix_tokens_each / max(1, num_prompt_tokens),
    )

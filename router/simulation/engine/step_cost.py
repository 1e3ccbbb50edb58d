"""How long does a step take? A roofline with terms for attention."""


class StepCost:
    """The terms of a step's time, seconds; what each stands for is said in `Profile`.

    step_s = max(floor_s, base_s + s_per_token * (num_prefill_tokens + num_decode_reqs))
             + s_per_decode_req * num_decode_reqs
             + s_per_context_token * num_decode_context_tokens
             + s_per_prefill_pair * sum(chunk * (computed before + chunk / 2))
    """

    __slots__ = (
        "base_s",
        "floor_s",
        "s_per_context_token",
        "s_per_decode_req",
        "s_per_prefill_pair",
        "s_per_token",
    )

    def __init__(
        self,
        *,
        base_s: float,
        floor_s: float,
        s_per_token: float,
        s_per_decode_req: float,
        s_per_context_token: float,
        s_per_prefill_pair: float,
    ) -> None:
        self.base_s = base_s
        self.floor_s = floor_s
        self.s_per_token = s_per_token
        self.s_per_decode_req = s_per_decode_req
        self.s_per_context_token = s_per_context_token
        self.s_per_prefill_pair = s_per_prefill_pair

    def step_s(
        self,
        num_prefill_tokens: int,
        num_decode_reqs: int,
        num_decode_context_tokens: int,
        num_prefill_pairs: float,
    ) -> float:
        """Return the expected duration of a step, seconds, without noise."""
        products_s = self.base_s + self.s_per_token * (num_prefill_tokens + num_decode_reqs)
        if products_s < self.floor_s:
            products_s = self.floor_s
        return (
            products_s
            + self.s_per_decode_req * num_decode_reqs
            + self.s_per_context_token * num_decode_context_tokens
            + self.s_per_prefill_pair * num_prefill_pairs
        )

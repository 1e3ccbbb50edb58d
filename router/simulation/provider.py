"""When does a simulated provider answer, and when does it refuse?"""

import random
from collections import deque

from router.limits.rate_limit import RateReport
from router.providers.settings import ProviderSettings

_MINUTE_S = 60.0


class ProviderModel:
    """Log-normal times to first token, then even gaps; limits as sliding windows of a minute.

    A request counts when it arrives, with its prompt and all of its output.
    """

    def __init__(
        self,
        settings: ProviderSettings,
        rng: random.Random,
        *,
        ttft_s: float,
        ttft_sigma: float,
        tpot_s: float,
        rpm: int,
        tpm: int,
    ) -> None:
        self.settings = settings
        self.num_refused = 0
        self.num_answered = 0
        self.cost = 0.0
        self._rng = rng
        self._ttft_s, self._ttft_sigma, self._tpot_s = ttft_s, ttft_sigma, tpot_s
        self._rpm, self._tpm = rpm, tpm
        self._log: deque[tuple[float, int]] = deque()
        self._num_tokens = 0

    def answer_request(
        self, num_prompt_tokens: int, num_output_tokens: int, now_s: float
    ) -> tuple[tuple[float, float] | None, RateReport]:
        """Answer a request or refuse it. Return its times and the rate limit headers.

        The times are seconds to the first token and from there to the end; None for a 429.
        """
        while self._log and self._log[0][0] <= now_s - _MINUTE_S:
            self._num_tokens -= self._log.popleft()[1]
        num_tokens = num_prompt_tokens + num_output_tokens
        times_s = None
        retry_after_s = None
        if len(self._log) < self._rpm and self._num_tokens + num_tokens <= self._tpm:
            self._log.append((now_s, num_tokens))
            self._num_tokens += num_tokens
            self.num_answered += 1
            self.cost += 1e-6 * (
                self.settings.price_prompt * num_prompt_tokens
                + self.settings.price_output * num_output_tokens
            )
            first_s = self._ttft_s * self._rng.lognormvariate(0.0, self._ttft_sigma)
            times_s = (first_s, self._tpot_s * (num_output_tokens - 1))
        else:
            self.num_refused += 1
            retry_after_s = self._log[0][0] + _MINUTE_S - now_s if self._log else 1.0
        return times_s, RateReport(
            limit_requests=self._rpm,
            remaining_requests=max(0, self._rpm - len(self._log)),
            limit_tokens=self._tpm,
            remaining_tokens=max(0, self._tpm - self._num_tokens),
            retry_after_s=retry_after_s,
        )

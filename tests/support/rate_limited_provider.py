"""A provider that enforces its own rate limits."""

from collections import deque

from router.limits.rate_limit import RateReport


class Provider:
    """Counts as strictly as one can: every request of any 60 s, from when it came."""

    def __init__(self, rpm: int, tpm: int) -> None:
        self.rpm, self.tpm = rpm, tpm
        self.log: deque[tuple[float, int]] = deque()
        self.num_taken = self.num_tokens_taken = self.num_refused = 0

    def take(self, num_tokens: int, now_s: float) -> tuple[bool, RateReport]:
        while self.log and self.log[0][0] <= now_s - 60.0:
            self.log.popleft()
        tokens = sum(tokens for _, tokens in self.log)
        taken = len(self.log) < self.rpm and tokens + num_tokens <= self.tpm
        if taken:
            self.log.append((now_s, num_tokens))
            tokens += num_tokens
            self.num_taken += 1
            self.num_tokens_taken += num_tokens
        else:
            self.num_refused += 1
        return taken, RateReport(
            limit_requests=self.rpm,
            remaining_requests=max(0, self.rpm - len(self.log)),
            limit_tokens=self.tpm,
            remaining_tokens=max(0, self.tpm - tokens),
        )

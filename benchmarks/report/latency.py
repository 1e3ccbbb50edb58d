"""The latencies of a comparison of policies: one sample per request, figures and targets.

Percentiles are taken over the requests of all repeats together, for a p99
needs hundreds of them; those of each repeat alone, shown beside, say how far
to trust it. Times count from when a request was due, so a generator that is
late flatters nobody.
"""

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.load.mix import Ask
from benchmarks.report.report import Figure, Report, Spread, percentile
from serving.capacity.client import Record

# Which requests a row is about; `all` is both.
CLASSES = ("short", "long", "all")
_THROUGHPUT = "Throughput and ends"
_RIVALS = "Headway over the others (below 1: Headway is lower)"


@dataclass(frozen=True, slots=True)
class Sample:
    """What one request of the mix met. Seconds; `None` for what never happened."""

    repeat: int
    policy: str
    number: int
    kind: str
    num_text_tokens: int
    due_s: float  # from the start of its run
    ttft_s: float | None
    e2e_s: float | None
    num_output_tokens: int
    completed: bool
    error: str = ""

    @classmethod
    def of(cls, repeat: int, policy: str, ask: Ask, record: Record) -> "Sample":
        done = record.completed
        tokens = (
            ask.num_output_tokens
            if record.num_output_tokens is None
            else (record.num_output_tokens)
        )
        return cls(
            repeat,
            policy,
            ask.number,
            ask.kind,
            ask.num_text_tokens,
            ask.offset_s,
            record.first_s - record.due_s if done else None,
            record.last_s - record.due_s if done else None,
            tokens if done else 0,
            done,
            record.error,
        )

    @property
    def tpot_s(self) -> float | None:
        """Mean time between tokens after the first, seconds."""
        if self.ttft_s is None or self.e2e_s is None or self.num_output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.num_output_tokens - 1)


class Latencies:
    """All samples of a comparison, looked at by policy, class and repeat."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self.samples = list(samples)
        self.policies = list(dict.fromkeys(sample.policy for sample in self.samples))

    def of(self, policy: str, kind: str = "all") -> list[Sample]:
        return [
            sample
            for sample in self.samples
            if sample.policy == policy and kind in ("all", sample.kind)
        ]

    def ttft_s(self, policy: str, kind: str, percent: float) -> float | None:
        """Return a percentile over all repeats; `None` where none completed."""
        return _percentile([sample.ttft_s for sample in self.of(policy, kind)], percent)

    def ttft_by_repeat_s(self, policy: str, kind: str, percent: float) -> Spread | None:
        """Return the percentile of each repeat by itself."""
        by_repeat: dict[int, list[float | None]] = defaultdict(list)
        for sample in self.of(policy, kind):
            by_repeat[sample.repeat].append(sample.ttft_s)
        found = [_percentile(values, percent) for values in by_repeat.values()]
        values = [value for value in found if value is not None]
        return Spread.of(values) if values else None

    def tokens_per_s(self, policy: str) -> float:
        """Return output tokens of completed requests per second from first due to last done."""
        num_tokens, span_s = 0, 0.0
        for repeat in {sample.repeat for sample in self.of(policy)}:
            samples = [sample for sample in self.of(policy) if sample.repeat == repeat]
            num_tokens += sum(sample.num_output_tokens for sample in samples)
            ends_s = [each.due_s + each.e2e_s for each in samples if each.e2e_s is not None]
            span_s += max(ends_s, default=0.0) - min(each.due_s for each in samples)
        return num_tokens / span_s if span_s > 0.0 else 0.0

    def completed(self, policy: str) -> float:
        """Return the share of requests that completed."""
        samples = self.of(policy)
        return sum(sample.completed for sample in samples) / len(samples)

    def fill(self, report: Report) -> None:
        """Make the tables."""
        for kind in CLASSES:
            for policy in self.policies:
                figures: dict[str, Figure] = {
                    f"p{percent}": self.ttft_s(policy, kind, percent) for percent in (50, 90, 99)
                }
                for percent in (50, 99):
                    by_repeat = self.ttft_by_repeat_s(policy, kind, percent)
                    figures[f"p{percent}_by_repeat"] = by_repeat
                report.row(
                    f"Time to first token, s: {kind}",
                    policy=policy,
                    requests=len(self.of(policy, kind)),
                    **figures,
                )
        for policy in self.policies:
            samples = self.of(policy)
            tpot_s = [sample.tpot_s for sample in samples]
            e2e_s = [sample.e2e_s for sample in samples]
            report.row(
                "Time per output token (TPOT) and whole reply, s",
                policy=policy,
                tpot_p50=_percentile(tpot_s, 50),
                tpot_p99=_percentile(tpot_s, 99),
                reply_p50=_percentile(e2e_s, 50),
                reply_p99=_percentile(e2e_s, 99),
            )
            report.row(
                _THROUGHPUT,
                policy=policy,
                output_tokens_per_s=self.tokens_per_s(policy),
                completed=self.completed(policy),
                errors=sum(not sample.completed for sample in samples),
            )

    def best(self, policies: Sequence[str]) -> str | None:
        """Return which of them has the lowest p99 for short requests."""
        found = [
            (p99_s, policy)
            for policy in policies
            if (p99_s := self.ttft_s(policy, "short", 99)) is not None
        ]
        return min(found)[1] if found else None

    def compare(self, ours: str, rival: str) -> dict[str, float | None]:
        """Return our figures over the rival's."""
        return {
            "short_p99": _ratio(self.ttft_s(ours, "short", 99), self.ttft_s(rival, "short", 99)),
            "overall_p50": _ratio(self.ttft_s(ours, "all", 50), self.ttft_s(rival, "all", 50)),
            "long_p99": _ratio(self.ttft_s(ours, "long", 99), self.ttft_s(rival, "long", 99)),
            "tokens_per_s": _ratio(self.tokens_per_s(ours), self.tokens_per_s(rival)),
        }

    def set_targets(self, report: Report, ours: str, rivals: Sequence[str]) -> None:
        """Hold our policy against the best of those that dispatch at once.

        That one is the same for all targets; the table shows the others too.
        """
        for rival in rivals:
            report.row(_RIVALS, policy=rival, **self.compare(ours, rival))
        best = self.best(rivals)
        if best is None:
            return
        ratios = self.compare(ours, best)
        for name, figure, target in (
            ("short TTFT p99", "short_p99", "<= 0.5"),
            ("overall TTFT p50", "overall_p50", "<= 1.0"),
            ("tokens/s", "tokens_per_s", ">= 0.98"),
            ("long TTFT p99", "long_p99", "<= 1.25"),
        ):
            report.target(f"{name} of {ours} over that of {best}", ratios[figure], target)


def write_csv(samples: Sequence[Sample], path: Path) -> None:
    """Write one line per request: what plots and later questions are answered from."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Sample.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        for sample in samples:
            writer.writerow(
                {
                    key: round(value, 4) if isinstance(value, float) else value
                    for key, value in asdict(sample).items()
                }
            )


def _percentile(values: Iterable[float | None], percent: float) -> float | None:
    known = [value for value in values if value is not None]
    return percentile(known, percent) if known else None


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs else None

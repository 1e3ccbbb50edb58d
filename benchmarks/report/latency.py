"""How long did requests take under each policy? One sample per request; figures and targets.

Percentiles are taken over the requests of all repeats together: a p99 needs hundreds of them.
Percentiles of single repeats stand beside them and show how far to trust them. Times count from
when a request was due, so a generator that is late makes no policy look better.
"""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.load.mix import MixRequest
from benchmarks.report.plot_ttft import plot_ttft
from benchmarks.report.report import RESULTS, Figure, Report, Spread, percentile
from benchmarks.report.runner import print_progress
from router.simulation.figures import brief
from serving.capacity.client import Record

# The requests of a row; `all` is both.
CLASSES = ("short", "long", "all")
_THROUGHPUT = "Throughput and ends"
_RIVALS = "Headway over the others (below 1: Headway is lower)"


@dataclass(frozen=True, slots=True)
class Sample:
    """The times of one request of the mix, seconds; `None` for what never happened."""

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
    def of(cls, repeat: int, policy: str, request: MixRequest, record: Record) -> "Sample":
        done = record.completed
        tokens = record.num_output_tokens
        if tokens is None:
            tokens = request.num_output_tokens
        return cls(
            repeat,
            policy,
            request.number,
            request.kind,
            request.num_text_tokens,
            request.offset_s,
            record.first_s - record.due_s if done else None,
            record.last_s - record.due_s if done else None,
            tokens if done else 0,
            done,
            record.error,
        )

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first, seconds; `None` where there is none."""
        if self.ttft_s is None or self.e2e_s is None or self.num_output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.num_output_tokens - 1)


class Latencies:
    """All samples of a comparison, by policy, class and repeat."""

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
        """Return a percentile over all repeats; `None` if no request completed."""
        return _percentile([sample.ttft_s for sample in self.of(policy, kind)], percent)

    def ttft_by_repeat_s(self, policy: str, kind: str, percent: float) -> Spread | None:
        """Return the percentile of each repeat; `None` if no request completed."""
        by_repeat: dict[int, list[float | None]] = defaultdict(list)
        for sample in self.of(policy, kind):
            by_repeat[sample.repeat].append(sample.ttft_s)
        found = [_percentile(values, percent) for values in by_repeat.values()]
        values = [value for value in found if value is not None]
        return Spread.of(values) if values else None

    def tokens_per_s(self, policy: str) -> float:
        """Return the output tokens of completed requests per second, from first due to last end."""
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
        """Add the tables to the report."""
        for kind in CLASSES:
            for policy in self.policies:
                figures: dict[str, Figure] = {
                    f"p{percent}": self.ttft_s(policy, kind, percent) for percent in (50, 90, 99)
                }
                for percent in (50, 99):
                    by_repeat = self.ttft_by_repeat_s(policy, kind, percent)
                    figures[f"p{percent}_by_repeat"] = by_repeat
                report.add_row(
                    f"Time to first token, s: {kind}",
                    policy=policy,
                    requests=len(self.of(policy, kind)),
                    **figures,
                )
        for policy in self.policies:
            samples = self.of(policy)
            tpot_s = [sample.tpot_s for sample in samples]
            e2e_s = [sample.e2e_s for sample in samples]
            report.add_row(
                "Time per output token (TPOT) and whole reply, s",
                policy=policy,
                tpot_p50=_percentile(tpot_s, 50),
                tpot_p99=_percentile(tpot_s, 99),
                reply_p50=_percentile(e2e_s, 50),
                reply_p99=_percentile(e2e_s, 99),
            )
            report.add_row(
                _THROUGHPUT,
                policy=policy,
                output_tokens_per_s=self.tokens_per_s(policy),
                completed=self.completed(policy),
                errors=sum(not sample.completed for sample in samples),
            )

    def summary(self, policy: str) -> str:
        """Return the policy's main percentiles and its failures, in words."""
        figures = [
            f"{kind} p{percent} {'-' if value is None else brief(value)} s"
            for kind, percent in (("short", 50), ("short", 99), ("long", 99))
            for value in [self.ttft_s(policy, kind, percent)]
        ]
        samples = self.of(policy)
        num_failed = sum(not sample.completed for sample in samples)
        return f"{', '.join(figures)}; {len(samples)} requests, {num_failed} failed"

    def note_failures(self, report: Report) -> None:
        """Add a note for each frequent reason why requests failed."""
        failures = Counter((each.policy, each.error) for each in self.samples if each.error)
        for (policy, reason), count in failures.most_common(10):
            report.add_note(f"{policy}: {count} requests failed: {reason}")

    def best(self, policies: Sequence[str]) -> str | None:
        """Return the policy with the lowest p99 for short requests; `None` if none has one."""
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
        """Compare our policy with the best rival; add targets and a table of all rivals.

        The best rival, by the p99 of short requests, is the same for all targets.
        """
        for rival in rivals:
            report.add_row(_RIVALS, policy=rival, **self.compare(ours, rival))
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
            report.add_target(f"{name} of {ours} over that of {best}", ratios[figure], target)


def finish_comparison(report: Report, samples: Sequence[Sample]) -> None:
    """Show and write the report; write one line per request, and the plot of these lines."""
    report.finish()
    lines = RESULTS / f"{report.name}.csv"
    write_csv(samples, lines)
    print_progress(f"Every request: {lines.name}; figure: {plot_ttft(lines).name}")


def write_csv(samples: Sequence[Sample], path: Path) -> None:
    """Write one line per request, for plots and later questions."""
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

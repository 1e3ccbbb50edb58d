"""The runs of a comparison of policies, one after the other on one deployment.

Within a repeat every policy gets the same requests at the same times, in
other words (so that no prefix cache knows them). From idle to idle: no run
pays for what the one before left behind.
"""

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from benchmarks.load.capacity import measured_capacity
from benchmarks.load.loops import open_loop
from benchmarks.load.mix import Ask, Mix
from benchmarks.report.latency import Latencies, Sample, write_csv
from benchmarks.report.plot_ttft import plot_ttft
from benchmarks.report.report import RESULTS, Figure, Report, Spread, percentile
from benchmarks.systems.real_engines import HoldWatch, RealEngines
from router.simulation.figures import brief
from router.simulation.variant import OURS
from serving.capacity.client import Client, Record
from serving.capacity.launch import MeasureError

# The more an engine batches the more it carries: eight at a time each do not fill two engines.
NUM_WORKERS = 48
_NUM_CONNECTIONS = 64
_TIMEOUT_S = 120.0

console = Console()


def say(text: str) -> None:
    """Show progress, with the time of day."""
    console.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {text}", highlight=False, soft_wrap=True)


def finish(report: Report, samples: Sequence[Sample]) -> None:
    """Show and write the report, every request beside it, and the figure from these."""
    report.finish()
    lines = RESULTS / f"{report.name}.csv"
    write_csv(samples, lines)
    say(f"Every request: {lines.name}; figure: {plot_ttft(lines).name}")


@dataclass(frozen=True)
class Plan:
    """What is run."""

    policies: tuple[str, ...]
    duration_s: float
    num_repeats: int
    load: float  # share of the measured capacity
    rate: float | None  # requests per second; measured if unset
    calibration_s: float
    shared_prefix: bool
    primed: bool  # every engine has seen every system prompt before a run
    seed: int


class Comparison:
    """The runs of one plan on one deployment, and what they showed."""

    def __init__(self, plan: Plan, subject: RealEngines, model: str) -> None:
        self.plan = plan
        self.samples: list[Sample] = []
        self.holds: dict[str, bool] = {}
        self.figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.mix = Mix(num_groups=6) if plan.shared_prefix else Mix()
        self._subject = subject
        self._model = model

    async def capacity(self) -> float:
        """Return the requests per second that the engines carry of this mix, kept full."""
        seed, window_s = self.plan.seed, self.plan.calibration_s
        return await measured_capacity(
            self._subject, self.mix, self._model, seed, NUM_WORKERS, window_s
        )

    async def run(self, repeat: int, policy: str, rate: float) -> None:
        """One policy's turn, from idle to idle."""
        subject, plan = self._subject, self.plan
        asks = self.mix.arrivals(rate, plan.duration_s, f"{plan.seed} {repeat}")
        salt = f"{plan.seed} {repeat} {policy}"
        if plan.primed:
            await self._prime(salt)
        await subject.switch(policy)
        num_prompt_before, num_cached_before = await subject.prompt_tokens()
        watch = HoldWatch(subject)
        records, span_s = await self._send_watched(asks, salt, watch)
        samples = [
            Sample.of(repeat, policy, ask, record)
            for ask, record in zip(asks, records, strict=True)
        ]
        self.samples += samples
        num_prompt, num_cached = await subject.prompt_tokens()
        state = await subject.state()
        self.holds[policy] = state.holds
        accuracy = state.accuracy.ttft
        figures = {
            "prompt_tokens": num_prompt - num_prompt_before,
            "prefix_hit_tokens": num_cached - num_cached_before,
            "mean_hold_s": watch.mean_hold_s(span_s, len(asks)),
            "most_held": max(watch.num_held, default=0),
            "sent_late_p99_ms": percentile([each.late_s for each in records], 99) * 1e3,
            "prediction_error_p50": accuracy.error_p50,
            "prediction_error_p90": accuracy.error_p90,
            "predictions_compared": accuracy.num_compared,
        }
        for name, value in figures.items():
            if value is not None:
                self.figures[policy][name].append(value)
        self._say(policy, samples)

    async def _prime(self, salt: str) -> None:
        """Have every engine prefill every system prompt.

        One after the other: of as many requests as there are engines each has one then.
        """
        await self._subject.switch("round_robin")
        for group in range(self.mix.num_groups):
            ask = Ask(
                number=-1,
                offset_s=0.0,
                kind="short",
                num_text_tokens=8,
                num_output_tokens=1,
                group=group,
            )
            await self._send([ask] * self._subject.num_engines, salt)

    async def _send_watched(
        self, asks: Sequence[Ask], salt: str, watch: HoldWatch
    ) -> tuple[list[Record], float]:
        """Send them with an eye on the hold queue; return also how long it took, seconds."""
        looking = asyncio.create_task(watch.look())
        start_s = time.perf_counter()
        try:
            return await self._send(asks, salt), time.perf_counter() - start_s
        finally:
            looking.cancel()
            with contextlib.suppress(asyncio.CancelledError, MeasureError):
                await looking

    async def _send(self, asks: Sequence[Ask], salt: str) -> list[Record]:
        """Send them at their times, and wait until all is idle."""
        arrivals = [(ask.offset_s, self.mix.call(ask, self._model, salt)) for ask in asks]
        async with Client(self._subject.urls) as client:
            await client.connect(_NUM_CONNECTIONS)
            records = await open_loop(client, arrivals, _TIMEOUT_S)
        await self._subject.wait_until_idle()
        return records

    def _say(self, policy: str, samples: list[Sample]) -> None:
        found = Latencies(samples)
        values = [
            f"{kind} p{percent} {'-' if value is None else brief(value)} s"
            for kind, percent in (("short", 50), ("short", 99), ("long", 99))
            for value in [found.ttft_s(policy, kind, percent)]
        ]
        num_failed = sum(not sample.completed for sample in samples)
        say(f"{policy:20} {', '.join(values)}; {len(samples)} requests, {num_failed} failed")

    def fill(self, report: Report) -> None:
        """Make the tables and hold the targets."""
        latencies = Latencies(self.samples)
        latencies.fill(report)
        for policy, figures in self.figures.items():
            spread: dict[str, Figure] = {
                name: Spread.of(values) for name, values in figures.items()
            }
            report.row(
                "Tokens of a run",
                policy=policy,
                prompt_tokens=spread["prompt_tokens"],
                prefix_hit_tokens=spread["prefix_hit_tokens"],
            )
            report.row(
                "Hold queue of a run, and lateness of the load generator",
                policy=policy,
                holds="yes" if self.holds[policy] else "no",
                mean_hold_s=spread["mean_hold_s"],
                most_held=spread["most_held"],
                sent_late_p99_ms=spread["sent_late_p99_ms"],
            )
            report.row(
                "Predicted time to first token against measured, after a run",
                policy=policy,
                error_p50=spread.get("prediction_error_p50"),
                error_p90=spread.get("prediction_error_p90"),
                requests_compared=spread["predictions_compared"],
            )
        if OURS in self.figures:
            # Ablations of ours that do not hold are no rivals.
            rivals = [name for name, holds in self.holds.items() if not holds and ":" not in name]
            if not self.plan.shared_prefix:
                latencies.set_targets(report, OURS, rivals)
            elif "cache_aware" in self.figures:
                self._set_prefix_targets(report, latencies)
            errors = self.figures[OURS]["prediction_error_p50"]
            report.target(
                "median absolute error of predicted TTFT",
                Spread.of(errors) if errors else None,
                "<= 0.2",
            )
        failures = Counter((each.policy, each.error) for each in self.samples if each.error)
        for (policy, reason), count in failures.most_common(10):
            report.note(f"{policy}: {count} requests failed: {reason}")
        report.note(
            "Prediction errors are the gateway's own, over its last 'requests compared', from "
            "placing to first token: where these are more than a run's, earlier runs of any "
            "policy are among them."
        )
        report.note("Mean hold: Little's law on the queue's length, looked at twice a second.")

    def _set_prefix_targets(self, report: Report, latencies: Latencies) -> None:
        hits, theirs = (
            sum(self.figures[policy]["prefix_hit_tokens"]) for policy in (OURS, "cache_aware")
        )
        p99_s, their_p99_s = (
            latencies.ttft_s(policy, "all", 99) for policy in (OURS, "cache_aware")
        )
        ratio = hits / theirs if theirs else None
        report.target("prefix-hit tokens of headway over those of cache_aware", ratio, ">= 1")
        if self.plan.primed:
            report.note("Before each run every engine has prefilled every system prompt once.")
        ratio = p99_s / their_p99_s if p99_s and their_p99_s else None
        report.target("TTFT p99 of headway over that of cache_aware", ratio, "<= 1")

"""How do policies compare on one deployment, one run after the other?

Within a repeat every policy gets requests of the same sizes at the same times; only the words
differ, so that no prefix cache has them. A run begins and ends idle: none pays for the one before.
"""

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.load.capacity import NUM_WORKERS, measured_capacity
from benchmarks.load.loops import open_loop
from benchmarks.load.mix import Mix, MixRequest
from benchmarks.report.latency import Latencies, Sample
from benchmarks.report.report import Figure, Report, Spread, percentile
from benchmarks.report.runner import print_progress
from benchmarks.systems.real_engines import HoldQueueMonitor, RealEngines
from router.simulation.variant import OURS
from serving.capacity.client import Client, Record
from serving.capacity.launch import MeasureError

_NUM_CONNECTIONS = 64
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Scenario:
    """What one run of the benchmark does."""

    policies: tuple[str, ...]
    duration_s: float
    num_repeats: int
    load: float  # share of the measured capacity
    rate: float | None  # requests per second; measured if unset
    calibration_s: float
    shared_prefix: bool
    primed: bool  # before a run every engine has prefilled every system prompt
    seed: int


class Comparison:
    """The runs of one scenario on one deployment, and what they showed."""

    def __init__(self, scenario: Scenario, service: RealEngines, model: str) -> None:
        self.scenario = scenario
        self.samples: list[Sample] = []
        self.holds: dict[str, bool] = {}
        self.figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.mix = Mix(num_groups=6) if scenario.shared_prefix else Mix()
        self._service = service
        self._model = model

    async def measure_capacity(self) -> float:
        """Return the requests per second that the engines complete of this mix, kept full."""
        seed, window_s = self.scenario.seed, self.scenario.calibration_s
        return await measured_capacity(
            self._service, self.mix, self._model, seed, NUM_WORKERS, window_s
        )

    async def run(self, repeat: int, policy: str, rate: float) -> None:
        """Run the load under one policy, from idle to idle; keep samples and figures."""
        service, scenario = self._service, self.scenario
        requests = self.mix.arrivals(rate, scenario.duration_s, f"{scenario.seed} {repeat}")
        salt = f"{scenario.seed} {repeat} {policy}"
        if scenario.primed:
            await self._prime(salt)
        await service.switch(policy)
        num_prompt_before, num_cached_before = await service.prompt_tokens()
        queue = HoldQueueMonitor(service)
        records, span_s = await self._send_monitored(requests, salt, queue)
        samples = [
            Sample.of(repeat, policy, request, record)
            for request, record in zip(requests, records, strict=True)
        ]
        self.samples += samples
        num_prompt, num_cached = await service.prompt_tokens()
        state = await service.state()
        self.holds[policy] = state.holds
        accuracy = state.accuracy.ttft
        figures = {
            "prompt_tokens": num_prompt - num_prompt_before,
            "prefix_hit_tokens": num_cached - num_cached_before,
            "mean_hold_s": queue.mean_hold_s(span_s, len(requests)),
            "most_held": max(queue.num_held, default=0),
            "sent_late_p99_ms": percentile([each.late_s for each in records], 99) * 1e3,
            "prediction_error_p50": accuracy.error_p50,
            "prediction_error_p90": accuracy.error_p90,
            "predictions_compared": accuracy.num_compared,
        }
        for name, value in figures.items():
            if value is not None:
                self.figures[policy][name].append(value)
        print_progress(f"{policy:20} {Latencies(samples).summary(policy)}")

    async def _prime(self, salt: str) -> None:
        """Have every engine prefill every system prompt.

        One prompt at a time, with as many requests as engines: round robin gives each engine one.
        """
        await self._service.switch("round_robin")
        for group in range(self.mix.num_groups):
            request = MixRequest(
                number=-1,
                offset_s=0.0,
                kind="short",
                num_text_tokens=8,
                num_output_tokens=1,
                group=group,
            )
            await self._send([request] * self._service.num_engines, salt)

    async def _send_monitored(
        self, requests: Sequence[MixRequest], salt: str, queue: HoldQueueMonitor
    ) -> tuple[list[Record], float]:
        """Send the requests while the hold queue is monitored. Return records and seconds."""
        polling = asyncio.create_task(queue.poll())
        start_s = time.perf_counter()
        try:
            return await self._send(requests, salt), time.perf_counter() - start_s
        finally:
            polling.cancel()
            with contextlib.suppress(asyncio.CancelledError, MeasureError):
                await polling

    async def _send(self, requests: Sequence[MixRequest], salt: str) -> list[Record]:
        """Send the requests at their times; wait until the service is idle. Return the records."""
        arrivals = [
            (each.offset_s, self.mix.api_request(each, self._model, salt)) for each in requests
        ]
        async with Client(self._service.urls) as client:
            await client.connect(_NUM_CONNECTIONS)
            records = await open_loop(client, arrivals, _TIMEOUT_S)
        await self._service.wait_until_idle()
        return records

    def fill(self, report: Report) -> None:
        """Add tables, targets and notes to the report."""
        latencies = Latencies(self.samples)
        latencies.fill(report)
        for policy, figures in self.figures.items():
            spread: dict[str, Figure] = {
                name: Spread.of(values) for name, values in figures.items()
            }
            report.add_row(
                "Tokens of a run",
                policy=policy,
                prompt_tokens=spread["prompt_tokens"],
                prefix_hit_tokens=spread["prefix_hit_tokens"],
            )
            report.add_row(
                "Hold queue of a run, and lateness of the load generator",
                policy=policy,
                holds="yes" if self.holds[policy] else "no",
                mean_hold_s=spread["mean_hold_s"],
                most_held=spread["most_held"],
                sent_late_p99_ms=spread["sent_late_p99_ms"],
            )
            report.add_row(
                "Predicted time to first token against measured, after a run",
                policy=policy,
                error_p50=spread.get("prediction_error_p50"),
                error_p90=spread.get("prediction_error_p90"),
                requests_compared=spread["predictions_compared"],
            )
        if OURS in self.figures:
            # An ablation of our own policy that does not hold is no rival.
            rivals = [name for name, holds in self.holds.items() if not holds and ":" not in name]
            if not self.scenario.shared_prefix:
                latencies.set_targets(report, OURS, rivals)
            elif "cache_aware" in self.figures:
                self._set_prefix_targets(report, latencies)
            errors = self.figures[OURS]["prediction_error_p50"]
            report.add_target(
                "median absolute error of predicted TTFT",
                Spread.of(errors) if errors else None,
                "<= 0.2",
            )
        latencies.note_failures(report)
        report.add_note(
            "Prediction errors are those of the gateway, from placing to first token, over its "
            "last 'requests compared'. If these are more than a run has, some are of earlier runs "
            "under any policy."
        )
        report.add_note("Mean hold: Little's law on the queue's length, read twice a second.")

    def _set_prefix_targets(self, report: Report, latencies: Latencies) -> None:
        hits, theirs = (
            sum(self.figures[policy]["prefix_hit_tokens"]) for policy in (OURS, "cache_aware")
        )
        p99_s, their_p99_s = (
            latencies.ttft_s(policy, "all", 99) for policy in (OURS, "cache_aware")
        )
        ratio = hits / theirs if theirs else None
        report.add_target("prefix-hit tokens of headway over those of cache_aware", ratio, ">= 1")
        if self.scenario.primed:
            report.add_note("Before each run every engine has prefilled every system prompt once.")
        ratio = p99_s / their_p99_s if p99_s and their_p99_s else None
        report.add_target("TTFT p99 of headway over that of cache_aware", ratio, "<= 1")

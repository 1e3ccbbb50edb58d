"""How fast does an endpoint answer under a little load? `headway bench`.

A request is due at a random time (Poisson), or when one before it has ended; its first token is
counted from when it was written to an open connection.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from serving.capacity.client import ApiRequest, Client, Record
from serving.cli.running.service import RunningService
from serving.gateway.http.endpoint import StartError

_PERCENTILES = (50, 90, 99)
_TIMEOUT_S = 600.0
_WORDS = (
    *("ant", "bear", "cat", "deer", "elk", "fox", "goat", "hare", "ibis", "jay", "kite", "lark"),
    *("mole", "newt", "owl", "pike", "quail", "rook", "seal", "toad", "vole", "wolf", "yak"),
)


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent."""

    model: str
    num_requests: int
    rate: float | None  # requests/s, Poisson; None: as `concurrency` allows
    concurrency: int  # requests at the same time, without a rate
    num_prompt_words: int  # a token or two each
    num_output_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Result:
    """What came back. Percentiles are of 50, 90 and 99 per cent, in seconds; None of none."""

    num_completed: int
    num_failed: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    ttft_s: list[float] | None
    tpot_s: list[float] | None  # per token after the first
    e2e_s: list[float] | None
    late_s: list[float] | None  # that requests were written late, by this client
    errors: dict[str, int]


def run(service: RunningService, load: Load, console: Console, *, as_json: bool) -> int:
    """Send the load, print what came back, return the exit code: 1 if anything failed."""
    if not load.model:
        load = replace(load, model=_first_model(service))
    if not as_json:
        console.print(f"{load.num_requests:,} requests to {load.model} at {service.url} …")
    result = asyncio.run(measure(service, load))
    if as_json:
        made = {"load": asdict(load), "result": asdict(result)}
        print(msgspec.json.encode(made).decode())
    else:
        _show(result, console)
    return 0 if result.num_completed and not result.num_failed else 1


def _first_model(service: RunningService) -> str:
    names = service.models()
    if not names:
        raise StartError(f"{service.url} serves no model")
    return names[0]


async def measure(service: RunningService, load: Load) -> Result:
    """Send the load and return what came back."""
    rng = random.Random(load.seed)
    requests = [_request(load, rng) for _ in range(load.num_requests)]
    async with Client([service.url], service.headers) as client:
        begin_s = time.perf_counter()
        if load.rate is None:
            records = await _closed_loop(client, requests, load.concurrency)
        else:
            records = await _poisson(client, requests, load.rate, rng)
        await client.wait(_TIMEOUT_S)
        duration_s = time.perf_counter() - begin_s
    return _result(records, duration_s)


def _request(load: Load, rng: random.Random) -> ApiRequest:
    prompt = " ".join(rng.choices(_WORDS, k=load.num_prompt_words))
    return ApiRequest.chat(
        load.model,
        prompt,
        load.num_output_tokens,
        stream=True,
        stream_options={"include_usage": True},
    )


async def _closed_loop(
    client: Client, requests: Sequence[ApiRequest], concurrency: int
) -> list[Record]:
    left, records = iter(requests), []

    def send_next(_: Record | None = None) -> None:
        if (request := next(left, None)) is not None:
            records.append(client.send(request, send_next))

    for _ in range(concurrency):
        send_next()
    while len(records) < len(requests):
        await client.wait(_TIMEOUT_S)
    return records


async def _poisson(
    client: Client, requests: Sequence[ApiRequest], rate: float, rng: random.Random
) -> list[Record]:
    records = []
    due_s = time.perf_counter()
    for request in requests:
        due_s += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        records.append(client.send(request))
        records[-1].due_s = due_s
    return records


def _result(records: Sequence[Record], duration_s: float) -> Result:
    done = [record for record in records if record.completed]
    num_tokens = sum(record.num_output_tokens or 0 for record in done)
    errors: dict[str, int] = {}
    for record in records:
        if not record.completed:
            errors[record.error] = errors.get(record.error, 0) + 1
    return Result(
        num_completed=len(done),
        num_failed=len(records) - len(done),
        duration_s=duration_s,
        requests_per_s=len(done) / duration_s,
        output_tokens_per_s=num_tokens / duration_s,
        ttft_s=_percentiles([record.ttft_s for record in done]),
        tpot_s=_percentiles(
            [
                (record.last_s - record.first_s) / (record.num_output_tokens - 1)
                for record in done
                if record.num_output_tokens is not None and record.num_output_tokens > 1
            ]
        ),
        e2e_s=_percentiles([record.last_s - record.sent_s for record in done]),
        late_s=_percentiles([record.late_s for record in done]),
        errors=errors,
    )


def _percentiles(values: Sequence[float]) -> list[float] | None:
    return [float(each) for each in np.percentile(values, _PERCENTILES)] if values else None


def _show(result: Result, console: Console) -> None:
    table = Table("", *(f"p{each}" for each in _PERCENTILES), box=None, padding=(0, 2, 0, 0))
    rows = {
        "time to first token": result.ttft_s,
        "time per token after it": result.tpot_s,
        "whole reply": result.e2e_s,
        "sent late by this client": result.late_s,
    }
    for name, values in rows.items():
        if values is not None:
            table.add_row(name, *(f"{value * 1000:,.1f} ms" for value in values))
    console.print(table)
    console.print(
        f"{result.num_completed:,} completed in {result.duration_s:.1f} s: "
        f"{result.requests_per_s:.2f} requests/s, {result.output_tokens_per_s:,.0f} tokens/s"
    )
    for error, number in sorted(result.errors.items(), key=lambda item: -item[1])[:3]:
        console.print(f"{number:,} failed: {error}")

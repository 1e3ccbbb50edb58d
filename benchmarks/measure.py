"""`headway profile`: starts engines, measures their steps and writes the profile of one."""

import asyncio
import dataclasses
import datetime
import importlib
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.profile import Profile
from benchmarks.step_fit import TERMS, Step, fit
from benchmarks.step_probe import StepProbe
from router.types import EngineInfo
from serving.config import Config
from serving.engine import Engine
from serving.onboard import onboard_model
from serving.plan import Plan

_MAX_NOISE = 0.3  # what `Profile` allows
_EVERY_TOGETHER = 3  # one factor is to be found, and some of all kinds of steps will do


async def measure(config: Config, plan: Plan, name: str, console: Console) -> Profile:
    """Return the profile of one of the engines that `plan` would start.

    On CPU cores it is measured alone and then with all of them doing the same, for they
    share memory and the cores' spare time. Raises `ConfigError` as starting it does.
    """
    if plan.uses_model_on_board:
        plan = dataclasses.replace(plan, model=str(onboard_model()))
    module, _, cls = config.engine.factory.partition(":")
    factory: type[Engine] = getattr(importlib.import_module(module), cls)
    num_engines = plan.num_replicas if plan.device == "cpu" else 1
    console.print(f"Starting {num_engines} × {plan.device_name}")
    begin_s = time.monotonic()
    engines = [await factory.start(config, plan, 0)]
    start_s = time.monotonic() - begin_s
    try:
        alone = await _steps(engines, console)
        first = engines[0]
        fitted, error = fit(alone, _blank(name, first.info, start_s), has_outliers=True)
        contention = 0.0
        if num_engines > 1:
            for rank in range(1, num_engines):
                engines.append(await factory.start(config, plan, rank))
            together = await _steps(engines, console, every=_EVERY_TOGETHER)
            shares = [each.step_s / each.foretold_s(fitted) for each in together]
            contention = max(0.0, statistics.median(shares) - 1.0)
    finally:
        await asyncio.gather(*(engine.shutdown() for engine in engines))
    where = f"{first.info.engine} on {first.info.device}, Python {platform.python_version()}"
    source = (
        f"Measured by `headway profile`, {datetime.date.today()}: {where}; {len(alone)} "
        f"steps, fitted to {error:.1%} (root mean square), which stands for their noise."
    )
    values = {
        "source": source,
        "noise": round(min(error, _MAX_NOISE), 4),
        "contention": round(contention, 4),
    }
    return fitted.model_copy(update=values)


async def _steps(engines: Sequence[Engine], console: Console, every: int = 1) -> list[Step]:
    """Return the steps of all engines, which do the same side by side; of what there is to
    measure, one in `every`."""
    probes = [StepProbe(engine) for engine in engines]
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        plans = [probe.plan()[::every] for probe in probes]
        bar = bars.add_task("", total=len(plans[0]))
        for jobs in zip(*plans, strict=True):
            title = jobs[0][0]
            beside = f", {len(engines)} engines" if len(engines) > 1 else ""
            bars.update(bar, description=title + beside)
            await asyncio.gather(*(job() for _, job in jobs))
            if title == "warming up":
                for probe in probes:
                    probe.steps.clear()
            bars.advance(bar)
    return [step for probe in probes for step in probe.steps]


def _blank(name: str, info: EngineInfo, start_s: float) -> Profile:
    """What the engine says of itself; the terms are yet to be fitted."""
    return Profile(
        name=name,
        model=info.model,
        device=info.device,
        source="to be fitted",
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_prefill_chunk=info.max_prefill_chunk,
        num_kv_tokens=info.num_kv_tokens,
        block_size=info.block_size,
        start_s=round(start_s, 1),
        base_s=0.0,
        s_per_token=1e-6,
    )


def run(config: Config, plan: Plan, output: Path, console: Console) -> None:
    """Measure, write `output` and tell what came out."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its log would hide our progress
    profile = asyncio.run(measure(config, plan, output.stem, console))
    profile.save(output)
    for name in (*TERMS, "noise", "contention"):
        console.print(f"{name:20} {getattr(profile, name):.4g}")
    console.print(f"Written: {output}")

"""`headway profile`: starts one engine, measures its steps and writes its profile."""

import asyncio
import dataclasses
import datetime
import importlib
import os
import platform
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.profile import Profile
from benchmarks.step_fit import TERMS, fit
from benchmarks.step_probe import StepProbe
from router.types import EngineInfo
from serving.config import Config
from serving.engine import Engine
from serving.onboard import onboard_model
from serving.plan import Plan

_MAX_NOISE = 0.3  # what `Profile` allows


async def measure(config: Config, plan: Plan, name: str, console: Console) -> Profile:
    """Return the profile of the first engine that `plan` would start.

    Raises `ConfigError` as starting it does.
    """
    if plan.uses_model_on_board:
        plan = dataclasses.replace(plan, model=str(onboard_model()))
    module, _, cls = config.engine.factory.partition(":")
    factory: type[Engine] = getattr(importlib.import_module(module), cls)
    console.print(f"Starting one engine: {plan.device_name}")
    begin_s = time.monotonic()
    engine = await factory.start(config, plan, 0)
    start_s = time.monotonic() - begin_s
    try:
        probe = StepProbe(engine)
        columns = (
            TextColumn("{task.description:32}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console) as bars:
            jobs = probe.plan()
            bar = bars.add_task("", total=len(jobs))
            for title, job in jobs:
                bars.update(bar, description=title)
                await job()
                if title == "warming up":
                    probe.steps.clear()
                bars.advance(bar)
    finally:
        await engine.shutdown()
    fitted, error = fit(probe.steps, _blank(name, engine.info, start_s), has_outliers=True)
    where = f"{engine.info.engine} on {engine.info.device}, Python {platform.python_version()}"
    source = (
        f"Measured by `headway profile`, {datetime.date.today()}: {where}; {len(probe.steps)} "
        f"steps, fitted to {error:.1%} (root mean square), which stands for their noise."
    )
    noise = round(min(error, _MAX_NOISE), 4)
    return fitted.model_copy(update={"source": source, "noise": noise})


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
    for name in (*TERMS, "noise"):
        console.print(f"{name:20} {getattr(profile, name):.4g}")
    console.print(f"Written: {output}")

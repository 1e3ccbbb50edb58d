"""What do the steps of this machine's engines cost? `headway profile`.

Starts the service, measures its engines' steps and writes a profile.
"""

import datetime
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from scipy.stats import trim_mean

from router import EngineInfo
from router.simulation.engine.profile import Profile
from serving.capacity import logged_steps
from serving.capacity.profiles import save_profile
from serving.capacity.service import Service
from serving.capacity.step_fit import TERMS, fit
from serving.capacity.step_probe import StepProbe
from serving.config import parse
from serving.planning.plan import Plan

_MAX_NOISE = 0.3  # what `Profile` allows
_WARM_UP_TOKENS = 32
_OUTLIERS = 0.1  # share of the times to first token to leave out at either end
# Keys of the configuration to keep; of the others, API keys and quotas would be in the way.
_ENGINE_KEYS = ("model", "served_model_name", "tensor_parallel_size", "engine")


async def measure(args: Mapping[str, Any], plan: Plan, name: str, console: Console) -> Profile:
    """Return the profile of one of the engines that `plan` would start for `args`.

    The whole service runs, for on CPU cores it uses its share of them. There all engines are
    started and do the same work alone and side by side, for they share memory and spare cores.
    Raises `MeasureError` if they do not start.
    """
    num_engines = plan.num_replicas if plan.device == "cpu" else 1
    console.print(f"Starting {num_engines} × {plan.device_name}")
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="headway-steps-") as folder:
        async with Service(num_engines, _logged(args, plan.device, Path(folder))) as service:
            start_s = time.monotonic() - begin_s
            state = await service.state()
            info, *_ = (replica.info for replica in state.replicas.values())
            await service.switch("round_robin")
            probe = StepProbe(service, info)
            await probe.decode(2, _WARM_UP_TOKENS, num_engines)
            since_s = time.monotonic()
            await _run_jobs(probe, console)
        logs = logged_steps.read_all(Path(folder))
    found = logged_steps.steps(logs, since_s, overlap=info.async_scheduling)
    fitted, error = fit(found, _unfitted_profile(name, info, start_s), has_outliers=True)
    where = f"{info.engine} on {info.device}, Python {platform.python_version()}"
    source = (
        f"Measured by `headway profile`, {datetime.date.today()}: {where}; {len(found)} steps of "
        f"{num_engines} engines behind the gateway, fitted to {error:.1%} (root mean square), "
        "which stands for their noise."
    )
    path_s = _path_s(probe.firsts, fitted, 1.0 + fitted.contention)
    values = {
        "source": source,
        "noise": round(min(error, _MAX_NOISE), 4),
        "path_s": float(f"{path_s:.4g}"),
    }
    return fitted.model_copy(update=values)


def _logged(args: Mapping[str, Any], device: str, folder: Path) -> dict[str, Any]:
    """Return the configuration of the same engines with their step logs in `folder`."""
    kept = {key: args[key] for key in _ENGINE_KEYS if key in args} | {"device": device}
    engine = parse(kept).engine.model_dump(mode="json", exclude_unset=True)
    return {**kept, "engine": {**engine, "step_log": str(folder)}}


def _path_s(firsts: Sequence[tuple[int, float]], profile: Profile, slowness: float) -> float:
    """Return the mean time to first token that steps do not explain, seconds.

    A prompt arrived at a random time in a step of the sequence that decoded beside it, on average
    in the middle, and was prefilled in the next step. Outliers are left out.
    """
    cost = profile.step_cost
    waited_s = cost.step_s(0, 1, 0, 0.0) / 2
    rests_s = [
        ttft_s - slowness * (waited_s + cost.step_s(num_tokens, 1, 0, num_tokens**2 / 2))
        for num_tokens, ttft_s in firsts
    ]
    return max(0.0, float(trim_mean(rests_s, _OUTLIERS)))


async def _run_jobs(probe: StepProbe, console: Console) -> None:
    """Run everything that is to be measured, and show the progress."""
    columns = (
        TextColumn("{task.description:32}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    jobs = probe.plan()
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task("", total=len(jobs))
        for title, job in jobs:
            bars.update(bar, description=title)
            await job()
            bars.advance(bar)


def _unfitted_profile(name: str, info: EngineInfo, start_s: float) -> Profile:
    """Return a profile with the engine's limits, whose terms are yet to be fitted."""
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


async def run(args: Mapping[str, Any], plan: Plan, output: Path, console: Console) -> None:
    """Measure a profile, write it to `output` and print it. Raises `MeasureError`."""
    profile = await measure(args, plan, output.stem, console)
    save_profile(profile, output)
    for name in (*TERMS, "noise", "contention", "path_s"):
        console.print(f"{name:20} {getattr(profile, name):.4g}")
    console.print(f"Written: {output}")

"""Is the model there before anything starts? It is looked up, and downloaded with a progress bar.

Nothing is done for a folder, or for engines that are not vLLM.
"""

import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from serving.config import Config, ConfigError
from serving.planning import hub
from serving.planning.model_size import ModelSize, find_model_size

_HEARTBEAT_S = 15.0  # between lines where there is no terminal


@dataclass(frozen=True, slots=True)
class Weights:
    """What is known of a model before it is loaded."""

    size: ModelSize | None = None  # None: what local files and its name say
    found: hub.HubModel | None = None  # on the hub
    note: str = ""  # a sentence for people


def look_up(config: Config, *, must_be_there: bool) -> Weights:
    """Return what is known of the configuration's model.

    Raise `ConfigError` if the hub has none of that name, or not for us; and, if it `must_be_there`,
    where the hub cannot be asked and the cache has none.
    """
    model, args = config.model, config.engine.args
    if model is None or not config.engine.is_vllm:
        return Weights()
    if model.startswith((".", "/", "~")) and not Path(model).exists():
        raise ConfigError(f"model: there is no folder {model}")
    if not hub.is_hub_id(model) or importlib.util.find_spec("huggingface_hub") is None:
        return Weights()
    if hub.is_offline():
        if must_be_there and not hub.is_cached(model, args):
            raise ConfigError(
                f"model: {model} is not in the cache, and HF_HUB_OFFLINE forbids to ask for it: "
                "unset that once, or name a folder"
            )
        return Weights()
    try:
        found = hub.ask_hub(model, args)
    except hub.HubUnreachable as problem:
        if hub.is_cached(model, args):
            os.environ["HF_HUB_OFFLINE"] = "1"  # engines need not try as well
            return Weights(note=f"The hub cannot be reached ({problem}): {model} is in the cache.")
        if must_be_there:
            raise ConfigError(
                f"model: {model} is not in the cache, and the hub cannot be reached ({problem}): "
                "check the network, set HF_ENDPOINT to a mirror, or name a folder"
            ) from None
        return Weights(note=f"The hub cannot be reached ({problem}): {model} was not looked up.")
    local = find_model_size(model)
    is_known = local is not None and not local.is_guess
    return Weights(None if is_known else hub.hub_size(found), found)


def fetch(weights: Weights, config: Config, console: Console) -> None:
    """Download what is missing. Raise `ConfigError` if that fails."""
    found = weights.found
    if found is None or config.engine.args.get("load_format") == "dummy" or hub.is_whole(found):
        return
    args = config.engine.args
    label = f"downloading {found.name}"
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        with Bars(*columns, TimeRemainingColumn(), console=console) as bars:
            bar = bars.add_task(label)
            hub.download(
                found, args, lambda done, total: bars.update(bar, completed=done, total=total)
            )
    else:
        hub.download(found, args, _lines(label, console))


def _lines(label: str, console: Console) -> Callable[[int, int], None]:
    """Return what reports a download in a line now and then."""
    last_s = float("-inf")

    def report(done: int, total: int) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s >= _HEARTBEAT_S or done == total:
            last_s = now_s
            console.print(f"{label}: {done / 1e9:.2f} of {total / 1e9:.2f} GB")

    return report

"""Which old names are still accepted, and what are they called now?

Each is accepted until the next release, with one line of warning per process. Called wherever
names come in: by the configuration, the command line and `/headway/policy`.
"""

import functools
import logging
from collections.abc import Collection, Mapping
from typing import Any

from router.scheduling import ablation

logger = logging.getLogger(__name__)

# Present names by old ones. Those of the parts in `router.ablate`: `ablation.RENAMED_PARTS`.
KEYS = {
    "router.promise_base_s": "router.ttft_target_base_s",
    "router.promise_s_per_token": "router.ttft_target_s_per_token",
    "router.promise_interactive_factor": "router.ttft_target_interactive_factor",
    "router.promise_batch_s": "router.ttft_target_batch_s",
}
FACTORIES = {
    "benchmarks.emulated:EmulatedEngine": "serving.engine.emulated.engine:EmulatedEngine",
    "serving.engine:VllmEngine": "serving.engine.vllm.engine:VllmEngine",
}
IMPORT_PATHS = {"serving.app:build": "serving.cluster.application:build"}


def current_args(args: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the configuration in which every name is the present one.

    Raises `ValueError` if something is given by both its names. Malformed values stay as they
    are: to refuse them is up to the configuration.
    """
    args = dict(args)
    for old, new in KEYS.items():
        section, _, old_key = old.partition(".")
        new_key = new.partition(".")[2]
        values = args.get(section)
        if not isinstance(values, dict) or old_key not in values:
            continue
        if new_key in values:
            raise ValueError(f"{old} is the old name of {new}: only one of them can be given")
        args[section] = {new_key if key == old_key else key: values[key] for key in values}
        warn_renamed({old: new})
    router = args.get("router")
    args = _with_current_factory(args)
    if isinstance(args.get("models"), list):
        args["models"] = [_with_current_factory(model) for model in args["models"]]
    if isinstance(router, dict) and _is_list_of_words(router.get("ablate")):
        try:
            args["router"] = {**router, "ablate": list(current_parts(router["ablate"]))}
        except ValueError as error:
            raise ValueError(f"router.ablate: {error}") from None
    return args


def _with_current_factory(keys: Any) -> Any:
    """Return a copy with the present name of the engine's factory; else what is given."""
    engine = keys.get("engine") if isinstance(keys, dict) else None
    if not isinstance(engine, dict) or "factory" not in engine:
        return keys
    return {**keys, "engine": {**engine, "factory": _current(engine["factory"], FACTORIES)}}


def current_parts(parts: Collection[str]) -> tuple[str, ...]:
    """Return the parts of `headway` by their present names.

    Raises `ValueError` if one is given by both its names.
    """
    warn_renamed(ablation.renamed_parts(parts))
    return ablation.current_parts(parts)


def current_import_path(path: Any) -> Any:
    """Return the present import path of the application; any other value as it is."""
    return _current(path, IMPORT_PATHS)


def warn_renamed(renamed: Mapping[str, str]) -> None:
    """Log one line for each old name, the first time in this process."""
    for old, new in renamed.items():
        _warn_once(old, new)


@functools.cache
def _warn_once(old: str, new: str) -> None:
    logger.warning("%s is now called %s; the next release drops the old name", old, new)


def _current(value: Any, table: Mapping[str, str]) -> Any:
    if not isinstance(value, str) or value not in table:
        return value
    warn_renamed({value: table[value]})
    return table[value]


def _is_list_of_words(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)

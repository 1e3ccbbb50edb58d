"""A plugin for pytest: vLLM's tests talk to a server that runs already, with its model.

Loaded by name from this folder, as `tests` is vLLM's own package there.
"""

import functools
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from _pytest.junitxml import mangle_test_address

_USES_A_SERVER = re.compile(r"(?!mock).*(server|client)")


def _stand_in_for_tblib() -> None:
    """Let vLLM's `conftest.py` load where `tblib` is missing: it shows tracebacks of children."""
    package, module = ModuleType("tblib"), ModuleType("tblib.pickling_support")
    module.install = lambda *_: None  # type: ignore[attr-defined]
    package.pickling_support = module  # type: ignore[attr-defined]
    sys.modules.update({"tblib": package, "tblib.pickling_support": module})


if importlib.util.find_spec("tblib") is None:
    _stand_in_for_tblib()  # that file is loaded before any hook is called


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Have the class that starts servers start none, and nothing be downloaded.

    Before any file of fixtures is loaded, which takes that class by its name.
    """
    import tests.utils as utils
    import vllm.tokenizers
    import vllm.transformers_utils.repo_utils as repositories
    from transformers import AutoConfig, AutoTokenizer

    class SharedServer(utils.RemoteOpenAIServer):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.host, self.port, self.uds = "127.0.0.1", int(os.environ["CONFORMANCE_PORT"]), None

        def __enter__(self) -> "SharedServer":
            return self

        def __exit__(self, *args: object) -> None:
            pass

    utils.RemoteOpenAIServer = SharedServer  # type: ignore[attr-defined]
    # All names are names of the one model that is served: its tokenizer is that of all of them.
    vllm.tokenizers.get_tokenizer = _of_the_model(vllm.tokenizers.get_tokenizer)
    AutoTokenizer.from_pretrained = _of_the_model(AutoTokenizer.from_pretrained)
    AutoConfig.from_pretrained = _of_the_model(AutoConfig.from_pretrained)
    # Adapters are further names of that model, whose files nobody reads.
    model = os.environ["CONFORMANCE_MODEL"]
    repositories.hf_api = lambda: SimpleNamespace(snapshot_download=lambda **_: model)


def _of_the_model(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_it(*_: Any, **kwargs: Any) -> Any:
        kwargs.pop("tokenizer_name", None)
        return load(os.environ["CONFORMANCE_MODEL"], **kwargs)

    return load_it


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what talks to no server: it says nothing about the one that runs."""
    talks = {item: _talks_to_a_server(item) and _is_wanted(item) for item in items}
    for module in {getattr(item, "module", None) for item in items}:
        # Some read the configuration of the model that they name.
        if isinstance(getattr(module, "MODEL_NAME", None), str):
            module.MODEL_NAME = os.environ["CONFORMANCE_MODEL"]
    config.hook.pytest_deselected(items=[item for item in items if not talks[item]])
    items[:] = [item for item in items if talks[item]]


def _talks_to_a_server(item: pytest.Item) -> bool:
    fixtures: Sequence[str] = getattr(item, "fixturenames", ())
    if any(_USES_A_SERVER.match(name) for name in fixtures):
        return True
    function = getattr(item, "function", None)
    return function is not None and "RemoteOpenAIServer" in inspect.getsource(function)


def _is_wanted(item: pytest.Item) -> bool:
    """Whether a test is one of those that are asked for by name, as reports have it."""
    if "CONFORMANCE_WANTED" not in os.environ:
        return True
    names = mangle_test_address(item.nodeid)
    return f"{'.'.join(names[:-1])}::{names[-1]}" in _wanted()


@functools.cache
def _wanted() -> frozenset[str]:
    return frozenset(json.loads(Path(os.environ["CONFORMANCE_WANTED"]).read_text()))

"""A plugin for pytest: vLLM's tests talk to a server that runs already, with its model.

Loaded by name from this folder, as `tests` is vLLM's own package there.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest


def _stand_in_for_tblib() -> None:
    """Let vLLM's `conftest.py` load where `tblib` is missing: it shows tracebacks of children."""
    package, module = ModuleType("tblib"), ModuleType("tblib.pickling_support")
    module.install = lambda *_: None  # type: ignore[attr-defined]
    package.pickling_support = module  # type: ignore[attr-defined]
    sys.modules.update({"tblib": package, "tblib.pickling_support": module})


if importlib.util.find_spec("tblib") is None:
    _stand_in_for_tblib()  # that file is loaded before any hook is called


def pytest_configure(config: pytest.Config) -> None:
    """Have the class that starts servers start none."""
    import tests.utils as utils

    class SharedServer(utils.RemoteOpenAIServer):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.host, self.port, self.uds = "127.0.0.1", int(os.environ["CONFORMANCE_PORT"]), None

        def __enter__(self) -> "SharedServer":
            return self

        def __exit__(self, *args: object) -> None:
            pass

    utils.RemoteOpenAIServer = SharedServer  # type: ignore[attr-defined]


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Have tests load the tokenizer of the model that is served, not that of their own."""
    for item in items:
        module = getattr(item, "module", None)
        if isinstance(getattr(module, "MODEL_NAME", None), str):
            module.MODEL_NAME = os.environ["CONFORMANCE_MODEL"]

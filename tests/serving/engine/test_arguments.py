"""What vLLM's own launcher does with the arguments before it starts is done here too."""

from types import SimpleNamespace
from typing import Any

import pytest

from serving.config import ConfigError
from serving.engine.vllm.engine import vllm_arguments

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

PLUGIN = """
from vllm.tool_parsers import ToolParser, ToolParserManager

@ToolParserManager.register_module("from_a_plugin")
class FromAPlugin(ToolParser):
    pass
"""


def arguments(**engine_args: Any) -> Any:
    plan: Any = SimpleNamespace(
        device="cpu", engine_args=engine_args, model="m", served_model_name="m", aliases=()
    )
    return vllm_arguments(plan)


def test_a_plugin_is_loaded(tmp_path) -> None:
    (plugin := tmp_path / "plugin.py").write_text(PLUGIN)
    arguments(
        tool_parser_plugin=str(plugin),
        enable_auto_tool_choice=True,
        tool_call_parser="from_a_plugin",
    )


@pytest.mark.parametrize(
    ("engine_args", "message"),
    [
        ({"enable_auto_tool_choice": True}, "requires --tool-call-parser"),
        (
            {"enable_auto_tool_choice": True, "tool_call_parser": "nonsense"},
            "invalid tool call parser: nonsense",
        ),
        ({"sse_keep_alive_interval": -1}, "non-negative integer"),
    ],
)
def test_what_vllms_launcher_refuses_is_refused(engine_args: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.args: .*{message}"):
        arguments(**engine_args)

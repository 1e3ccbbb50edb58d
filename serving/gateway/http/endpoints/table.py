"""What becomes of each of vLLM's endpoints in front of several engines?

The engines say which of them they have (`EngineInfo.routes`); here is what a gateway does with it.
A test compares the table with the routes of vLLM's application, in all ways in which it can be
started, so that an upgrade cannot drop one silently, or add one that nobody has thought of.
"""

import enum
from typing import NamedTuple

from serving.gateway.intake.json_body import ENDPOINTS

INVOCATIONS = "/invocations"


class Kind(enum.Enum):
    """Who answers."""

    COMPUTES = "computes"  # it runs a model: the engine that the router chooses
    TELLS = "tells"  # nothing is computed: the engine with the least work
    KEEPS = "keeps"  # the engine that keeps the response
    EVERYWHERE = "everywhere"  # each engine, for admins; the reply has every engine's result
    OURS = "ours"  # the gateway
    REFUSED = "refused"  # nobody


class Rule(NamedTuple):
    """What becomes of one endpoint."""

    method: str  # "WS" for a web socket
    path: str
    kind: Kind
    note: str = ""  # why it is refused; else what is worth knowing


_DEV = "with `VLLM_SERVER_DEV_MODE=1`"
_SCALE_OUT = "with `enable_scale_out`"
_LORA = "with `enable_lora` and `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1`"
_PROFILER = "with `profiler_config`"
_STORE = "what is kept, with `VLLM_ENABLE_RESPONSES_API_STORE=1`"
_WEIGHTS = "a trainer updates the weights of one engine, by a group of processes that it makes"
_DOCS = "it would describe one engine, not what is served here: docs/endpoints.md"
_SCALING = "engines are added and removed here: `replicas`"

_NOTES = {
    "/v1/responses": "`previous_response_id` goes to the engine that keeps it",
    "/v1/messages": "Anthropic's API, errors in its format",
    "/v1/audio/transcriptions": "the upload passes as it is",
    "/v1/audio/translations": "the upload passes as it is",
    "/inference/v1/generate": _SCALE_OUT,
    "/cohere/v2/chat": "with `VLLM_ENABLE_COHERE_API=1`",
    INVOCATIONS: "as the endpoint that its body is for",
}
_TOLD = {
    "GET /version": "",
    "GET /tokenizer_info": "with `enable_tokenizer_info_endpoint`",
    "POST /tokenize": "",
    "POST /detokenize": "",
    "POST /v1/messages/count_tokens": "Anthropic's API, errors in its format",
    "POST /v1/chat/completions/render": _SCALE_OUT,
    "POST /v1/completions/render": _SCALE_OUT,
    "POST /v1/messages/render": _SCALE_OUT,
    "POST /v1/responses/render": _SCALE_OUT,
    "POST /cohere/v2/chat/render": _SCALE_OUT,
    "POST /v1/chat/completions/derender": _SCALE_OUT,
    "POST /v1/completions/derender": _SCALE_OUT,
}
_KEPT = {
    "GET /v1/responses/{response_id}": _STORE,
    "POST /v1/responses/{response_id}/cancel": _STORE,
}
_EVERYWHERE = {
    "POST /v1/load_lora_adapter": _LORA,
    "POST /v1/unload_lora_adapter": _LORA,
    "POST /adapters": _LORA,
    "DELETE /adapters/{adapter_name}": _LORA,
    "POST /reset_prefix_cache": _DEV,
    "POST /reset_mm_cache": _DEV,
    "POST /reset_encoder_cache": _DEV,
    "POST /sleep": _DEV,
    "POST /wake_up": _DEV,
    "GET /is_sleeping": _DEV,
    "POST /release_kv_cache_memory": _DEV,
    "POST /pause": _DEV,
    "POST /resume": _DEV,
    "GET /is_paused": _DEV,
    "GET /server_info": _DEV,
    "GET /weight_info": _DEV,
    "GET /kv_event_sources": "",
    "POST /start_profile": _PROFILER,
    "POST /stop_profile": _PROFILER,
}
_OURS = {
    "GET /health": "per model; 503 while nothing can be answered",
    "GET /ping": "as `/health`",
    "POST /ping": "as `/health`",
    "GET /load": "the requests that this gateway has open",
    "GET /metrics": "of the gateway, with every engine's state",
    "GET /v1/models": "the models of all engines and providers that the key may use",
}
_REFUSED = {
    "POST /collective_rpc": "it runs any method of an engine's workers",
    "POST /abort_requests": "it would abort requests of other clients",
    "POST /inference/v1/abort_requests": "it would abort requests of other clients",
    "POST /init_weight_transfer_engine": _WEIGHTS,
    "POST /shutdown_weight_transfer_engine": _WEIGHTS,
    "POST /start_weight_update": _WEIGHTS,
    "POST /start_draft_weight_update": _WEIGHTS,
    "POST /update_weights": _WEIGHTS,
    "POST /finish_weight_update": _WEIGHTS,
    "POST /update_weight_version": _WEIGHTS,
    "POST /weight_checker": _WEIGHTS,
    "GET /get_world_size": _WEIGHTS,
    "POST /scale_elastic_ep": _SCALING,
    "POST /is_scaling_elastic_ep": _SCALING,
    "POST /fault_tolerance/apply": "engines that fail are replaced here",
    "GET /fault_tolerance/status": "engines that fail are replaced here: /headway/state",
    "WS /v1/realtime": "a session on a web socket cannot go on in another engine",
    "GET /openapi.json": _DOCS,
    "GET /docs": _DOCS,
    "GET /docs/oauth2-redirect": _DOCS,
    "GET /redoc": _DOCS,
}


def _split(route: str) -> tuple[str, str]:
    method, _, path = route.partition(" ")
    return method, path


def _rules(kind: Kind, notes: dict[str, str]) -> list[Rule]:
    return [Rule(*_split(route), kind, note) for route, note in notes.items()]


RULES: tuple[Rule, ...] = (
    *(
        Rule("POST", path, Kind.COMPUTES, _NOTES.get(path, ""))
        for path in (*ENDPOINTS, INVOCATIONS)
    ),
    *_rules(Kind.KEEPS, _KEPT),
    *_rules(Kind.TELLS, _TOLD),
    *_rules(Kind.EVERYWHERE, _EVERYWHERE),
    *_rules(Kind.OURS, _OURS),
    *_rules(Kind.REFUSED, _REFUSED),
)

COMPUTED = tuple(rule.path for rule in RULES if rule.kind is Kind.COMPUTES)
# Pages of anybody may call these, beside all below /v1/ that is not for admins.
_HARMLESS = {rule.path for rule in RULES if rule.kind is Kind.TELLS} | {"/ping", "/load"}
_FOR_ADMINS = {rule.path for rule in RULES if rule.kind is Kind.EVERYWHERE}
_KEEP_FILES = ("/v1/files", "/v1/batches")  # on our disk: not for just any page

_WHO = {
    Kind.COMPUTES: "the engine that the router chooses",
    Kind.TELLS: "the engine with the least work",
    Kind.KEEPS: "the engine that keeps the response",
    Kind.EVERYWHERE: "every engine, for an admin key",
    Kind.OURS: "the gateway",
    Kind.REFUSED: "refused",
}


def is_for_anybody(path: str) -> bool:
    """Whether web pages of anybody may call a path where no key is needed."""
    if path in _FOR_ADMINS or path.startswith(_KEEP_FILES):
        return False
    return path.startswith(("/v1/", "/health")) or path in _HARMLESS


def as_markdown() -> str:
    """Return the table as docs/endpoints.md has it."""
    lines = ["| endpoint | who answers | |", "|---|---|---|"]
    lines += [
        f"| `{rule.method} {rule.path}` | {_WHO[rule.kind]} | {rule.note} |" for rule in RULES
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_markdown(), end="")

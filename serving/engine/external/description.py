"""What kind of engine is a server? Asked once per connection, in the server's own words."""

import asyncio
import logging
import os
from typing import Any

import msgspec

from router import EngineInfo
from serving.config import ConfigError
from serving.config.providers import ExternalConfig
from serving.engine.external.http_client import Answer, HttpClient, ask
from serving.engine.external.metrics import (
    PATH_OF_ALL,
    PATH_OF_CONFIG,
    CacheSize,
    read_cache_size,
)

logger = logging.getLogger(__name__)

_TIMEOUT_S = 10.0  # per question
_RETRY_S = (0.5, 1.0, 2.0, 5.0)  # between tries; the last one for ever
_SAY_AGAIN_S = 60.0  # that a server is still away
HEARTBEAT_S = 0.5  # between two looks at a server that is idle
DEAD = (500, 502, 503, 504)  # of /health: vLLM answers so when its engine has died
_ANY_LENGTH = 2**20  # tokens, of a server that does not say how long contexts may be
# Of vLLM's tasks, those that show by a route. Where no routes are told, it generates.
_ROUTES_OF_TASKS = {
    "generate": "POST /v1/chat/completions",
    "embed": "POST /v1/embeddings",
    "classify": "POST /classify",
}


class Unusable(Exception):
    """The server cannot be used now; the message says why, and what to change."""


class Described(msgspec.Struct, frozen=True):
    """A server, as it describes itself."""

    info: EngineInfo
    is_vllm: bool
    their_names: dict[str, str]  # the server's name of a model by ours, where they differ


class _Card(msgspec.Struct):
    id: str
    owned_by: str | None = None
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


class _Version(msgspec.Struct):
    version: str


class _OpenApi(msgspec.Struct):
    paths: dict[str, dict[str, Any]]


def read_key(config: ExternalConfig) -> str | None:
    """Return the key of a server; None if it needs none. Raise `ConfigError`, without the key."""
    key, source = None, "external: key"
    if config.key is not None:
        key = config.key.get_secret_value()
    elif config.key_env is not None:
        key, source = os.environ.get(config.key_env, ""), f"external: key_env {config.key_env}"
    if key is None:
        return None
    if not (key := key.strip()) or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{source} ({config.name}): there is no key in it, or more than one")
    return key


async def describe_when_up(client: HttpClient, config: ExternalConfig) -> Described:
    """Return what the server says of itself once it can be used; say why it cannot until then."""
    loop = asyncio.get_running_loop()
    said, said_s, num_tries = "", 0.0, 0
    while True:
        try:
            described = await describe(client, config)
        except Unusable as error:
            why = str(error)
        else:
            info = described.info
            names = ", ".join((info.model, *info.aliases))
            logger.info("%s serves %s (%s)", config.url, names, info.engine)
            return described
        if why != said or loop.time() - said_s > _SAY_AGAIN_S:
            logger.warning("%s cannot be used, and is tried again: %s", config.url, why)
            said, said_s = why, loop.time()
        await asyncio.sleep(_RETRY_S[min(num_tries, len(_RETRY_S) - 1)])
        num_tries += 1


async def describe(client: HttpClient, config: ExternalConfig) -> Described:
    """Return what the server says of itself. Raise `Unusable`."""
    if (status := await _health(client)) in DEAD:
        raise Unusable(f"GET /health answers {status}: its engine is not up")
    cards = await _cards(client)
    is_vllm = any(card.owned_by == "vllm" for card in cards)
    model, their_names = _choose_model(cards, config)
    first = next((card for card in cards if card.id == their_names.get(model, model)), cards[0])
    aliases = tuple(card.id for card in cards if card.id not in (model, their_names.get(model)))
    adapters = {card.id: card.root or card.id for card in cards if card.parent is not None}
    routes = await _routes(client)
    version = await _version(client)
    size = await _cache_size(client) if is_vllm else None
    max_model_len = first.max_model_len or _ANY_LENGTH
    if size is None:  # as much as its sequences may need: it does not tell
        size = CacheSize(config.max_num_seqs * min(max_model_len, _ANY_LENGTH // 8), 16)
    tasks = tuple(task for task, route in _ROUTES_OF_TASKS.items() if route in routes)
    engine = f"vLLM {version}" if is_vllm else "OpenAI-compatible server"
    info = EngineInfo(
        model=model,
        aliases=aliases,
        adapters=adapters,
        root=first.root or "",
        tasks=tasks or (tuple(_ROUTES_OF_TASKS) if not routes else ()),
        routes=tuple(routes),
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        num_kv_tokens=size.num_tokens,
        block_size=size.block_size,
        device=f"of {config.name}",  # what its steps take is nobody else's
        engine=f"{engine}, external".replace("  ", " "),
        heartbeat_s=HEARTBEAT_S,
        is_external=True,
    )
    return Described(info, is_vllm, their_names)


def _choose_model(cards: list[_Card], config: ExternalConfig) -> tuple[str, dict[str, str]]:
    """Return the model's name for clients, and the server's names where they differ."""
    names = [card.id for card in cards if card.parent is None] or [card.id for card in cards]
    if config.model is None or config.model in [card.id for card in cards]:
        return config.model or names[0], {}
    roots = {card.root or card.id for card in cards if card.parent is None}
    if len(roots) > 1:
        raise Unusable(
            f"it has no model {config.model} (external.model), but {', '.join(sorted(names))}"
        )
    return config.model, {config.model: names[0]}


async def _cards(client: HttpClient) -> list[_Card]:
    try:
        answer = await ask(client, "/v1/models", _TIMEOUT_S)
    except ConnectionError as error:
        raise Unusable(str(error)) from None
    except TimeoutError:
        raise Unusable(f"GET /v1/models is not answered within {_TIMEOUT_S:g} s") from None
    if answer.status in (401, 403):
        raise Unusable(f"GET /v1/models answers {answer.status}: set external.key, or another one")
    if answer.status != 200:
        raise Unusable(f"GET /v1/models answers {answer.status}: is external.url right?")
    try:
        cards = msgspec.json.decode(answer.body, type=_Cards).data
    except msgspec.MsgspecError:
        cards = []
    if not cards:
        raise Unusable("GET /v1/models names no model: is it an OpenAI-compatible server?")
    return cards


async def _optional(client: HttpClient, path: str) -> Answer | None:
    """Return the answer to what not every server has; None if there is none. Raise `Unusable`."""
    try:
        answer = await ask(client, path, _TIMEOUT_S)
    except TimeoutError:
        return None
    except ConnectionError as error:
        raise Unusable(str(error)) from None
    return answer if answer.status == 200 else None


async def _health(client: HttpClient) -> int:
    try:
        return (await ask(client, "/health", _TIMEOUT_S)).status
    except TimeoutError:
        raise Unusable(f"GET /health is not answered within {_TIMEOUT_S:g} s") from None
    except ConnectionError as error:
        raise Unusable(str(error)) from None


async def _version(client: HttpClient) -> str:
    answer = await _optional(client, "/version")
    try:
        return msgspec.json.decode(answer.body, type=_Version).version if answer else ""
    except msgspec.MsgspecError:
        return ""


async def _routes(client: HttpClient) -> list[str]:
    """Return what the server's API answers, as "POST /v1/messages"; empty if it does not tell."""
    answer = await _optional(client, "/openapi.json")
    try:
        paths = msgspec.json.decode(answer.body, type=_OpenApi).paths if answer else {}
    except msgspec.MsgspecError:
        return []
    return sorted(f"{method.upper()} {path}" for path, said in paths.items() for method in said)


async def _cache_size(client: HttpClient) -> CacheSize | None:
    for path in (PATH_OF_CONFIG, PATH_OF_ALL):
        answer = await _optional(client, path)
        if answer is not None and (size := read_cache_size(answer.body.decode(errors="replace"))):
            return size
    return None

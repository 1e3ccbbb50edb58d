"""Carries out `Fallback` decisions: calls to providers, and how each one ends."""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec
from pydantic import SecretStr

from router.core.router import Router
from router.resilience.breaker import Failure
from router.types import Decision, Fallback, Usage
from serving.config import Config, ProviderConfig
from serving.gateway.exchange import DONE, Exchange
from serving.gateway.providers.continuation import Continuation, can_continue
from serving.gateway.providers.credentials import read_api_keys
from serving.gateway.providers.event_reader import ReplyReader
from serving.gateway.providers.http_client import Client, HttpClient, ProviderFailed, Reply
from serving.gateway.providers.leases import Leases
from serving.gateway.providers.rate_headers import rate_report
from serving.stream.frames import Headers

logger = logging.getLogger(__name__)

# Replies that tell of the request, which any other provider would refuse as well.
_CLIENTS_FAULT = frozenset((400, 413, 415, 422))
# Replies that the next call under the same key would get, too.
_KEYS_FAULT = frozenset((401, 402, 403))
# OpenAI's codes of a 429 that no waiting helps against.
_OUT_OF_MONEY = (b"insufficient_quota", b"billing_hard_limit_reached")
_MAX_ERROR_BYTES = 64 * 2**10
# Fields of the body that mean something to us alone.
_OURS = ("priority_class",)
# Endpoints whose streams bear usage only if asked to.
_USAGE_ON_REQUEST = frozenset(("/v1/chat/completions", "/v1/completions"))


class Owner(Protocol):
    """Whoever has the exchanges; told what came of a call, on the event loop."""

    def execute(self, decisions: list[Decision]) -> None: ...
    def on_first_byte(self, exchange: Exchange) -> None: ...
    def on_complete(self, exchange: Exchange, usage: Usage | None) -> None: ...


class _Refused(Exception):
    """The provider has answered 429."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        super().__init__("429")
        self.headers = headers


class Call:
    """One exchange at one provider."""

    def __init__(self, exchange: Exchange, window_bytes: int) -> None:
        self.exchange = exchange
        self.has_begun = False  # the reply
        self.task: asyncio.Task[None] | None = None
        self._credit_bytes = window_bytes
        self._credit = asyncio.Event()

    def taken(self, num_bytes: int) -> None:
        """The client has taken so many bytes."""
        self._credit_bytes += num_bytes
        self._credit.set()

    async def pass_on(self, data: bytes) -> None:
        """Give bytes to the client; returns when it keeps up."""
        self.exchange.reply.write(data)
        self.exchange.on_data(data)
        self._credit_bytes -= len(data)
        while self._credit_bytes <= 0:
            self._credit.clear()
            await self._credit.wait()


class Providers:
    """The clients of all providers, and the calls that are open."""

    def __init__(
        self,
        router: Router,
        owner: Owner,
        window_bytes: int,
        leases: Leases | None = None,
    ) -> None:
        self._router = router
        self._owner = owner
        self._leases = leases
        self._window_bytes = window_bytes
        self._configs: dict[str, ProviderConfig] = {}
        self._keys: dict[str, dict[str, SecretStr | None]] = {}
        self._clients: dict[str, Client] = {}
        self._calls: dict[str, Call] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def use(self, config: Config) -> None:
        """Go by this configuration's providers from now on; open calls go on as they began.

        Raises `ConfigError`, and changes nothing, if a key cannot be read or an extra
        is not installed.
        """
        keys = {provider.name: read_api_keys(provider) for provider in config.providers}
        configs = {provider.name: provider for provider in config.providers}
        changed = [name for name, each in configs.items() if self._configs.get(name) != each]
        made = {name: _make_client(configs[name]) for name in changed}
        for name in changed + [name for name in self._configs if name not in configs]:
            if (client := self._clients.pop(name, None)) is not None:
                self._later(self._close_when_idle(client))
        self._clients |= made
        self._configs, self._keys = configs, keys
        settings = (config.providers, config.fallback, time.monotonic())
        if self._leases is None:
            self._owner.execute(self._router.use_providers(*settings))
        else:
            self._owner.execute(self._router.use_providers(*settings, self._leases.make))

    @property
    def models(self) -> list[str]:
        """Our names of the models that providers answer for, those of the first first."""
        return list(dict.fromkeys(name for each in self._configs.values() for name in each.models))

    @property
    def _continues(self) -> bool:
        """Whether any provider goes on with what another has begun."""
        return any(each.continues for each in self._configs.values())

    def start(self, exchange: Exchange, decision: Fallback) -> None:
        """Send the exchange to the provider."""
        call = self._calls[exchange.request.id] = Call(exchange, self._window_bytes)
        # As things are now: the configuration may change before the task begins.
        config = self._configs[decision.provider]
        api_key = self._keys[decision.provider][decision.key]
        client = self._clients[decision.provider]
        name = f"{decision.provider}/{decision.key}"
        call.task = asyncio.get_running_loop().create_task(
            self._run(call, name, config, client, api_key)
        )

    def taken(self, exchange: Exchange, num_bytes: int) -> None:
        """The client has taken so much of the response."""
        if (call := self._calls.get(exchange.request.id)) is not None:
            call.taken(num_bytes)

    def cancel(self, exchange: Exchange) -> None:
        """The client has left: hang up."""
        call = self._calls.pop(exchange.request.id, None)
        if call is not None and call.task is not None:
            call.task.cancel()

    def rearm(self) -> None:
        """The router was asked something: shared budgets may have to hear of it."""
        if self._leases is not None:
            self._leases.rearm()

    def close(self) -> None:
        """Leave: hang up everywhere."""
        if self._leases is not None:
            self._leases.close()
        for call in self._calls.values():
            if call.task is not None:
                call.task.cancel()
        for client in self._clients.values():
            self._later(client.close())
        self._clients = {}

    async def _run(
        self,
        call: Call,
        name: str,
        config: ProviderConfig,
        client: Client,
        api_key: SecretStr | None,
    ) -> None:
        """Make the call and report how it ended."""
        exchange = call.exchange
        request_id = exchange.request.id
        try:
            usage = await self._ask(call, config, client, api_key)
        except _Refused as refused:
            report = rate_report(refused.headers)
            logger.info("provider %s answered 429 (%s)", name, report)
            self._end(call)
            self._owner.execute(
                self._router.on_provider_refused(request_id, report, time.monotonic())
            )
        except ProviderFailed as failed:
            self._failed(call, name, failed)
        except TimeoutError:
            words = "it stalled" if call.has_begun else "no first token in time"
            self._failed(call, name, ProviderFailed(words, Failure.TIMEOUT))
        except Exception as error:  # a client library's own: the exchange must end all the same
            logger.exception("call to provider %s", name)
            self._failed(call, name, ProviderFailed(type(error).__name__))
        else:
            self._end(call)
            self._owner.on_complete(exchange, usage)

    def _failed(self, call: Call, name: str, failed: ProviderFailed) -> None:
        exchange = call.exchange
        logger.warning("provider %s failed: %s", name, failed)
        self._end(call)
        exchange.failure, exchange.failed_s = f"provider {name}: {failed}", time.monotonic()
        continuation = exchange.continuation
        if continuation is not None and continuation.has_finished:
            exchange.on_data(DONE)  # nothing is missing but the end, and perhaps the usage
            self._owner.on_complete(exchange, None)
            return
        self._owner.execute(
            self._router.on_provider_failed(
                exchange.request.id,
                failed.failure,
                time.monotonic(),
                can_retry=not exchange.reply.has_begun,
                num_output_tokens=(
                    continuation.num_new_tokens
                    if continuation is not None and continuation.is_text
                    else None
                ),
                was_sent=failed.was_sent,
                lasts=failed.lasts,
            )
        )

    def _end(self, call: Call) -> None:
        if self._calls.get(call.exchange.request.id) is call:
            del self._calls[call.exchange.request.id]

    async def _ask(
        self, call: Call, config: ProviderConfig, client: Client, api_key: SecretStr | None
    ) -> Usage | None:
        """Pass the provider's reply on; return its usage if it said."""
        exchange = call.exchange
        body, hides_usage = _body_for(config, exchange)
        continuation = exchange.continuation
        if continuation is not None:
            continuation.move()
            body = continuation.body(body)
        elif self._continues and can_continue(exchange.path, body):
            continuation = Continuation()
        is_stream = bool(body.get("stream"))
        reader = ReplyReader(stream=is_stream, hides_usage=hides_usage)
        first_s = config.first_token_timeout_s if is_stream else config.whole_timeout_s
        async with (
            asyncio.timeout(first_s) as timer,
            client.ask(exchange.path, body, api_key) as reply,
        ):
            await self._judge(call, reply)
            # Nothing is passed on before a first event shows that all is well.
            passed = b""
            loop = asyncio.get_running_loop()
            async for chunk in reply.chunks():
                passed += reader.feed(chunk)
                if not passed:
                    continue
                if reader.error is not None and (continuation is not None or not call.has_begun):
                    raise ProviderFailed(f"it answered with an error: {reader.error}")
                if continuation is not None and not (passed := continuation.take(passed)):
                    continue
                if not call.has_begun:
                    exchange.continuation = continuation
                    self._begin(call, config, reply)
                timer.reschedule(None)  # a slow reader is not the provider's fault
                await call.pass_on(passed)
                passed = b""
                timer.reschedule(loop.time() + config.stall_timeout_s)
            timer.reschedule(None)
            if not reader.is_complete and reply.status == 200:
                raise ProviderFailed("the reply broke off")
            if rest := reader.end():
                if not call.has_begun:
                    self._begin(call, config, reply)
                await call.pass_on(rest)
            if not call.has_begun:
                raise ProviderFailed("it answered nothing")
        return reader.usage

    async def _judge(self, call: Call, reply: Reply) -> None:
        """Take in status and headers; raises for what is not to be passed on."""
        exchange = call.exchange
        status = reply.status
        if status == 429:
            text = await _error_text(reply)
            if any(code in text for code in _OUT_OF_MONEY):
                raise ProviderFailed("the account has no money left", lasts=True)
            raise _Refused(reply.headers)
        report = rate_report(reply.headers)
        self._router.on_provider_answer(exchange.request.id, report, time.monotonic())
        if status in _KEYS_FAULT:
            raise ProviderFailed(f"it answered {status}: the key is not accepted", lasts=True)
        if status != 200 and (exchange.reply.has_begun or status not in _CLIENTS_FAULT):
            raise ProviderFailed(f"it answered {status}")

    def _begin(self, call: Call, config: ProviderConfig, reply: Reply) -> None:
        call.has_begun = True
        exchange = call.exchange
        kind = reply.headers.get("content-type", "application/json")
        headers: Headers = [
            (b"content-type", kind.encode("latin-1")),
            (b"x-headway-provider", config.name.encode()),
        ]
        exchange.on_head(reply.status, headers)
        self._owner.on_first_byte(exchange)

    async def _close_when_idle(self, client: Client) -> None:
        """Close a client that is used no more, once no call of ours is open (it may be on it)."""
        while calls := [call.task for call in self._calls.values() if call.task is not None]:
            await asyncio.wait(calls)
        await client.close()

    def _later(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _make_client(config: ProviderConfig) -> Client:
    if config.kind == "litellm":
        from serving.gateway.providers.litellm_client import (
            LitellmClient,  # the extra may not be installed
        )

        return LitellmClient(config)
    return HttpClient(config)


def _body_for(config: ProviderConfig, exchange: Exchange) -> tuple[dict[str, Any], bool]:
    """Return the body to send, and whether the reply's chunk of usage is for us alone."""
    body: dict[str, Any] = {**config.defaults, **msgspec.json.decode(exchange.body)}
    body["model"] = config.models[exchange.request.model]
    for field in _OURS:
        body.pop(field, None)
    hides_usage = False
    if config.asks_usage and body.get("stream") and exchange.path in _USAGE_ON_REQUEST:
        options = body.get("stream_options") or {}
        hides_usage = not options.get("include_usage")
        body["stream_options"] = {**options, "include_usage": True}
    return body, hides_usage


async def _error_text(reply: Reply) -> bytes:
    text = b""
    async for chunk in reply.chunks():
        text += chunk
        if len(text) > _MAX_ERROR_BYTES:
            break
    return text

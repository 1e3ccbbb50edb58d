r"""What becomes of a `Fallback` decision: how is the provider called, and how did the call end?

    started --first event is good--> begun --whole--> complete
      |  \--429--> refused             |
      \--------------------------------+--breaks off, stalls, or is an error--> failed

Each call ends in exactly one of these, unless it is cancelled because the client has left. Its
end is told to `CallEvents`.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, Protocol

from pydantic import SecretStr

from router import Failure, Fallback, Usage
from router.limits.rate_limit import RateReport
from router.providers.provider import MakeLimiter
from router.providers.spillover import make_rate_limiter
from serving.config import Config, ProviderConfig
from serving.gateway.exchange import DONE, Exchange
from serving.gateway.intake.json_body import read_object
from serving.gateway.providers.continuation import Continuation, can_continue
from serving.gateway.providers.credentials import read_api_keys
from serving.gateway.providers.event_reader import ReplyReader
from serving.gateway.providers.http_client import (
    Client,
    HttpClient,
    ProviderFailed,
    ProviderReply,
)
from serving.gateway.providers.leases import Leases
from serving.gateway.providers.provider_error import ErrorCause, ProviderError, decode_error
from serving.gateway.providers.rate_headers import rate_report
from serving.stream.frames import Headers

logger = logging.getLogger(__name__)

_MAX_ERROR_BYTES = 2**20  # validation errors say the request back
_MAX_WORDS = 500  # of an error's message that are passed on
_END_S = 1.0  # for the end of the connection after the end of the reply
# Fields of the body that mean something to us alone.
_OURS = ("priority_class",)
# Endpoints whose streams bear usage only if asked to.
_USAGE_ON_REQUEST = frozenset(("/v1/chat/completions", "/v1/completions"))


class CallEvents(Protocol):
    """Who has the exchanges, told on the event loop of what became of a call."""

    def on_provider_answer(self, exchange: Exchange, report: RateReport) -> None:
        """Take in what the headers of the reply say of the key's limits."""
        ...

    def on_provider_first_byte(self, exchange: Exchange) -> None:
        """Note that the client is about to get the first bytes of this call's reply."""
        ...

    def on_provider_complete(self, exchange: Exchange, usage: Usage | None) -> None:
        """End the exchange: it was answered whole."""
        ...

    def on_provider_refused(self, exchange: Exchange, report: RateReport) -> None:
        """Have the exchange placed elsewhere: the provider answered 429."""
        ...

    def on_provider_failed(self, exchange: Exchange, failed: ProviderFailed, words: str) -> None:
        """Have the exchange placed elsewhere, or end it: the call failed, as `words` say."""
        ...


class _Refused(Exception):
    """The provider has answered 429, by its status or in words."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        super().__init__("429")
        self.headers = headers


class ProviderCall:
    """One exchange at one provider."""

    def __init__(self, exchange: Exchange, window_bytes: int, events: CallEvents) -> None:
        self.exchange = exchange
        self.events = events
        self.has_begun = False  # to answer: content goes to the client
        self.reader: ReplyReader | None = None  # of the reply, once it was asked for
        self.task: asyncio.Task[None] | None = None
        self._credit_bytes = window_bytes  # may be passed on before the client takes any
        self._credit = asyncio.Event()

    def acknowledge_bytes(self, num_bytes: int) -> None:
        """Let so many bytes more be passed on: the client has taken as many."""
        self._credit_bytes += num_bytes
        self._credit.set()

    async def pass_bytes(self, data: bytes) -> None:
        """Give bytes to the client. Return when it keeps up."""
        self.exchange.reply.write(data)
        self.exchange.on_data(data)
        self._credit_bytes -= len(data)
        while self._credit_bytes <= 0:
            self._credit.clear()
            await self._credit.wait()


class Providers:
    """The clients of all providers, and the calls that are open."""

    def __init__(self, window_bytes: int, leases: Leases | None = None) -> None:
        """`leases` where several gateways share the limits."""
        self._leases = leases
        self._window_bytes = window_bytes
        self.models: list[str] = []  # that providers answer for, by our names, in their order
        self._configs: dict[str, ProviderConfig] = {}
        self._keys: dict[str, dict[str, SecretStr | None]] = {}
        self._clients: dict[str, Client] = {}
        self._calls: dict[str, ProviderCall] = {}  # by request
        self._closing: set[asyncio.Task[None]] = set()

    def use_config(self, config: Config) -> None:
        """Take keys and clients from this configuration; open calls go on as they began.

        Raises `ConfigError`, and changes nothing, if a key cannot be read or an extra
        is not installed.
        """
        keys = {provider.name: read_api_keys(provider) for provider in config.providers}
        configs = {provider.name: provider for provider in config.providers}
        changed = [name for name, each in configs.items() if self._configs.get(name) != each]
        made = {name: _make_client(configs[name]) for name in changed}
        for name in changed + [name for name in self._configs if name not in configs]:
            if (client := self._clients.pop(name, None)) is not None:
                self._spawn(self._close_when_idle(client))
        self._clients |= made
        self._configs, self._keys = configs, keys
        self.models = list(dict.fromkeys(name for each in configs.values() for name in each.models))

    @property
    def make_limiter(self) -> MakeLimiter:
        """What makes the rate limiter of a key that is new."""
        return make_rate_limiter if self._leases is None else self._leases.make_limiter

    @property
    def _continues(self) -> bool:
        """Whether any provider goes on with what another has begun."""
        return any(each.continues for each in self._configs.values())

    def start_call(self, exchange: Exchange, decision: Fallback, events: CallEvents) -> None:
        """Send the exchange to the provider, under the key that was decided."""
        call = ProviderCall(exchange, self._window_bytes, events)
        self._calls[exchange.request.id] = call
        # As things are now: the configuration may change before the task begins.
        config = self._configs[decision.provider]
        api_key = self._keys[decision.provider][decision.key]
        client = self._clients[decision.provider]
        name = f"{decision.provider}/{decision.key}"
        call.task = asyncio.get_running_loop().create_task(
            self._run(call, name, config, client, api_key)
        )

    def acknowledge_bytes(self, exchange: Exchange, num_bytes: int) -> None:
        """Let the call go on: the client has taken so much of the response."""
        if (call := self._calls.get(exchange.request.id)) is not None:
            call.acknowledge_bytes(num_bytes)

    def cancel_call(self, exchange: Exchange) -> None:
        """Hang up, if the exchange is at a provider: its client has left."""
        call = self._calls.pop(exchange.request.id, None)
        if call is not None and call.task is not None:
            call.task.cancel()

    def rearm_timer(self) -> None:
        """Set the timer of the leases anew: the router was asked something."""
        if self._leases is not None:
            self._leases.rearm_timer()

    def close(self) -> None:
        """Hang up everywhere."""
        if self._leases is not None:
            self._leases.close()
        for call in self._calls.values():
            if call.task is not None:
                call.task.cancel()
        for client in self._clients.values():
            self._spawn(client.close())
        self._clients = {}

    async def _run(
        self,
        call: ProviderCall,
        name: str,
        config: ProviderConfig,
        client: Client,
        api_key: SecretStr | None,
    ) -> None:
        """Make the call and tell how it ended."""
        exchange, events = call.exchange, call.events
        try:
            await self._relay_reply(call, config, client, api_key)
        except _Refused as refused:
            report = rate_report(refused.headers)
            logger.info("provider %s answered 429 (%s)", name, report)
            self._forget_call(call)
            events.on_provider_refused(exchange, report)
        except ProviderFailed as failed:
            self._fail_call(call, name, failed)
        except TimeoutError:
            words = "it stalled" if call.has_begun else "no first token in time"
            self._fail_call(call, name, ProviderFailed(words, Failure.TIMEOUT))
        except Exception as error:  # a client library's own: the exchange must end all the same
            logger.exception("call to provider %s", name)
            self._fail_call(call, name, ProviderFailed(type(error).__name__))
        else:
            self._complete_call(call)

    def _complete_call(self, call: ProviderCall) -> None:
        """Tell that a call's answer is whole; give the client the end that is missing."""
        self._forget_call(call)
        reader = call.reader
        if reader is not None and reader.is_whole and not reader.is_complete:
            call.exchange.on_data(DONE)
        call.events.on_provider_complete(call.exchange, reader.usage if reader else None)

    def _fail_call(self, call: ProviderCall, name: str, failed: ProviderFailed) -> None:
        """Tell that a call has failed, or that it is complete if only its end is missing."""
        logger.warning("provider %s failed: %s", name, failed)
        if call.has_begun and call.reader is not None and call.reader.is_whole:
            self._complete_call(call)
            return
        self._forget_call(call)
        call.events.on_provider_failed(call.exchange, failed, f"provider {name}: {failed}")

    def _forget_call(self, call: ProviderCall) -> None:
        if self._calls.get(call.exchange.request.id) is call:
            del self._calls[call.exchange.request.id]

    async def _relay_reply(
        self, call: ProviderCall, config: ProviderConfig, client: Client, api_key: SecretStr | None
    ) -> None:
        """Pass the provider's reply on. Raises `_Refused`, `ProviderFailed` and `TimeoutError`."""
        exchange = call.exchange
        body, hides_usage = _body_for(config, exchange)
        continuation = exchange.continuation
        if continuation is not None:
            continuation.move_on()
            body = continuation.body_for_rest(body)
        elif self._continues and can_continue(exchange.path, body):
            continuation = Continuation()
        is_stream = bool(body.get("stream"))
        first_s = config.first_token_timeout_s if is_stream else config.whole_timeout_s
        async with (
            asyncio.timeout(first_s) as timer,
            client.post(exchange.path, body, api_key) as reply,
        ):
            if reply.status != 429:
                call.events.on_provider_answer(exchange, rate_report(reply.headers))
            if reply.status != 200:
                text = await _clients_error(call, reply)
                timer.reschedule(None)
                self._begin_reply(call, config, reply)
                await call.pass_bytes(text)
                return
            loop = asyncio.get_running_loop()
            reader = call.reader = ReplyReader(
                stream=is_stream, hides_usage=hides_usage, num_choices=_num_choices(exchange, body)
            )
            # Nothing is passed on before some content shows that this is an answer.
            async for passed in _pieces(reply, reader):
                if reader.error is not None and not (call.has_begun or reader.is_whole):
                    break  # nobody has seen what came before it
                events = passed if continuation is None else continuation.pass_events(passed)
                if events:
                    left_s = (timer.when() or 0.0) - loop.time()
                    timer.reschedule(None)  # a slow client is not the provider's fault
                    if not call.has_begun:
                        exchange.continuation = continuation
                        self._begin_reply(call, config, reply)
                    await call.pass_bytes(events)
                    # A comment tells that the connection lives, not that somebody answers.
                    stall_s = config.stall_timeout_s if reader.has_news else left_s
                    timer.reschedule(loop.time() + (_END_S if reader.is_complete else stall_s))
                if reader.error is not None:
                    break
            if reader.error is not None:
                raise _exception_of(call, reply, reader.error)
            if not reader.is_whole:
                raise ProviderFailed(
                    "the reply broke off" if call.has_begun else "it answered nothing"
                )

    def _begin_reply(
        self, call: ProviderCall, config: ProviderConfig, reply: ProviderReply
    ) -> None:
        """Give status and headers to the client."""
        call.has_begun = True
        exchange = call.exchange
        kind = reply.headers.get("content-type", "application/json")
        headers: Headers = [
            (b"content-type", kind.encode("latin-1")),
            (b"x-headway-provider", config.name.encode()),
        ]
        exchange.on_head(reply.status, headers)
        call.events.on_provider_first_byte(exchange)

    async def _close_when_idle(self, client: Client) -> None:
        """Close a client that is used no more, once no call of ours is open (it may be on it)."""
        while calls := [call.task for call in self._calls.values() if call.task is not None]:
            await asyncio.wait(calls)
        await client.close()

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
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
    # Fields that we know as vLLM takes them: what a service gets need not be as lax.
    said = {**read_object(exchange.body), **exchange.fields.given()}
    body: dict[str, Any] = {**config.defaults, **said}
    chosen = exchange.journey.chosen
    for field in (*_OURS, *(chosen.fields if chosen is not None else ())):
        body.pop(field, None)
    body["model"] = config.models[exchange.request.model]
    hides_usage = False
    if config.asks_usage and body.get("stream") and exchange.path in _USAGE_ON_REQUEST:
        options = body.get("stream_options") or {}
        hides_usage = not options.get("include_usage")
        body["stream_options"] = {**options, "include_usage": True}
    return body, hides_usage


def _num_choices(exchange: Exchange, body: dict[str, Any]) -> int:
    """How many choices the reply to a request has: `n` for each of its prompts."""
    n = body.get("n")
    return exchange.request.num_prompts * (n if isinstance(n, int) else 1)


async def _pieces(reply: ProviderReply, reader: ReplyReader) -> AsyncIterator[bytes]:
    """What the client is to get of a reply, as it comes."""
    async for chunk in reply.chunks():
        yield reader.feed(chunk)
    yield reader.flush()


async def _clients_error(call: ProviderCall, reply: ProviderReply) -> bytes:
    """Return the body of an error that is the client's own fault. Raise what any other is."""
    text = b""
    async for chunk in reply.chunks():
        text += chunk
        if len(text) > _MAX_ERROR_BYTES:
            break
    error = decode_error(text) or ProviderError()
    is_clients = error.cause(reply.status) is ErrorCause.REQUEST
    if not text or not is_clients or call.exchange.reply.has_begun:
        raise _exception_of(call, reply, error)
    return text


def _exception_of(call: ProviderCall, reply: ProviderReply, error: ProviderError) -> Exception:
    """Return what to raise for an error that the provider answered with."""
    cause, status = error.cause(reply.status), reply.status
    if cause is ErrorCause.RATE and not call.has_begun:
        return _Refused(reply.headers)
    if cause is ErrorCause.MONEY:
        return ProviderFailed("the account has no money left", lasts=True)
    if cause is ErrorCause.KEY:  # not in its words: they may hold the key
        return ProviderFailed(f"it answered {status}: the key is not accepted", lasts=True)
    words = f"with an error: {error.message[:_MAX_WORDS]}" if status == 200 else str(status)
    return ProviderFailed(f"it answered {words}", may_be_requests=cause is ErrorCause.UNKNOWN)

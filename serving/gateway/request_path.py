"""Which way does one request take through the gateway, from its body to the last token?"""

import asyncio
import contextlib
import functools
import time
import uuid
from collections.abc import Callable

from starlette.types import Message, Receive, Scope, Send

from serving.config import Config
from serving.gateway.cache.response_cache import Replay, ResponseCache
from serving.gateway.cache.single_flight import Subscriber
from serving.gateway.driver import Driver
from serving.gateway.exchange import EngineFailed, Exchange, Rejected
from serving.gateway.http.body_reader import BodyReader
from serving.gateway.http.errors import ApiError, rejection_error
from serving.gateway.http.keep_alive import KeepAlive, as_event, as_stream
from serving.gateway.http.own_headers import own_headers, request_id_of, set_request_id
from serving.gateway.intake.request_headers import read_headers
from serving.gateway.intake.request_parser import RequestParser
from serving.gateway.providers.calls import Providers
from serving.gateway.tenants.tenants import AdmittedRequest, Tenant, Tenants
from serving.stream.frames import Headers


class RequestPath:
    """A plain ASGI application: tokens pass through no response object.

    It asks in this order: the tenants who the caller is, the body reader for the body, the parser
    what is asked for, the tenants whether the caller may; then the cache, and the driver if
    the cache has no answer. It is an instance, not a function, because Starlette would
    call a function with request and response objects.
    """

    def __init__(
        self,
        config: Config,
        driver: Driver,
        body_reader: BodyReader,
        request_parser: RequestParser,
        providers: Providers,
        tenants: Tenants,
        cache: ResponseCache,
    ) -> None:
        self._config = config
        self._driver = driver
        self._body_reader = body_reader
        self._request_parser = request_parser
        self._providers = providers
        self._tenants = tenants
        self._cache = cache

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request to one of `ENDPOINTS`. Raise `ApiError` for one that is refused."""
        caller = self._tenants.authenticate(scope["headers"])
        body = await self._body_reader.read_body(scope, receive)
        if body is None:
            return  # the client left before it had sent its request
        tenant = caller.tenant if caller is not None else None
        exchange, num_text_bytes = self._make_exchange(scope, body, tenant)
        headers = own_headers(scope)
        admitted = None
        if tenant is not None:
            admitted = self._tenants.admit_request(tenant, exchange.request)
            headers += admitted.headers
        try:
            await self._answer(exchange, scope, receive, send, headers)
        finally:
            record = functools.partial(self._record_usage, exchange, admitted, num_text_bytes)
            if exchange.is_open:  # others read on, or the engine has yet to tell what it took
                exchange.when_ended(record)
            else:
                record()

    def _record_usage(
        self, exchange: Exchange, admitted: AdmittedRequest | None, num_text_bytes: int
    ) -> None:
        """Charge the tenant for an exchange that has ended, and learn from it."""
        if admitted is not None:
            self._tenants.end_request(admitted, exchange.usage_taken())
        if exchange.usage is not None:
            tokens_per_byte = self._request_parser.tokens_per_byte
            tokens_per_byte.learn(num_text_bytes, exchange.usage.num_prompt_tokens)

    async def _answer(
        self, exchange: Exchange, scope: Scope, receive: Receive, send: Send, headers: Headers
    ) -> None:
        """Answer from the cache or through the driver; add `headers` to the reply."""
        source: Exchange | Subscriber | Replay = exchange
        stop: Callable[[], None] = functools.partial(self._driver.cancel, exchange)
        if self._cache.enabled:
            verdict, cached = await self._cache.look_up(exchange, scope["headers"])
            headers = [*headers, (b"x-headway-cache", verdict.encode())]
            if cached is not None:
                source, stop = cached, cached.close
        if source is exchange:
            self._driver.open(exchange)
        client_leaves = asyncio.ensure_future(_stop_when_client_leaves(receive, stop))
        keep_alive = None
        period_s = self._config.gateway.keepalive_s
        if period_s is not None and exchange.fields.is_stream:
            keep_alive = KeepAlive(period_s, send, headers)
        try:
            await self._relay(source, send, headers, keep_alive)
        finally:
            client_leaves.cancel()
            stop()
            if keep_alive is not None:
                keep_alive.stop()

    def _make_exchange(
        self, scope: Scope, body: bytes, tenant: Tenant | None
    ) -> tuple[Exchange, int]:
        """Return the exchange, and the bytes of its prompt's text.

        Raise `ApiError` for a request that is wrong or not allowed.
        """
        path, headers = scope["path"], read_headers(scope["headers"])
        asked = self._request_parser.parse(
            path,
            body,
            headers,
            tenant,
            # Never the client's own: another request may bear it at the same time.
            request_id=uuid.uuid4().hex,
            now_s=time.monotonic(),
            wants_prefix=self._driver.router.discipline.wants_prefix,
            models_elsewhere=self._providers.models,
        )
        # The body is JSON, whatever the client says (curl -d says that it is a form).
        forwarded = [*headers.forwarded, (b"content-type", b"application/json")]
        own_id = asked.fields.request_id
        if headers.request_id is None and own_id:
            # To vLLM the header, if there is one, goes before the body.
            if own_id.isascii() and own_id.isprintable():
                set_request_id(scope, own_id)
        else:
            forwarded.append((b"x-request-id", request_id_of(scope).encode("latin-1")))
        exchange = Exchange(
            asked.request,
            "POST",
            path,
            forwarded,
            asked.body,
            self._driver.records,
            fields=asked.fields,
            added=asked.added,
        )
        return exchange, asked.num_text_bytes

    async def _relay(
        self,
        source: Exchange | Subscriber | Replay,
        send: Send,
        headers: Headers,
        keep_alive: KeepAlive | None,
    ) -> None:
        """Pass the response on as it comes. Raise `ApiError` if it fails before its first byte."""
        has_started = False
        try:
            while True:
                chunk = await source.next_chunk()
                if not has_started:
                    has_started = True
                    if keep_alive is not None and keep_alive.stop():
                        if source.status != 200:
                            await self._send_as_event(source, chunk, send)
                            return
                    else:
                        own = as_stream([*source.response_headers, *headers])
                        await send(_start_message(source.status, own))
                await send({"type": "http.response.body", "body": chunk, "more_body": bool(chunk)})
                if not chunk:
                    return
                if isinstance(source, Exchange):
                    self._driver.acknowledge_bytes(source, len(chunk))
        except Rejected as rejected:
            error = rejection_error(rejected.reason, rejected.retry_after_s)
        except EngineFailed as failed:
            error = ApiError(502, f"The engine failed: {failed}", kind="InternalServerError")
        if not has_started and not (keep_alive is not None and keep_alive.stop()):
            raise error
        # An SSE client reads this as an error; without [DONE] the reply is
        # visibly incomplete. Other clients see the connection break.
        with contextlib.suppress(RuntimeError):
            event = as_event(error.body())
            await send({"type": "http.response.body", "body": event, "more_body": False})

    async def _send_as_event(
        self, source: Exchange | Subscriber | Replay, chunk: bytes, send: Send
    ) -> None:
        """Send a reply that is no stream, an error, to a client that was promised a stream."""
        body = bytearray()
        while chunk:
            body += chunk
            if isinstance(source, Exchange):
                self._driver.acknowledge_bytes(source, len(chunk))
            chunk = await source.next_chunk()
        event = as_event(bytes(body))
        await send({"type": "http.response.body", "body": event, "more_body": False})


async def _stop_when_client_leaves(receive: Receive, stop: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    stop()


def _start_message(status: int, headers: Headers) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}

"""Which way does one request take through the gateway, from its body to the last token?"""

import asyncio
import contextlib
import functools
import re
import time
import uuid
from collections.abc import Callable

import msgspec
from starlette.types import Message, Receive, Scope, Send

from router import RequestClass, Usage
from serving.config import Config
from serving.gateway.cache.response_cache import Replay, ResponseCache
from serving.gateway.cache.single_flight import Subscriber
from serving.gateway.driver import Driver
from serving.gateway.exchange import EngineFailed, Exchange, Rejected
from serving.gateway.http.body_reader import BodyReader
from serving.gateway.http.errors import ApiError, rejection_error
from serving.gateway.providers.calls import Providers
from serving.gateway.request_parser import RequestParser
from serving.gateway.tenants.tenants import Caller, Tenants
from serving.stream.frames import Headers

# The headers of a request that vLLM's API layer reads.
_FORWARDED = re.compile(rb"traceparent|tracestate|x-session-id|x-data-parallel-rank")
_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}")


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
        """Answer one request to one of `ENDPOINTS`."""
        try:
            caller = self._tenants.authenticate(scope["headers"])
            body = await self._body_reader.read_body(scope, receive)
            if body is None:
                return  # the client left before it had sent its request
            exchange, num_text_bytes = self._make_exchange(scope, body, caller)
            if caller is None:
                await self._answer(exchange, scope, receive, send, [])
            else:
                admitted = self._tenants.admit_request(caller.tenant, exchange.request)
                try:
                    await self._answer(exchange, scope, receive, send, admitted.headers)
                finally:
                    self._tenants.end_request(admitted, _usage_taken(exchange))
            self._request_parser.learn_tokens_per_byte(num_text_bytes, exchange.usage)
        except ApiError as error:
            await _send_error(send, error)

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
        try:
            await self._relay(source, send, headers)
        finally:
            client_leaves.cancel()
            stop()

    def _make_exchange(
        self, scope: Scope, body: bytes, caller: Caller | None
    ) -> tuple[Exchange, int]:
        """Return the exchange, and the bytes of its prompt's text.

        Raise `ApiError` for a request that is wrong or not allowed.
        """
        forwarded: Headers = []
        request_id = ""
        priority_class = self._config.router.default_class
        if caller is not None:
            priority_class = caller.tenant.default_class(priority_class)
        for name, value in scope["headers"]:
            if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
                request_id = value.decode()
            elif name == b"x-headway-class":
                priority_class = _parse_class(value)
            elif _FORWARDED.fullmatch(name):
                forwarded.append((name, value))
        if not request_id or request_id in self._driver.exchanges:
            request_id = uuid.uuid4().hex
        # The body is JSON, whatever the client says (curl -d says that it is a form).
        forwarded.append((b"content-type", b"application/json"))
        forwarded.append((b"x-request-id", request_id.encode()))
        path = scope["path"]
        request, num_text_bytes = self._request_parser.parse(
            path,
            body,
            request_id,
            self._driver.engines.infos,
            time.monotonic(),
            self._config.router.max_hold_s,
            priority_class=priority_class,
            wants_prefix=self._driver.router.discipline.wants_prefix,
            models_elsewhere=self._providers.models,
        )
        if caller is not None:
            caller.tenant.check_allowed(request)
            request = msgspec.structs.replace(
                request, tenant=caller.tenant.name, weight=caller.tenant.config.weight
            )
        exchange = Exchange(request, "POST", path, forwarded, body, self._driver.records)
        return exchange, num_text_bytes

    async def _relay(
        self, source: Exchange | Subscriber | Replay, send: Send, headers: Headers
    ) -> None:
        """Pass the response on as it comes. Raise `ApiError` if it fails before its first byte."""
        has_started = False
        try:
            while True:
                chunk = await source.next_chunk()
                if not has_started:
                    has_started = True
                    await send(_start_message(source.status, [*source.response_headers, *headers]))
                await send({"type": "http.response.body", "body": chunk, "more_body": bool(chunk)})
                if not chunk:
                    return
                if isinstance(source, Exchange):
                    self._driver.acknowledge_bytes(source, len(chunk))
        except Rejected as rejected:
            raise rejection_error(rejected.reason, rejected.retry_after_s) from None
        except EngineFailed as failed:
            error = ApiError(502, f"The engine failed: {failed}", kind="InternalServerError")
            if not has_started:
                raise error from None
            # An SSE client reads this as an error; without [DONE] the reply is
            # visibly incomplete. Other clients see the connection break.
            event = b"data: " + error.body() + b"\n\n"
            with contextlib.suppress(RuntimeError):
                await send({"type": "http.response.body", "body": event, "more_body": False})


async def _stop_when_client_leaves(receive: Receive, stop: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    stop()


def _parse_class(value: bytes) -> RequestClass:
    """Return the class that the header names; raise `ApiError` if there is no such class."""
    try:
        return RequestClass(value.decode("latin-1"))
    except ValueError:
        raise ApiError(
            400,
            "x-headway-class: one of " + ", ".join(known.value for known in RequestClass),
            param="x-headway-class",
        ) from None


def _usage_taken(exchange: Exchange) -> Usage | None:
    """What the request took, as far as that is known; nothing if no engine ran it."""
    if exchange.usage is None and (exchange.num_attempts == 0 or exchange.status >= 400):
        return Usage()
    return exchange.usage


def _start_message(status: int, headers: Headers) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


async def _send_error(send: Send, error: ApiError) -> None:
    body = error.body()
    headers = [*error.headers(), (b"content-length", b"%d" % len(body))]
    if error.status == 413:
        headers.append((b"connection", b"close"))
    await send(_start_message(error.status, headers))
    await send({"type": "http.response.body", "body": body})

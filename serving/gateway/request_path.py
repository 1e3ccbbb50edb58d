"""Which way does one request take through the gateway, from its head to the last token?"""

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from starlette.types import Receive, Scope, Send

from serving.config import Config
from serving.gateway.cache.response_cache import ResponseCache
from serving.gateway.driver import Driver
from serving.gateway.exchange import EngineFailed, Exchange, Rejected
from serving.gateway.http.body_reader import BodyReader, IncomingBody
from serving.gateway.http.errors import ApiError, internal_error, rejection_error
from serving.gateway.http.own_headers import new_id, own_headers, request_id_of, set_request_id
from serving.gateway.http.reply.asgi_client import AsgiClient
from serving.gateway.http.reply.client import Client, send_error
from serving.gateway.http.reply.keep_alive import KeepAlive, as_event, as_stream
from serving.gateway.intake.request_headers import read_headers
from serving.gateway.intake.request_parser import RequestParser
from serving.gateway.observe.observer import Observer
from serving.gateway.providers.calls import Providers
from serving.gateway.tenants.tenants import AdmittedRequest, Caller, Tenant, Tenants
from serving.stream.frames import Headers

logger = logging.getLogger(__name__)


class Source(Protocol):
    """What a reply is read from: an exchange, a place in a single flight, a stored response."""

    on_readable: Callable[[], None]

    @property
    def status(self) -> int: ...
    @property
    def response_headers(self) -> Headers: ...
    @property
    def is_at_end(self) -> bool: ...
    def read(self) -> bytes | None: ...


@dataclass(frozen=True, slots=True, eq=False)
class RequestPath:
    """Whom a request to one of `ENDPOINTS` meets; the same for all."""

    config: Config
    driver: Driver
    body_reader: BodyReader
    request_parser: RequestParser
    providers: Providers
    tenants: Tenants
    cache: ResponseCache
    observer: Observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request as an ASGI application does."""
        client = AsgiClient(send)
        await client.serve(self.open(scope, client), receive)

    def open(self, scope: Scope, client: Client) -> "Call":
        """Return what answers one request of `client`."""
        return Call(self, scope, client)


class Call:
    """One request, as its client sends it and is answered.

        head --begin--> body --on_body_end--> asked --first byte--> answered --last byte--> over

    It asks in this order: the tenants who the caller is, the body reader for the body, the parser
    what is asked for, the tenants whether the caller may; then the cache, and the driver if
    the cache has no answer. From anywhere it is over when the client leaves, or with an error.

    Nobody who tells it something gets an exception back, or is called back meanwhile: what that
    leads to for the client comes in a turn of its own.
    """

    __slots__ = (
        "_admitted",
        "_body",
        "_call_soon",
        "_caller",
        "_client",
        "_error",
        "_error_event",
        "_exchange",
        "_has_started",
        "_headers",
        "_is_due",
        "_is_over",
        "_keep_alive",
        "_looking_up",
        "_num_text_bytes",
        "_path",
        "_scope",
        "_source",
        "_status",
        "_stop",
    )

    def __init__(self, path: RequestPath, scope: Scope, client: Client) -> None:
        self._path = path
        self._scope = scope
        self._client = client
        self._call_soon = path.driver.turn.call_soon
        self._is_over = False
        # What is asked.
        self._caller: Caller | None = None
        self._body: IncomingBody | None = None
        self._exchange: Exchange | None = None
        self._num_text_bytes = 0
        self._admitted: AdmittedRequest | None = None
        # How it is answered.
        self._looking_up: asyncio.Task[None] | None = None  # in the cache
        self._source: Source | None = None
        self._stop: Callable[[], None] | None = None  # lets the source know that nobody reads
        self._headers: Headers = []  # of our own
        self._keep_alive: KeepAlive | None = None
        self._is_due = False
        self._has_started = False
        self._status = 0  # that the client has been sent
        self._error: Exception | None = None  # in place of an answer
        self._error_event: bytearray | None = None  # a reply that is none, to a promised stream

    # --- what the client sends ---------------------------------------------------

    def begin(self) -> bool:
        """Look at the head of the request. Return whether its body is wanted."""
        headers = self._scope["headers"]
        try:
            self._caller = self._path.tenants.authenticate(headers)
            self._body = self._path.body_reader.begin(headers)
        except Exception as error:
            self._call_soon(self._fail, error)
        return self._body is not None

    def on_body(self, data: bytes) -> bool:
        """Take a part of the body. Return whether more of it is wanted."""
        if self._body is not None:
            try:
                self._body.add(data)
            except Exception as error:
                self._drop_body()
                self._call_soon(self._fail, error)
        return self._body is not None

    def on_body_end(self) -> None:
        """Answer the request, which has come to its end."""
        body, self._body = self._body, None
        if body is None:
            return  # it is refused
        try:
            self._ask(body.take())
        except Exception as error:
            self._call_soon(self._fail, error)

    def _drop_body(self) -> None:
        if self._body is not None:
            self._body.drop()
            self._body = None

    # --- asking ------------------------------------------------------------------------

    def _ask(self, body: bytes) -> None:
        """Find out what is asked for, and who has the answer."""
        path = self._path
        tenant = self._caller.tenant if self._caller is not None else None
        self._exchange = exchange = self._make_exchange(body, tenant)
        self._headers = own_headers(self._scope)
        if tenant is not None:
            self._admitted = path.tenants.admit_request(tenant, exchange.request)
            self._headers += self._admitted.headers
        if path.cache.enabled:
            self._looking_up = asyncio.ensure_future(self._look_up(exchange))
        else:
            self._ask_engines(exchange)

    def _make_exchange(self, body: bytes, tenant: Tenant | None) -> Exchange:
        """Return the exchange. Raise `ApiError` for a request that is wrong or not allowed."""
        path, scope = self._path, self._scope
        headers = read_headers(scope["headers"])
        asked = path.request_parser.parse(
            scope["path"],
            body,
            headers,
            tenant,
            # Never the client's own: another request may bear it at the same time.
            request_id=new_id(),
            now_s=time.monotonic(),
            wants_prefix=path.driver.router.discipline.wants_prefix,
            models_elsewhere=path.providers.models,
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
        self._num_text_bytes = asked.num_text_bytes
        return Exchange(
            asked.request,
            "POST",
            scope["path"],
            forwarded,
            asked.body,
            path.driver.records,
            fields=asked.fields,
            added=asked.added,
        )

    async def _look_up(self, exchange: Exchange) -> None:
        """Have the cache answer, or let it be answered and keep that, or else ask the engines."""
        try:
            verdict, cached = await self._path.cache.look_up(exchange, self._scope["headers"])
            exchange.journey.cache = verdict
            self._headers.append((b"x-headway-cache", verdict.encode()))
            if cached is None:
                if not self._is_over:
                    self._ask_engines(exchange)
            else:
                self._stop = cached.close
                self._read_from(cached)
                self.on_ready()  # it may all be there
        except Exception as error:
            self._fail(error)
        finally:
            self._looking_up = None
            if self._is_over:
                self._close()

    def _ask_engines(self, exchange: Exchange) -> None:
        self._stop = functools.partial(self._path.driver.cancel, exchange)
        self._read_from(exchange)
        self._path.driver.open(exchange)

    def _read_from(self, source: Source) -> None:
        """Pass on what comes from there, and comments until something does."""
        self._source, source.on_readable = source, self.on_ready
        assert self._exchange is not None
        period_s = self._path.config.gateway.keepalive_s
        if period_s is not None and self._exchange.fields.is_stream and not self._is_over:
            self._keep_alive = KeepAlive(period_s, self._client, self._headers)

    # --- answering -----------------------------------------------------------------------

    def on_ready(self) -> None:
        """Look in this turn whether there is something to send, and the client takes it."""
        if not self._is_due:
            self._is_due = True
            self._path.driver.turn.add(self._go_on)

    def _go_on(self) -> None:
        self._is_due = False
        try:
            self._pass_on()
        except Rejected as rejected:
            self._fail(rejection_error(rejected.reason, rejected.retry_after_s))
        except EngineFailed as failed:
            error = ApiError(502, f"The engine failed: {failed}", kind="InternalServerError")
            self._fail(error)
        except Exception as error:
            self._fail(error)

    def _pass_on(self) -> None:
        """Send what has come, while the client takes it, and acknowledge it."""
        client, source = self._client, self._source
        while not self._is_over and source is not None and client.is_ready:
            if (chunk := source.read()) is None:
                return
            is_last = source.is_at_end
            if not self._has_started:
                self._start(source)
            if self._error_event is not None:
                self._error_event += chunk
                if is_last:
                    client.write(as_event(bytes(self._error_event)), is_last=True)
            else:
                client.write(chunk, is_last=is_last)
            if is_last:
                self._end()
            elif source is self._exchange:
                self._path.driver.acknowledge_bytes(self._exchange, len(chunk))

    def _start(self, source: Source) -> None:
        """Send status and headers, unless a comment has promised a stream."""
        if not self._is_promised():
            headers = as_stream([*source.response_headers, *self._headers])
            self._client.start(source.status, headers)
            self._status = source.status
        elif source.status != 200:
            self._error_event = bytearray()
        self._status = self._status or 200
        self._has_started = True

    def _is_promised(self) -> bool:
        """Whether the client has status and headers of a stream. No comments from here on."""
        return self._keep_alive is not None and self._keep_alive.stop()

    # --- ends ------------------------------------------------------------------------------

    def on_left(self) -> None:
        """End it soon: nobody waits for the answer."""
        self._call_soon(self._end)

    def _fail(self, error: Exception) -> None:
        """End it with an error, as the client can still be told."""
        if self._is_over:
            return
        has_begun = self._has_started or self._is_promised()
        self._error = error
        if has_begun:
            self._status = self._status or 200  # as was promised
        else:
            self._status = error.status if isinstance(error, ApiError) else 500
        self._end()
        if not isinstance(error, ApiError):
            if has_begun:
                self._client.break_off(error)
                return
            name = f"request {request_id_of(self._scope)}"
            logger.error("%s failed", name, exc_info=error)
            error = internal_error(name)
        try:
            if has_begun:
                # An SSE client reads this as an error; without [DONE] the reply is
                # visibly incomplete. Other clients see the connection break.
                self._client.write(as_event(error.body()), is_last=True)
            else:
                send_error(self._client, error, own_headers(self._scope))
        except RuntimeError as contradiction:
            self._client.break_off(contradiction)

    def _end(self) -> None:
        if not self._is_over:
            self._is_over = True
            self._drop_body()
            if self._keep_alive is not None:
                self._keep_alive.stop()
            if self._looking_up is None:
                self._close()

    def _close(self) -> None:
        """Leave the source, and have the request charged once it has ended."""
        if self._stop is not None:
            self._stop()
        exchange = self._exchange
        if exchange is not None and exchange.is_open:
            # Others read on, or the engine has yet to tell what it took.
            exchange.on_ended = self._record_usage
        else:
            self._record_usage()

    def _record_usage(self) -> None:
        """Charge the tenant for an exchange that has ended, learn from it, and tell of it."""
        exchange, caller = self._exchange, self._caller
        tenant = caller.tenant.name if caller is not None else ""
        self._path.observer.on_over(self._scope, exchange, tenant, self._status, self._error)
        if exchange is None:
            return
        client_id = request_id_of(self._scope)
        self._path.driver.recent.on_over(client_id, exchange, tenant, self._status, self._error)
        if self._admitted is not None:
            self._path.tenants.end_request(self._admitted, exchange.usage_taken())
        if exchange.usage is not None:
            tokens_per_byte = self._path.request_parser.tokens_per_byte
            tokens_per_byte.learn(self._num_text_bytes, exchange.usage.num_prompt_tokens)

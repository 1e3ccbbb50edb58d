"""Which way does one request take through the gateway, from its head to the last token?"""

import asyncio
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from serving.config import Config
from serving.gateway.cache.response_cache import ResponseCache
from serving.gateway.driver import Driver
from serving.gateway.exchange import EngineFailed, Exchange, Rejected
from serving.gateway.http.body_reader import BodyReader, IncomingBody
from serving.gateway.http.endpoints.asking import make_exchange
from serving.gateway.http.endpoints.kept import KeptResponses
from serving.gateway.http.errors import (
    ApiError,
    as_anthropic,
    internal_error,
    is_anthropic,
    rejection_error,
)
from serving.gateway.http.own_headers import CONTENT_LENGTH, REQUEST_ID, own_headers, request_id_of
from serving.gateway.http.reply.asgi_client import AsgiClient
from serving.gateway.http.reply.client import Client, Source, send_error
from serving.gateway.http.reply.keep_alive import KeepAlive, as_event, as_stream
from serving.gateway.intake.fields import ResponseFields
from serving.gateway.intake.request_parser import RequestParser
from serving.gateway.intake.served_models import ServedModels
from serving.gateway.observe.observer import Observer
from serving.gateway.providers.calls import Providers
from serving.gateway.tenants.tenants import AdmittedRequest, Caller, Tenant, Tenants
from serving.stream.frames import Headers

logger = logging.getLogger(__name__)

_COMMENT_S = 5.0  # between two comments that say that an engine is starting


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
    kept: KeptResponses
    served_models: ServedModels

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
        "_error_body",
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
        self._error_body: bytearray | None = None  # of a reply that is none

    # --- what the client sends ---------------------------------------------------

    def begin(self) -> bool:
        """Look at the head of the request. Return whether its body is wanted."""
        headers, known = self._scope["headers"], self._scope["state"].get("caller")
        try:
            self._caller = known or self._path.tenants.authenticate(headers)
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
        path.observer.on_asked(exchange, self._scope["headers"])
        self._headers = own_headers(self._scope)
        if tenant is not None:
            self._admitted = path.tenants.admit_request(tenant, exchange.request)
            self._headers += self._admitted.headers
        if isinstance(exchange.fields, ResponseFields) and exchange.fields.previous_response_id:
            previous_id = exchange.fields.previous_response_id
            self._looking_up = asyncio.ensure_future(self._go_on_from(previous_id, exchange))
        elif path.cache.enabled:
            self._looking_up = asyncio.ensure_future(self._look_up(exchange))
        else:
            self._ask_engines(exchange)

    def _make_exchange(self, body: bytes, tenant: Tenant | None) -> Exchange:
        """Return the exchange. Raise `ApiError` for a request that is wrong or not allowed."""
        path = self._path
        exchange, self._num_text_bytes = make_exchange(
            self._scope,
            body,
            tenant,
            parser=path.request_parser,
            engines=path.driver.engines,
            records=path.driver.records,
            wants_prefix=path.driver.router.discipline.wants_prefix,
            models_elsewhere=path.providers.models,
        )
        return exchange

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

    async def _go_on_from(self, response_id: str, exchange: Exchange) -> None:
        """Have the engine answer that keeps the response which this one goes on from."""
        try:
            tenant = self._caller.tenant if self._caller is not None else None
            exchange.bind_to(await self._path.kept.find(response_id, tenant))
            if not self._is_over:
                self._ask_engines(exchange)
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
        if (exchange := self._exchange) is None or not exchange.fields.is_stream or self._is_over:
            return
        waits_for = functools.partial(self._path.served_models.waits_for, exchange.request.model)
        if every_s := self._path.config.gateway.keepalive_s or (_COMMENT_S if waits_for() else 0):
            self._keep_alive = KeepAlive(every_s, self._client, self._headers, waits_for)

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
            if not self._has_started and self._error_body is None:
                self._start(source)
            if self._error_body is not None:
                self._error_body += chunk
                if is_last:
                    self._finish_error(source, bytes(self._error_body))
            else:
                client.write(chunk, is_last=is_last)
            if is_last:
                self._end()
            elif source is self._exchange:
                self._path.driver.acknowledge_bytes(self._exchange, len(chunk))

    def _start(self, source: Source) -> None:
        """Send status and headers, unless a comment has promised a stream.

        An error in its place, or one that is told in another form, is put off until it is whole.
        """
        is_error = source.status != 200
        if is_error and (self._is_promised() or is_anthropic(self._scope["path"])):
            self._error_body = bytearray()
            return
        if not self._is_promised():
            self._client.start(source.status, as_stream(self._reply_headers(source)))
        self._status = source.status
        self._has_started = True

    def _reply_headers(self, source: Source) -> Headers:
        """Return an engine's, or whose reply it is, and ours."""
        headers = [(name, value) for name, value in source.response_headers if name != REQUEST_ID]
        headers += self._headers
        if source is self._exchange and self._path.config.gateway.reply_headers:
            headers += self._exchange.headers_of_way()
        return headers

    def _finish_error(self, source: Source, body: bytes) -> None:
        """Send an error that has come whole."""
        kind, self._status = b"", source.status
        if is_anthropic(self._scope["path"]):
            kind, body = b"error", as_anthropic(source.status, body)
        if self._is_promised():
            self._status, body = 200, as_event(body, kind)
        else:
            headers = [each for each in self._reply_headers(source) if each[0] != CONTENT_LENGTH]
            headers.append((CONTENT_LENGTH, b"%d" % len(body)))
            self._client.start(source.status, headers)
        self._has_started = True
        self._client.write(body, is_last=True)

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
                path = self._scope["path"]
                kind = b"error" if is_anthropic(path) else b""
                self._client.write(as_event(error.body(path), kind), is_last=True)
            else:
                own = own_headers(self._scope)
                send_error(self._client, error, own, self._scope["path"])
        except Exception as fault:  # of our own: at least nobody waits for it
            self._client.break_off(fault)

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
        if (exchange := self._exchange) is not None:
            self._path.kept.note_answer(exchange)
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
            self._path.request_parser.learn_tokens(
                exchange.request.model, self._num_text_bytes, exchange.usage.num_prompt_tokens
            )

"""What do the endpoints answer that run no model?"""

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from serving.gateway.engines import Engines
from serving.gateway.http.body_reader import BodyReader
from serving.gateway.http.endpoints import adapters
from serving.gateway.http.endpoints.kept import KeptResponses
from serving.gateway.http.endpoints.questions import NotAnswered, Question
from serving.gateway.http.endpoints.table import RULES, Kind, Rule
from serving.gateway.http.errors import ApiError, model_not_found
from serving.gateway.http.own_headers import request_id_of
from serving.gateway.intake.request_headers import read_headers
from serving.gateway.tenants.tenants import Tenant, Tenants
from serving.stream.frames import Headers

# An engine that writes a huge reply answers nobody for as long: see `engine.hang_timeout_s`.
_TIMEOUT_S = 60.0
_EVERYWHERE_TIMEOUT_S = 600.0  # to load weights
_MAX_QUESTIONS = 256  # at a time; each may hold a body
# Between an engine and us, or told anew by our own listener.
_NOT_PASSED_ON = (b"transfer-encoding", b"connection", b"x-request-id")

Answer = Callable[[Rule, Request], Awaitable[Response]]


class _Asked(msgspec.Struct):
    model: str | None = None


class EngineEndpoints:
    """Answers for the engines, or says why nobody does."""

    def __init__(
        self,
        engines: Engines,
        tenants: Tenants,
        body_reader: BodyReader,
        kept: KeptResponses,
        lora_adapters: adapters.LoraAdapters,
    ) -> None:
        self._engines = engines
        self._tenants = tenants
        self._body_reader = body_reader
        self._kept = kept
        self._adapters = lora_adapters

    def routes(self) -> list[Route]:
        """Return the endpoints of the table that neither run a model nor are the gateway's own."""
        answers: dict[Kind, Answer] = {
            Kind.TELLS: self.tell,
            Kind.KEEPS: self.look_up,
            Kind.EVERYWHERE: self.ask_everywhere,
            Kind.REFUSED: self.refuse,
        }
        return [
            Route(
                rule.path,
                functools.partial(answers[rule.kind], rule),
                methods=["GET" if rule.method == "WS" else rule.method],
            )
            for rule in RULES
            if rule.kind in answers
        ]

    async def tell(self, rule: Rule, request: Request) -> Response:
        """Answer with what the engine with the least work says, else the next one."""
        caller = self._tenants.authenticate(request.headers.raw)
        body = await self._read_body(request)
        replica_ids = self._having(rule)
        if rule.method == "POST":
            tenant = caller.tenant if caller is not None else None
            replica_ids = self._serving(_model(body), replica_ids, tenant)
        why = ""
        for replica_id in replica_ids:
            try:
                return await self._pass_on(replica_id, request, body)
            except NotAnswered as error:
                why = str(error)
        raise ApiError(502, f"The engine failed: {why}", kind="InternalServerError")

    async def look_up(self, rule: Rule, request: Request) -> Response:
        """Answer with what the engine says that keeps the response."""
        caller = self._tenants.authenticate(request.headers.raw)
        self._having(rule)
        tenant = caller.tenant if caller is not None else None
        replica_id = await self._kept.find(request.path_params["response_id"], tenant)
        try:
            return await self._pass_on(replica_id, request, await self._read_body(request))
        except NotAnswered as error:
            raise ApiError(502, f"The engine failed: {error}", kind="InternalServerError") from None

    async def ask_everywhere(self, rule: Rule, request: Request) -> Response:
        """Answer an admin with what each engine says; with the status of the worst."""
        self._tenants.authorize_admin(request.headers.raw)
        body = await self._read_body(request)
        results = None
        if rule.path in adapters.PATHS:
            name = request.path_params.get("adapter_name")
            results = await self._adapters.change(rule.path, body, name)
        if results is None:
            replica_ids = self._having(rule)
            asked = [self._ask_one(each, request, body) for each in replica_ids]
            results = dict(zip(replica_ids, await asyncio.gather(*asked), strict=True))
        # None: an adapter is to be no more of which no engine is up.
        status = max((result["status"] for result in results.values()), default=200)
        content = {"engines": results}
        return Response(msgspec.json.encode(content), status, media_type="application/json")

    async def refuse(self, rule: Rule, request: Request) -> Response:
        """Say why nobody answers."""
        self._tenants.authenticate(request.headers.raw)
        raise ApiError(
            404,
            f"{rule.method} {rule.path} is not to be had behind several engines: {rule.note}.",
            kind="NotFoundError",
        )

    # --- whom to ask -----------------------------------------------------------

    def _having(self, rule: Rule) -> list[str]:
        """Return the engines that have an endpoint. Raise `ApiError` 404 if none has."""
        if replica_ids := self._engines.having(f"{rule.method} {rule.path}"):
            return replica_ids
        if not self._engines.infos:
            raise ApiError(
                503, "No engine is up.", kind="ServiceUnavailableError", retry_after_s=1.0
            )
        advice = f": vLLM has it {rule.note}" if rule.note.startswith("with ") else ""
        raise ApiError(
            404, f"No engine has {rule.method} {rule.path}{advice}.", kind="NotFoundError"
        )

    def _serving(
        self, model: str | None, replica_ids: list[str], tenant: Tenant | None
    ) -> list[str]:
        """Return those that serve the model, all for none. Raise `ApiError` 404 if none does."""
        names = {each: self._names(each) for each in replica_ids}
        if tenant is not None:
            names = {each: {n for n in of if tenant.may_use((n,))} for each, of in names.items()}
        if model:
            found = [each for each in replica_ids if model in names[each]]
        else:
            found = [each for each in replica_ids if names[each]]
        if not found:
            raise model_not_found(model or "", sorted(set().union(*names.values())))
        return found

    def _names(self, replica_id: str) -> set[str]:
        info = self._engines.infos[replica_id]
        return {info.model, *info.aliases}

    # --- asking ------------------------------------------------------------------

    async def _read_body(self, request: Request) -> bytes:
        incoming = self._body_reader.begin(request.headers.raw)
        try:
            async for chunk in request.stream():
                incoming.add(chunk)
        except BaseException:
            incoming.drop()
            raise
        return incoming.take()

    def _ask(self, replica_id: str, request: Request, body: bytes) -> Question:
        if len(self._engines.questions) >= _MAX_QUESTIONS:
            raise ApiError(
                429, "Too many questions at a time.", kind="RateLimitError", retry_after_s=1.0
            )
        headers: Headers = list(read_headers(request.headers.raw).forwarded)
        headers.append((b"x-request-id", request_id_of(request.scope).encode("latin-1")))
        if body:  # JSON, whatever the client says (curl -d says that it is a form)
            headers.append((b"content-type", b"application/json"))
        path = request.scope["path"]
        if query := request.scope["query_string"]:
            path = f"{path}?{query.decode('latin-1')}"
        if replica_id not in self._engines.infos:
            raise NotAnswered("the engine was lost")
        return self._engines.ask(replica_id, request.method, path, headers, body)

    async def _pass_on(self, replica_id: str, request: Request, body: bytes) -> Response:
        """Return an engine's answer, which may still come. Raise `NotAnswered`."""
        question = self._ask(replica_id, request, body)
        try:
            head = await question.begin(_TIMEOUT_S)
        except BaseException:
            question.close()
            raise
        response = StreamingResponse(_chunks(question), head.status)
        response.raw_headers = [
            (name, value) for name, value in head.headers if name.lower() not in _NOT_PASSED_ON
        ]
        return response

    async def _ask_one(self, replica_id: str, request: Request, body: bytes) -> dict[str, Any]:
        """Return status and answer of one engine of all."""
        try:
            question = self._ask(replica_id, request, body)
        except NotAnswered as error:
            return {"status": 502, "answer": str(error)}
        try:
            status, answer = await question.whole(_EVERYWHERE_TIMEOUT_S)
        except NotAnswered as error:
            return {"status": 502, "answer": str(error)}
        finally:
            question.close()
        try:
            return {"status": status, "answer": json.loads(answer) if answer else None}
        except ValueError:
            return {"status": status, "answer": answer.decode(errors="replace")}


async def _chunks(question: Question) -> AsyncIterator[bytes]:
    try:
        async for chunk in question.body():
            yield chunk
    finally:
        question.close()


def _model(body: bytes) -> str | None:
    """Return the model that a body names; None if it names none, or vLLM has to say what it is."""
    try:
        return msgspec.json.decode(body, type=_Asked).model
    except (msgspec.MsgspecError, RecursionError):
        return None

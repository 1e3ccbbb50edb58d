"""Which engine keeps which response of the Responses API, and whose is it?

vLLM keeps what it has answered in the engine that answered. Its id is ours: it ends in the mark of
its tenant, so that every gateway knows whose it is. Where it is kept a gateway remembers of the
newest; of others it asks all engines, since another gateway may have had it.
"""

import asyncio
import hashlib
from collections import OrderedDict

from serving.gateway.engines import Engines
from serving.gateway.exchange import Exchange
from serving.gateway.http.endpoints.questions import NotAnswered
from serving.gateway.http.errors import ApiError
from serving.gateway.http.own_headers import new_id
from serving.gateway.intake.fields import Fields, ResponseFields
from serving.gateway.tenants.tenants import Tenant

PATH = "/v1/responses"
_MAX_REMEMBERED = 50_000  # about 150 bytes each
_LOOK_UP = f"GET {PATH}/{{response_id}}"
_TIMEOUT_S = 10.0  # for an engine to look it up


class KeptResponses:
    """Where responses are kept, as far as this gateway knows."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._replicas: OrderedDict[str, str] = OrderedDict()  # by response

    def note_answer(self, exchange: Exchange) -> None:
        """Remember who has answered, and so keeps it if anybody does."""
        response_id = exchange.added.get("request_id")
        fields = exchange.fields
        if isinstance(fields, ResponseFields) and fields.store is not False and exchange.replica_id:
            self.note(str(response_id), exchange.replica_id)

    def note(self, response_id: str, replica_id: str) -> None:
        """Remember which engine keeps a response."""
        self._replicas[response_id] = replica_id
        self._replicas.move_to_end(response_id)
        if len(self._replicas) > _MAX_REMEMBERED:
            self._replicas.popitem(last=False)

    async def find(self, response_id: str, tenant: Tenant | None) -> str:
        """Return the engine that keeps a response. Raise `ApiError` 404 if there is none."""
        if tenant is not None and not response_id.endswith(_mark(tenant)):
            raise not_found(response_id)
        replica_id = self._replicas.get(response_id)
        if replica_id in self._engines.infos:
            return replica_id
        found = await asyncio.gather(
            *(self._keeps(each, response_id) for each in self._engines.having(_LOOK_UP))
        )
        keeper = next((each for each in found if each is not None), None)
        if keeper is not None:
            self.note(response_id, keeper)
            return keeper
        raise not_found(response_id, was_known=replica_id is not None)

    async def _keeps(self, replica_id: str, response_id: str) -> str | None:
        """Return the engine if it keeps the response."""
        question = self._engines.ask(replica_id, "GET", f"{PATH}/{response_id}", [], b"")
        try:
            status, _ = await question.whole(_TIMEOUT_S)
        except NotAnswered:
            return None
        finally:
            question.close()
        return replica_id if status == 200 else None


def new_response_id(tenant: Tenant | None) -> str:
    """Return the id of a response to come."""
    return f"resp_{new_id()}{_mark(tenant) if tenant is not None else ''}"


def not_found(response_id: str, *, was_known: bool = False) -> ApiError:
    """Return vLLM's error for a response that it does not keep, with what to do about it."""
    why = (
        "The engine that kept it has ended, and its state with it"
        if was_known
        else "No engine keeps it: it was never stored (vLLM stores with "
        "VLLM_ENABLE_RESPONSES_API_STORE=1), or has been dropped, or its engine has ended"
    )
    return ApiError(
        404,
        f"Response with id '{response_id}' not found. {why}: send the conversation as a whole.",
        kind="invalid_request_error",
        param="response_id",
    )


def state_lost(fields: Fields) -> ApiError:
    """Return the error of a request that goes on from a response whose engine has ended."""
    response_id = fields.previous_response_id if isinstance(fields, ResponseFields) else None
    return not_found(response_id or "", was_known=True)


def _mark(tenant: Tenant) -> str:
    return hashlib.blake2b(tenant.name.encode(), digest_size=6).hexdigest()

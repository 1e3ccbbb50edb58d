"""What becomes of a request at a path that runs a model? An exchange, which engines understand."""

import time
from collections.abc import Sequence

from starlette.types import Scope

from router.resilience.resume import Records
from serving.gateway.engines import Engines
from serving.gateway.exchange import Exchange
from serving.gateway.http.endpoints.kept import PATH as RESPONSES
from serving.gateway.http.endpoints.kept import new_response_id
from serving.gateway.http.endpoints.table import INVOCATIONS
from serving.gateway.http.own_headers import (
    add_own_headers,
    new_id,
    request_id_of,
    set_request_id,
)
from serving.gateway.intake.json_body import ENDPOINTS, invoked_path
from serving.gateway.intake.request_headers import read_headers
from serving.gateway.intake.request_parser import RequestParser
from serving.gateway.tenants.tenants import Tenant

_JSON = b"application/json"


def make_exchange(
    scope: Scope,
    body: bytes,
    tenant: Tenant | None,
    *,
    parser: RequestParser,
    engines: Engines,
    records: Records,
    wants_prefix: bool,
    models_elsewhere: Sequence[str],
) -> tuple[Exchange, int]:
    """Return the exchange, and the bytes of its prompt from which tokens were estimated.

    Raise `ApiError` for a request that is wrong or not allowed.
    """
    headers = read_headers(scope["headers"])
    if scope["path"] == INVOCATIONS:
        scope["path"] = invoked_path(body, engines.have)
    path = scope["path"]
    asked = parser.parse(
        path,
        body,
        headers,
        tenant,
        # Never the client's own: another request may bear it at the same time.
        request_id=new_id(),
        now_s=time.monotonic(),
        wants_prefix=wants_prefix,
        models_elsewhere=models_elsewhere,
    )
    # JSON, whatever the client says (curl -d says that it is a form), or an upload.
    content_type = headers.content_type if ENDPOINTS[path].is_form else _JSON
    forwarded = [*headers.forwarded, (b"content-type", content_type)]
    own_id = asked.fields.request_id
    if headers.request_id is None and own_id:
        # To vLLM the header, if there is one, goes before the body.
        if own_id.isascii() and own_id.isprintable():
            set_request_id(scope, own_id)
    else:
        forwarded.append((b"x-request-id", request_id_of(scope).encode("latin-1")))
    added = dict(asked.added)
    if path == RESPONSES and (tenant is not None or not own_id):
        added["request_id"] = new_response_id(tenant)
    exchange = Exchange(
        asked.request,
        "POST",
        path,
        forwarded,
        asked.body,
        records,
        fields=asked.fields,
        added=added,
    )
    if (chosen := asked.chosen) is not None:
        exchange.journey.chosen = chosen
        add_own_headers(scope, chosen.headers)
    return exchange, asked.num_text_bytes

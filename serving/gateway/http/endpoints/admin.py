"""What do admins see and change, of all gateways by whichever they ask?"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serving.config.renamed import current_parts
from serving.gateway.engines import Engines
from serving.gateway.http.endpoints.bodies import read_json
from serving.gateway.http.errors import ApiError
from serving.gateway.observe.peers.orders import Orders
from serving.gateway.observe.peers.together import Together, Usages, merged_usage
from serving.gateway.observe.state import GatewayState, ServiceState
from serving.gateway.tenants.tenants import Tenants

audit = logging.getLogger("serving.audit")  # what admins change


class AdminEndpoints:
    """The endpoints below `/headway/` that tell and change what the service does."""

    def __init__(
        self, tenants: Tenants, together: Together, engines: Engines, *, alone: bool = False
    ) -> None:
        """With `alone` a gateway tells of itself only; changes are for all even then."""
        self._tenants = tenants
        self._together = together
        self._engines = engines
        self._alone = alone or together.peers is None

    def routes(self) -> list[Route]:
        """Return where they are found."""
        return [
            Route("/headway/state", self.get_state),
            Route("/headway/state/schema", self.get_state_schema),
            Route("/headway/usage", self.get_usage),
            Route("/headway/requests", self.get_requests),
            Route("/headway/policy", self.set_policy, methods=["POST"]),
            Route("/headway/reload", self.reload_files, methods=["POST"]),
            Route("/headway/engines/{engine:path}/drain", self.drain, methods=["POST"]),
            Route("/headway/engines/{engine:path}/undrain", self.undrain, methods=["POST"]),
        ]

    # --- what is seen --------------------------------------------------------

    async def get_state(self, request: Request) -> Response:
        """Answer with the state of all gateways, or with that of the one `?gateway=` names."""
        self._tenants.authorize_admin(request.headers.raw)
        which = request.query_params.get("gateway", "this" if self._alone else "")
        if which == "this":
            return _json(self._together.own_state())
        state = await self._together.state()
        return _json(_one_of(state, which) if which else state)

    async def get_state_schema(self, request: Request) -> Response:
        """Answer with the JSON schema of `/headway/state`."""
        self._tenants.authorize_admin(request.headers.raw)
        return _json(msgspec.json.schema(ServiceState))

    async def get_usage(self, request: Request) -> Response:
        """Answer with what each tenant has used; with the caller's own unless it is an admin."""
        caller = self._tenants.authenticate(request.headers.raw)
        own_name = None if caller is None or caller.is_admin else caller.tenant.name

        def seen(usages: Usages) -> Usages:
            if own_name is None:
                return usages
            return {name: used for name, used in usages.items() if name == own_name}

        gateway_id = self._together.gateway_id
        if self._alone:
            return _json({"gateway_id": gateway_id, "tenants": seen(self._tenants.usage())})
        by_gateway, missing = await self._together.usage()
        return _json(
            {
                "gateway_id": gateway_id,
                "tenants": seen(merged_usage(by_gateway)),
                "gateways": {name: seen(usages) for name, usages in by_gateway.items()},
                "missing": missing,
            }
        )

    async def get_requests(self, request: Request) -> Response:
        """Answer with the last requests' ways, or with that of the one that `?id=` names."""
        self._tenants.authorize_admin(request.headers.raw)
        together, request_id = self._together, request.query_params.get("id")
        if request_id is None:
            return _json(together.own_requests() if self._alone else await together.requests())
        missing: Mapping[str, str] = {}
        if self._alone:
            way, nobody = together.own_request(request_id), f"gateway {together.rank} knows no"
        else:
            way, missing = await together.request(request_id)
            nobody = f"none of {together.num_gateways} gateways knows"
        if way is None:
            but = "".join(f"; {name} does not say: {why}" for name, why in missing.items())
            message = f"{nobody} request {request_id!r}, or no longer{but}"
            raise ApiError(404, message, param="id")
        return _json(way)

    # --- what is changed -----------------------------------------------------

    async def set_policy(self, request: Request) -> Response:
        """Switch the policy without a restart: `{"policy": "headway", "ablate": ["order"]}`."""
        self._tenants.authorize_admin(request.headers.raw)
        body = await read_json(request)
        try:
            name, parts = body["policy"], current_parts(body.get("ablate", []))
            self._together.orders.set_policy(name, parts)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ApiError(400, f"'policy': {error}", param="policy") from None
        said = self._note(
            request, f"set the policy to {name} without {', '.join(parts) or 'nothing'}"
        )
        return await self._give_order(said, {"policy": name, "ablate": parts}, _policy_of)

    async def drain(self, request: Request) -> Response:
        """Send an engine no new work on any gateway; what it has goes on."""
        return await self._drain_or_not(request, drains=True)

    async def undrain(self, request: Request) -> Response:
        """Send an engine work again."""
        return await self._drain_or_not(request, drains=False)

    async def _drain_or_not(self, request: Request, *, drains: bool) -> Response:
        self._tenants.authorize_admin(request.headers.raw)
        await read_json(request)  # there is nothing to say, but not just any page may say it
        engine = request.path_params["engine"]
        known = self._engines.known | self._engines.drained
        if engine not in known:
            names = ", ".join(sorted(known)) or "none"
            raise ApiError(404, f"There is no engine {engine!r}; known: {names}", param="engine")
        self._together.orders.drain(engine, drains=drains)
        said = self._note(request, f"{'drained' if drains else 'took back'} engine {engine}")

        def drain_of(orders: Orders) -> dict[str, Any]:
            order = orders.engines.get(engine)
            return {"drains": order is not None and order.drains}

        return await self._give_order(said, {"engine": engine, "drains": drains}, drain_of)

    async def _give_order(
        self, by: str, content: dict[str, Any], in_force: Callable[[Orders], dict[str, Any]]
    ) -> Response:
        """Tell all gateways, and answer with `content` and what is in force on each."""
        results = await self._together.give_order(by)
        if self._together.peers is not None:
            content["gateways"] = {
                name: {"error": result} if isinstance(result, str) else in_force(result)
                for name, result in results.items()
            }
        return _json(content)

    async def reload_files(self, request: Request) -> Response:
        """Read keys and config again now; otherwise this happens within a second of a change."""
        self._tenants.authorize_admin(request.headers.raw)
        await read_json(request)  # there is nothing to say, but not just any page may say it
        results = await self._together.reload(self._note(request, "reloaded keys and config"))
        own = results[self._together.gateway_id]
        assert not isinstance(own, str)
        content: dict[str, Any] = {**own}
        if self._together.peers is not None:
            content["gateways"] = {
                name: {"error": result} if isinstance(result, str) else result
                for name, result in results.items()
            }
        return _json(content)

    def _note(self, request: Request, what: str) -> str:
        """Log who has changed something, and from where. Return that in words."""
        caller = self._tenants.authenticate(request.headers.raw)
        who = caller.tenant.name if caller is not None else "somebody, as no keys are set,"
        where = request.client.host if request.client is not None else "an unknown address"
        said = f"{who} at {where} {what}"
        audit.info("%s", said)
        return said


def _policy_of(orders: Orders) -> dict[str, Any]:
    if orders.policy is None:
        return {"error": "another policy is configured there, which holds"}
    return {"policy": orders.policy.name, "ablate": orders.policy.ablate}


def _one_of(state: ServiceState, which: str) -> GatewayState:
    """Return the state of the gateway of this id or rank. Raise `ApiError` if there is none."""
    if (reason := state.missing.get(which)) is not None:
        raise ApiError(503, f"gateway {which}: {reason}", kind="ServiceUnavailableError")
    gateways = state.gateways or {state.gateway_id: state}
    for name, each in gateways.items():
        if which in (name, str(each.rank)):
            return each
    known = ", ".join(f"{name} (rank {each.rank})" for name, each in gateways.items())
    raise ApiError(404, f"There is no gateway {which!r}; known: {known}, this", param="gateway")


def _json(content: Any) -> Response:
    """Return a response with `content`, which may contain structs, as JSON."""
    return Response(msgspec.json.encode(content), media_type="application/json")

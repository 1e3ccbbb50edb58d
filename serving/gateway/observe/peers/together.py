"""What do all gateways say and do together, whichever of them is asked?"""

import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec

from serving.file_watch import FileWatchState
from serving.gateway.observe.page.feed import Part
from serving.gateway.observe.page.latencies import (
    EngineSamples,
    LatencySamples,
    engine_samples,
    latency_samples,
)
from serving.gateway.observe.peers.link import PeerLink
from serving.gateway.observe.peers.merge import merge, merge_by_key
from serving.gateway.observe.peers.orders import OrderBook, Orders
from serving.gateway.observe.peers.peers import Peers
from serving.gateway.observe.recent import MAX_LISTED, Recent, RequestWay, newest
from serving.gateway.observe.state import GatewayState, ServiceState
from serving.gateway.tenants.tenants import Consumption, Tenants

logger = logging.getLogger(__name__)
audit = logging.getLogger("serving.audit")  # what admins change

Files = dict[str, FileWatchState]  # by the setting that names them
Usages = dict[str, Consumption]  # by tenant
_Said = TypeVar("_Said")

# What a frame of the live page takes of a core is made, for all who look, twice a second.
_LATENCIES_EVERY_S = 1.0  # they are of a minute
_MAX_SHOWN = 40  # requests in a frame

_encode = msgspec.msgpack.Encoder().encode
_decode_state = msgspec.msgpack.Decoder(GatewayState).decode
_decode_part = msgspec.msgpack.Decoder(Part).decode
_decode_usage = msgspec.msgpack.Decoder(Usages).decode
_decode_ways = msgspec.msgpack.Decoder(list[RequestWay]).decode
_decode_files = msgspec.msgpack.Decoder(Files).decode


class Told(msgspec.Struct, frozen=True):
    """Orders as one gateway tells them to another."""

    orders: Orders
    by: str = ""  # who has given them and when they are new, for the log; empty: nobody now


_decode_told = msgspec.msgpack.Decoder(Told).decode
_decode_orders = msgspec.msgpack.Decoder(Orders).decode


class Together:
    """This gateway and its peers, of which there are none where it is alone."""

    def __init__(
        self,
        gateway_id: str,
        rank: int,
        num_gateways: int,
        *,
        state: Callable[[], GatewayState],
        recent: Recent,
        tenants: Tenants,
        reload: Callable[[], Awaitable[Files]],
        orders: OrderBook,
    ) -> None:
        """`reload` reads this gateway's files again; the others are what it has to say."""
        self.gateway_id = gateway_id
        self.num_gateways = num_gateways
        self.own_state = state
        self.orders = orders
        self.rank = rank
        self._recent = recent
        self._tenants = tenants
        self._reload = reload
        self._latencies: list[LatencySamples] = []
        self._engines: dict[str, EngineSamples] = {}
        self._latencies_due_s = float("-inf")
        self.peers: Peers | None = None
        if num_gateways > 1:
            self.peers = Peers(gateway_id, self.answer, self._meet)

    # --- what others ask -----------------------------------------------------

    async def answer(self, what: str, body: bytes) -> bytes:
        """Answer another gateway. Raise `ValueError` for what cannot be answered or done."""
        match what:
            case "state":
                return _encode(self.own_state())
            case "part":
                return _encode(self.own_part())
            case "usage":
                return _encode(self._tenants.usage())
            case "requests":
                return _encode(self.own_requests())
            case "request":
                found = self.own_request(body.decode())
                return _encode([] if found is None else [found])
            case "reload":
                audit.info("%s", body.decode())
                return _encode(await self._reload())
            case "orders":
                told = _decode_told(body)
                if told.by:
                    audit.info("%s", told.by)
                self.orders.take(told.orders)
                return _encode(self.orders.orders)
        raise ValueError(f"{what!r} is asked only by another version")

    async def _meet(self, link: PeerLink) -> None:
        """Tell a gateway which orders are in force here, and take over what is newer there."""
        told = await link.ask("orders", _encode(Told(self.orders.orders)))
        try:
            self.orders.take(_decode_orders(told))
        except (ValueError, msgspec.MsgspecError) as error:  # of another version
            logger.warning("orders of another gateway are not taken over: %s", error)

    async def _ask(
        self,
        what: str,
        decode: Callable[[bytes], _Said],
        body: bytes = b"",
        *,
        insists: bool = False,
    ) -> tuple[dict[str, _Said], dict[str, str]]:
        """Return what others say, and why some do not, by their ids."""
        if self.peers is None:
            return {}, {}
        answers = await self.peers.ask(what, body, insists=insists)
        said = {}
        for peer_id, answer in answers.said.items():
            try:
                said[peer_id] = decode(answer)
            except msgspec.MsgspecError as error:
                answers.missing[peer_id] = f"it is of another version: {error}"
        return said, answers.missing

    # --- what is seen --------------------------------------------------------

    async def state(self) -> ServiceState:
        """Return the state of all, as far as they answer."""
        own = self.own_state()
        if self.peers is None:
            return ServiceState(**_fields(own))
        others, missing = await self._ask("state", _decode_state)
        gateways = {self.gateway_id: own, **others}
        return ServiceState(
            **_fields(merge(list(gateways.values()))),
            num_gateways=self.num_gateways,
            gateways=gateways,
            missing=missing,
        )

    def own_part(self) -> Part:
        """Return what this gateway puts into a frame of the live page."""
        began_s = time.thread_time()
        state = self.own_state()
        now_s = time.monotonic()
        if now_s >= self._latencies_due_s:
            self._latencies = latency_samples(self._recent.ended(), now_s)
            self._engines = engine_samples(self._recent.ended(), now_s)
            self._latencies_due_s = now_s + _LATENCIES_EVERY_S
        latencies, engines = self._latencies, self._engines
        requests = self.own_requests(_MAX_SHOWN)
        took_s = time.thread_time() - began_s
        return Part(
            state=state, latencies=latencies, engines=engines, requests=requests, took_s=took_s
        )

    async def own_parts(self) -> tuple[list[Part], dict[str, str]]:
        """Return what this gateway alone puts into a frame."""
        return [self.own_part()], {}

    async def parts(self) -> tuple[list[Part], dict[str, str]]:
        """Return what all put into a frame, this one first, and why some do not."""
        others, missing = await self._ask("part", _decode_part)
        return [self.own_part(), *others.values()], missing

    async def usage(self) -> tuple[dict[str, Usages], dict[str, str]]:
        """Return what each tenant has used of each gateway, by its id, and who does not tell."""
        others, missing = await self._ask("usage", _decode_usage)
        return {self.gateway_id: self._tenants.usage(), **others}, missing

    def own_requests(self, max_listed: int = MAX_LISTED) -> list[RequestWay]:
        """Return the last requests of this gateway, the newest first."""
        return [self._here(way) for way in self._recent.last(max_listed)]

    async def requests(self) -> list[RequestWay]:
        """Return the last requests of all, the newest first."""
        others, _ = await self._ask("requests", _decode_ways)
        return newest([self.own_requests(), *others.values()])

    def own_request(self, request_id: str) -> RequestWay | None:
        """Return the way of a request, None if this gateway knows none of that id."""
        way = self._recent.find(request_id)
        return None if way is None else self._here(way)

    async def request(self, request_id: str) -> tuple[RequestWay | None, dict[str, str]]:
        """Return the way of a request, whichever gateway had it, and why some do not tell."""
        if (way := self.own_request(request_id)) is not None:
            return way, {}
        others, missing = await self._ask("request", _decode_ways, request_id.encode())
        found = [way for ways in others.values() for way in ways]
        return (found[0] if found else None), missing

    def _here(self, way: RequestWay) -> RequestWay:
        return msgspec.structs.replace(way, gateway=self.rank) if self.rank else way

    # --- what is done --------------------------------------------------------

    async def give_order(self, by: str) -> dict[str, Orders | str]:
        """Tell all what this gateway has just been ordered. Return what is in force on each.

        By id; in words where a gateway does not say. `by` is for their logs.
        """
        told = Told(self.orders.orders, f"gateway {self.gateway_id} says: {by}")
        others, missing = await self._ask("orders", _decode_orders, _encode(told), insists=True)
        return {self.gateway_id: self.orders.orders, **others, **missing}

    async def reload(self, by: str) -> dict[str, Files | str]:
        """Have all read their files again. Return how that went on each, as `give_order` does."""
        note = f"gateway {self.gateway_id} says: {by}"
        others, missing = await self._ask("reload", _decode_files, note.encode(), insists=True)
        return {self.gateway_id: await self._reload(), **others, **missing}


def _fields(state: GatewayState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in state.__struct_fields__}


def merged_usage(by_gateway: dict[str, Usages]) -> Usages:
    """Return what each tenant has used of all gateways."""
    return merge_by_key(list(by_gateway.values()))

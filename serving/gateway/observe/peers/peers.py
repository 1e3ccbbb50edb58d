r"""Which other gateways are there, and what does each say?

named by Ray --connect--> reached --not named any more--> forgotten
     ^                       |
     \--------lost-----------/
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from serving.gateway.observe.peers.link import NoAnswer, PeerLink
from serving.gateway.observe.peers.port import Answering, PeerPort

logger = logging.getLogger(__name__)

_RECONNECT_S = 0.5


class Answers(NamedTuple):
    """What others have said, and why some have not, by their ids."""

    said: dict[str, bytes]
    missing: dict[str, str]


class Peers:
    """The other gateways of the application. A dead or hung one is left out, and named."""

    def __init__(
        self,
        gateway_id: str,
        answer: Answering,
        on_reached: Callable[[PeerLink], Awaitable[None]],
    ) -> None:
        """`answer` is asked by the others; `on_reached` is the first to ask one of them."""
        self.gateway_id = gateway_id
        self.metadata: dict = {}  # by which others reach this one; empty until it listens
        self._port = PeerPort(answer)
        self._on_reached = on_reached
        self._members: dict[str, dict] = {}
        self._links: dict[str, PeerLink] = {}
        self._connecting: dict[str, asyncio.Task[None]] = {}
        self._was_told = asyncio.Event()

    async def listen(self, host: str, *, tls: bool = False, clients: str = "") -> None:
        """Let others ask, on a free port of `host`: with `tls` the authority `clients`' alone."""
        self.metadata = await self._port.listen(host, tls=tls, clients=clients)

    def set_members(self, members: Mapping[str, dict]) -> None:
        """Go by these gateways, with the metadata of each; this one may be among them."""
        self._members = {
            peer_id: metadata
            for peer_id, metadata in members.items()
            if peer_id != self.gateway_id and metadata
        }
        for peer_id in self._links.keys() - self._members.keys():
            self._links[peer_id].close()
        for peer_id in self._members.keys() - self._links.keys() - self._connecting.keys():
            task = asyncio.get_running_loop().create_task(self._connect(peer_id))
            self._connecting[peer_id] = task
        self._was_told.set()

    async def met(self, timeout_s: float) -> None:
        """Return when Ray has named the others and each was asked first; at the latest then."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._was_told.wait()
                if self._connecting:
                    await asyncio.wait(list(self._connecting.values()))

    async def _connect(self, peer_id: str) -> None:
        """Connect, and again while Ray names it."""
        try:
            while peer_id in self._members and peer_id not in self._links:
                try:
                    link = await PeerLink.connect(
                        self._members[peer_id], lambda link: self._on_lost(peer_id, link)
                    )
                except OSError as error:
                    logger.warning("gateway %s is not reachable: %s", peer_id, error)
                    await asyncio.sleep(_RECONNECT_S)
                    continue
                self._links[peer_id] = link
                with contextlib.suppress(NoAnswer):
                    await self._on_reached(link)
        finally:
            self._connecting.pop(peer_id, None)

    def _on_lost(self, peer_id: str, link: PeerLink) -> None:
        if self._links.get(peer_id) is not link:
            return
        del self._links[peer_id]
        if peer_id in self._members:
            logger.warning("gateway %s is lost", peer_id)
            self.set_members(self._members)

    def __contains__(self, peer_id: str) -> bool:
        return peer_id in self._members

    async def ask(self, what: str, body: bytes = b"", *, insists: bool = False) -> Answers:
        """Ask all others; return within the time that an answer may take.

        With `insists` also those that owe answers are told: see `PeerLink.ask`.
        """
        peer_ids = list(self._members)
        results = await asyncio.gather(
            *(self.ask_one(peer_id, what, body, insists=insists) for peer_id in peer_ids),
            return_exceptions=True,
        )
        answers = Answers({}, {})
        for peer_id, result in zip(peer_ids, results, strict=True):
            if isinstance(result, bytes):
                answers.said[peer_id] = result
            elif isinstance(result, NoAnswer):
                answers.missing[peer_id] = str(result)
            else:
                raise result
        return answers

    async def ask_one(
        self, peer_id: str, what: str, body: bytes = b"", *, insists: bool = False
    ) -> bytes:
        """Return what one gateway answers. Raise `NoAnswer` if it does not."""
        if (link := self._links.get(peer_id)) is None:
            raise NoAnswer("there is no connection to it")
        return await link.ask(what, body, insists=insists)

    def close(self) -> None:
        """Ask and answer no more."""
        self._members = {}
        for task in list(self._connecting.values()):
            task.cancel()
        for link in list(self._links.values()):
            link.close()
        self._port.close()

"""How many connections may there be, of all clients and of one?"""

import ipaddress
import logging
import resource
from collections import Counter

from serving.config import Config
from serving.gateway.http.errors import ApiError

logger = logging.getLogger(__name__)

# More cost memory, 7 kB each, before they cost descriptors.
_DEFAULT_MAX_CONNECTIONS = 20_000
# For connections to engines, for Ray's own and for files: at least so many, or this share.
_MIN_RESERVE = 512
_RESERVE_SHARE = 0.125
# Beyond a bound so many more, as a share of it and at least, are let in to be told why they are
# refused.
_TOLD_SHARE = 0.25
_MIN_TOLD = 16
_IPV6_PREFIX = 64  # what one customer has at least
# As many as Linux allows by default where the limit is said to be none.
_MAX_DESCRIPTORS = 1 << 20


class Connections:
    """The connections of one gateway's listener.

    Whoever is within the bounds when it connects stays in. One that is not is refused with its
    first request, unless others have left by then; far beyond the bounds, at once and without
    a word.
    """

    def __init__(self, max_connections: int, max_per_client: int | None) -> None:
        self.max_connections = max_connections
        self._max_per_client = max_per_client
        self._clients: dict[object, str] = {}  # addresses by connection
        self._num_by_client: Counter[str] = Counter()
        self._surplus: set[object] = set()

    def __len__(self) -> int:
        return len(self._clients)

    def add(self, connection: object, address: tuple[str, int] | None) -> bool:
        """Count a connection from `address`. Return False if it is to be closed at once."""
        client = self._client(address)
        self._clients[connection] = client
        self._num_by_client[client] += 1
        surplus = len(self._clients) - self.max_connections
        told = max(_MIN_TOLD, _TOLD_SHARE * self.max_connections)
        if self._max_per_client is not None:
            surplus = max(surplus, self._num_by_client[client] - self._max_per_client)
            told = min(told, max(_MIN_TOLD, _TOLD_SHARE * self._max_per_client))
        if surplus > 0:
            self._surplus.add(connection)
        return surplus <= told

    def _client(self, address: tuple[str, int] | None) -> str:
        """Return by what connections of one client are counted: its address or IPv6 network."""
        if address is None or self._max_per_client is None:
            return ""
        ip = ipaddress.ip_address(address[0].partition("%")[0])
        if isinstance(ip, ipaddress.IPv4Address):
            return str(ip)
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, _IPV6_PREFIX), strict=False))

    def remove(self, connection: object) -> None:
        """Count a connection no more."""
        client = self._clients.pop(connection)
        self._num_by_client[client] -= 1
        if not self._num_by_client[client]:
            del self._num_by_client[client]
        self._surplus.discard(connection)

    def refusal(self, connection: object) -> ApiError | None:
        """Return the answer to a request on a connection that is one too many, else None."""
        if connection not in self._surplus:
            return None
        if len(self._clients) > self.max_connections:
            return ApiError(
                503,
                "Too many connections (gateway.max_connections).",
                kind="ServiceUnavailableError",
                retry_after_s=1.0,
            )
        client = self._clients[connection]
        if self._max_per_client and self._num_by_client[client] > self._max_per_client:
            return ApiError(
                429,
                "Too many connections from your address (gateway.max_connections_per_client).",
                kind="RateLimitError",
                retry_after_s=1.0,
            )
        self._surplus.discard(connection)
        return None


def make_connections(config: Config) -> Connections:
    """Return the count of connections, bounded by configuration and limit of open files."""
    # A provider's call takes a descriptor beside its client's.
    num_each = 2 if config.providers else 1
    fitting = fitting_connections(raise_descriptor_limit(), num_each)
    wanted = config.gateway.max_connections
    if wanted is not None and wanted > fitting:
        logger.warning(
            "gateway.max_connections: the limit of open files (ulimit -Hn) has room for %d, not %d",
            fitting,
            wanted,
        )
    return Connections(
        min(wanted or _DEFAULT_MAX_CONNECTIONS, fitting), config.gateway.max_connections_per_client
    )


def fitting_connections(num_descriptors: int, num_each: int) -> int:
    """Return how many connections of `num_each` descriptors fit, those told why included."""
    reserve = max(_MIN_RESERVE, round(_RESERVE_SHARE * num_descriptors))
    return max(1, int((num_descriptors - reserve) / (num_each + _TOLD_SHARE)))


def raise_descriptor_limit() -> int:
    """Let this process open as many files as it may. Return how many that is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted

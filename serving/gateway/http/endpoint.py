"""Is the address that clients connect to free before the start, and does it answer after it?"""

import contextlib
import ipaddress
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator

import psutil

from serving.config import ConfigError

_ANSWER_TIMEOUT_S = 30.0  # from when gateways run to the first answer


class StartError(RuntimeError):
    """The start failed; the message is for the user."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`, an address or a name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_is_guarded(host: str, *, has_keys: bool, insecure: bool) -> None:
    """Raise `ConfigError` if whoever reaches `host` over a network could use it without a key."""
    if not (has_keys or insecure or is_loopback(host)):
        raise ConfigError(
            f"gateway.host: {host} is open to the network, and nobody needs a key: make one with "
            "`headway key create` and set auth.keys_file, or say --insecure (gateway.insecure)"
        )


def check_port_is_free(host: str, port: int, setting: str = "--port or --host") -> None:
    """Raise `StartError` unless `host:port` is free, before engines load for nothing."""
    try:
        family, kind, proto, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
            probe.listen()
    except OSError as error:
        raise StartError(
            f"cannot listen on {host}:{port}: {error.strerror}{_port_holder(port)}; "
            f"choose another with {setting}"
        ) from None


@contextlib.contextmanager
def port_reserved(host: str, port: int) -> Iterator[None]:
    """Keep a port that is free for our gateways, which share it; all others find it taken.

    Else a second service, checked while the engines of the first load, would share it, too: the
    kernel deals connections to whoever listens with SO_REUSEPORT and belongs to the same user.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # connections of a former holder linger: nothing is lost
            family, kind, proto, _, target = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )[0]
            kept = stack.enter_context(socket.socket(family, kind, proto))
            kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            kept.bind(target)  # and never listens: no connection is dealt to it
        yield


def _port_holder(port: int) -> str:
    """Return which process listens on `port`, in words; empty if we may not see it."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status != psutil.CONN_LISTEN or not connection.laddr:
                continue
            if connection.laddr.port == port and connection.pid:
                return f" (by {psutil.Process(connection.pid).name()}, pid {connection.pid})"
    return ""


def wait_for_answer(url: str) -> None:
    """Return once `/health` is answered with 200; raise `StartError` if it never is."""
    # We ask by an address, and the certificate, if there is one, is for a name. We tell nothing.
    tls = ssl.create_default_context()
    tls.check_hostname = False
    tls.verify_mode = ssl.CERT_NONE
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls)
    )
    deadline_s = time.monotonic() + _ANSWER_TIMEOUT_S
    while True:
        try:
            with opener.open(f"{url}/health", timeout=5):
                return
        except OSError as error:
            if time.monotonic() > deadline_s:
                raise StartError(f"{url}/health does not answer: {error}") from None
        time.sleep(0.1)

"""Which web pages may call? CORS for those that may, a refusal for those that may not.

A browser sends requests for any page that it shows: to this machine's own ports too (CSRF), and
under any name that the page's owner lets point here (DNS rebinding). Where a key is needed that
is harmless, for a page has none. Where none is, `/headway/*` and `/metrics` are for pages and
names of our own.
"""

import urllib.parse

from starlette.datastructures import Headers as StarletteHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.config import Config
from serving.gateway.http.endpoint import is_loopback
from serving.gateway.http.errors import ApiError
from serving.stream.frames import Headers

# Of replies, what a page may read beside the body.
_EXPOSED = (
    "x-request-id",
    "retry-after",
    "x-headway-cache",
    "x-headway-engine",
    "x-headway-held-ms",
    "x-headway-model",
    "x-headway-provider",
    "x-headway-why",
    *(
        f"x-ratelimit-{what}-{of}"
        for what in ("limit", "remaining", "reset")
        for of in ("requests", "tokens")
    ),
)


class Origins:
    """Pages and names by which the gateway may be called."""

    def __init__(self, config: Config, app: ASGIApp) -> None:
        """`app` is what answers, preflight requests aside."""
        gateway = config.gateway
        self._cors_origins = frozenset(gateway.cors_origins)
        # On the way of tokens it would cost a call per chunk: it answers preflights alone.
        self._cors = CORSMiddleware(
            app,
            allow_origins=gateway.cors_origins,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),
            expose_headers=_EXPOSED,
        )
        self._needs_key = config.auth.keys_file is not None
        self._is_local = gateway.front == "own" and is_loopback(gateway.host)
        self._hosts = frozenset(host.lower() for host in gateway.allowed_hosts)

    def is_preflight(self, scope: Scope) -> bool:
        """Whether a browser asks what a page may do."""
        if scope["method"] != "OPTIONS" or not self._cors_origins:
            return False
        names = {name for name, _ in scope["headers"]}
        return b"origin" in names and b"access-control-request-method" in names

    async def answer_preflight(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer what a page may do."""
        response = self._cors.preflight_response(StarletteHeaders(raw=scope["headers"]))
        await response(scope, receive, send)

    def reply_headers(self, headers: Headers) -> Headers:
        """Return what a browser is told with the reply to a request with these headers."""
        if not self._cors_origins:
            return []
        origin = _find(headers, b"origin")
        if origin is None or not self._cors.is_allowed_origin(origin):
            return [(b"vary", b"origin")]
        allowed = "*" if self._cors.allow_all_origins else origin
        return [
            (b"access-control-allow-origin", allowed.encode("latin-1")),
            (b"access-control-expose-headers", ", ".join(_EXPOSED).encode()),
            (b"vary", b"origin"),
        ]

    def check_is_own(self, headers: Headers) -> None:
        """Raise `ApiError` 403 for a page or a name that is not ours, unless a key is needed."""
        if self._needs_key:
            return
        host, origin = _find(headers, b"host"), _find(headers, b"origin")
        if host is not None and (self._is_local or self._hosts) and not self._is_own_host(host):
            raise _forbidden(f"host {host!r}", "gateway.allowed_hosts")
        if origin is not None and not self._is_own_origin(origin, host):
            raise _forbidden(f"pages from {origin!r}", "gateway.cors_origins")

    def _is_own_host(self, host: str) -> bool:
        name = _hostname(f"//{host}")
        return name in self._hosts or (self._is_local and is_loopback(name))

    def _is_own_origin(self, origin: str, host: str | None) -> bool:
        if self._cors.is_allowed_origin(origin):
            return True
        if host is not None and origin.partition("://")[2] == host:
            return True  # a page of ours, under a name that was checked if it could be
        return self._is_local and is_loopback(_hostname(origin))


def _forbidden(what: str, setting: str) -> ApiError:
    return ApiError(
        403,
        f"Not for {what}: without keys this is for this machine's own clients ({setting}).",
        kind="PermissionDeniedError",
    )


def _find(headers: Headers, name: bytes) -> str | None:
    return next((value.decode("latin-1") for each, value in headers if each == name), None)


def _hostname(url: str) -> str:
    """Return the host in a URL, "" if there is none."""
    try:
        return urllib.parse.urlsplit(url).hostname or ""
    except ValueError:
        return ""

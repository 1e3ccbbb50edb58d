"""How is an OpenAI-compatible provider called over HTTP, and what can go wrong with it?"""

import contextlib
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from typing import Any, Protocol

import aiohttp
import msgspec
from pydantic import SecretStr

from router import Failure
from serving.config import ProviderConfig


class ProviderFailed(Exception):
    """The provider did not carry a call through, as far as it says not by the client's fault."""

    def __init__(
        self,
        message: str,
        failure: Failure = Failure.ERROR,
        *,
        was_sent: bool = True,
        lasts: bool = False,
        may_be_requests: bool = False,
    ) -> None:
        super().__init__(message)
        self.failure = failure
        self.was_sent = was_sent  # the provider may have counted it
        self.lasts = lasts  # the next call would fail in the same way
        self.may_be_requests = may_be_requests  # another provider's answer will tell whose fault


class ProviderReply(Protocol):
    """A provider's reply that has begun."""

    status: int
    headers: dict[str, str]  # by lower-case name

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes."""
        ...


class Client(Protocol):
    """Calls one provider."""

    def post(
        self, path: str, body: dict[str, Any], api_key: SecretStr | None
    ) -> contextlib.AbstractAsyncContextManager[ProviderReply]:
        """Send a request. Return its reply, which lasts for the block. Raises `ProviderFailed`."""
        ...

    async def close(self) -> None:
        """Drop all connections."""
        ...


class _HttpReply:
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.headers.items()}
        self._response = response

    async def chunks(self) -> AsyncIterator[bytes]:
        async for chunk in self._response.content.iter_any():
            yield chunk


class HttpClient:
    """One provider over HTTP; connections are kept and used again."""

    def __init__(self, config: ProviderConfig) -> None:
        self._config = config
        self._session: aiohttp.ClientSession | None = None
        self._proxy = _proxy(config.url or "")

    @contextlib.asynccontextmanager
    async def post(
        self, path: str, body: dict[str, Any], api_key: SecretStr | None
    ) -> AsyncIterator[ProviderReply]:
        """As `Client.post`."""
        config = self._config
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),  # rate limits bound what is open
                # The caller bounds the rest: it depends on the request.
                timeout=aiohttp.ClientTimeout(total=None, connect=config.connect_timeout_s),
            )
        headers = {"content-type": "application/json", **config.headers}
        if api_key is not None:
            headers["authorization"] = f"Bearer {api_key.get_secret_value()}"
        try:
            async with self._session.post(
                f"{config.url}{path.removeprefix('/v1')}",
                data=msgspec.json.encode(body),
                headers=headers,
                proxy=self._proxy,
                allow_redirects=False,  # the key is for this address alone
            ) as response:
                yield _HttpReply(response)
        except aiohttp.ClientConnectorError as error:
            # Not `error` itself: it may name more than a log should hold.
            words = f"no connection ({type(getattr(error, 'os_error', error)).__name__})"
            raise ProviderFailed(words, was_sent=False) from None
        except aiohttp.ConnectionTimeoutError:
            words = f"no connection within {config.connect_timeout_s:g} s (connect_timeout_s)"
            raise ProviderFailed(words, Failure.TIMEOUT, was_sent=False) from None
        except aiohttp.ClientError as error:
            raise ProviderFailed(f"the connection broke ({type(error).__name__})") from None

    async def close(self) -> None:
        """Drop all connections."""
        if self._session is not None:
            await self._session.close()


def _proxy(url: str) -> str | None:
    """Return the proxy that the environment names for a URL (HTTPS_PROXY, NO_PROXY and so on).

    Looked up once: aiohttp's own way does it in a thread for every request.
    """
    parts = urllib.parse.urlsplit(url)
    if urllib.request.proxy_bypass(parts.netloc):
        return None
    return urllib.request.getproxies().get(parts.scheme)

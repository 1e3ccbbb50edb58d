"""How is a running service asked, and what is said where it does not answer?"""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
import typer

from serving.gateway.http.endpoint import StartError
from serving.gateway.observe.state import ServiceState

_TIMEOUT_S = 10.0

Url = Annotated[
    str,
    typer.Option(
        "--url",
        envvar="HEADWAY_URL",
        help="Of the service, or of one gateway's own port (gateway.metrics_port): it alone.",
    ),
]
DEFAULT_URL = "http://127.0.0.1:8000"
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="HEADWAY_API_KEY", help="An admin key, where the service needs keys."),
]


class RunningService:
    """A service that somebody has started; any of its gateways answers for all."""

    def __init__(self, url: str, api_key: str | None) -> None:
        """`url` may end in `/v1`, as clients have it."""
        self.url = url.rstrip("/").removesuffix("/v1")
        if "://" not in self.url:
            self.url = f"http://{self.url}"
        self.headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def state_json(self) -> Any:
        """Return what all gateways say together. Raise `StartError` if none answers."""
        return self.ask("/headway/state")

    def state(self) -> ServiceState:
        """Return what all gateways say together, typed. Raise `StartError` if none answers."""
        try:
            return msgspec.convert(self.state_json(), ServiceState)
        except msgspec.ValidationError as error:
            raise StartError(f"{self.url} is of another version: {error}") from None

    def models(self) -> list[str]:
        """Return the names that may be asked for. Raise `StartError` if they are not told."""
        try:
            return [card["id"] for card in self.ask("/v1/models")["data"]]
        except (TypeError, LookupError):
            raise StartError(f"{self.url}/v1/models lists no models") from None

    def request(self, request_id: str) -> Mapping[str, Any]:
        """Return the way of a request. Raise `StartError` if no gateway knows it."""
        return self.ask(f"/headway/requests?id={quote(request_id, safe='')}")

    def ask(self, path: str, *, method: str = "GET") -> Any:
        """Return the JSON at a path. Raise `StartError`, which names the mend, if there is none."""
        opener = urllib.request.build_opener()
        if self.url.startswith(("http://127.", "http://localhost", "http://[::1]")):
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            request = urllib.request.Request(self.url + path, headers=self.headers, method=method)
            with opener.open(request, timeout=_TIMEOUT_S) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise StartError(self._refusal(path, error)) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            reason = getattr(reason, "strerror", None) or reason
            raise StartError(
                f"{self.url} does not answer ({reason}): is `headway serve` running there? "
                "--url or HEADWAY_URL names another"
            ) from None

    def _refusal(self, path: str, error: urllib.error.HTTPError) -> str:
        if error.code in (401, 403):
            return (
                f"{self.url} wants an admin key (`headway key create NAME --admin`): "
                "--api-key or HEADWAY_API_KEY"
            )
        try:
            message = json.load(error)["error"]["message"]
        except (ValueError, TypeError, LookupError):
            message = f"it answers {error.code} to {path}: is that Headway?"
        return f"{self.url}: {message}"

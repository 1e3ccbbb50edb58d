"""How is a provider called that only the package litellm knows: Anthropic, Gemini, Bedrock?

An optional extra, `headway[litellm]`, pinned: a later release was flagged as compromised.
Chat completions only.
"""

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from pydantic import SecretStr

from router import Failure
from serving.config import ConfigError, ProviderConfig
from serving.gateway.exchange import DONE
from serving.gateway.providers.http_client import ProviderFailed, ProviderReply

_PINNED = "1.106.2"
_PREFIX = "llm_provider-"  # of the provider's own headers


class _LitellmReply:
    """litellm's objects, as the events or the body that OpenAI would have sent."""

    def __init__(self, answer: Any, *, stream: bool) -> None:
        self.status = 200
        hidden = getattr(answer, "_hidden_params", None) or {}
        self.headers = {
            str(name).lower().removeprefix(_PREFIX): str(value)
            for name, value in (hidden.get("additional_headers") or {}).items()
        }
        self.headers["content-type"] = "text/event-stream" if stream else "application/json"
        self._answer = answer
        self._stream = stream

    async def chunks(self) -> AsyncIterator[bytes]:
        if not self._stream:
            yield self._answer.model_dump_json(exclude_none=True).encode()
            return
        async for chunk in self._answer:
            yield b"data: " + chunk.model_dump_json(exclude_none=True).encode() + b"\n\n"
        yield DONE


class _ErrorReply:
    """An error that litellm raised, as the reply that the provider sent."""

    def __init__(self, error: Exception, status: int) -> None:
        self.status = status
        response = getattr(error, "response", None)
        headers = getattr(response, "headers", None) or {}
        self.headers = {str(name).lower(): str(value) for name, value in headers.items()}
        self.headers["content-type"] = "application/json"
        message = str(getattr(error, "message", error))
        self._body = {"error": {"message": message, "type": type(error).__name__, "code": status}}

    async def chunks(self) -> AsyncIterator[bytes]:
        yield json.dumps(self._body).encode()


class LitellmClient:
    """One provider through litellm. Raises `ConfigError` where the extra is not installed."""

    def __init__(self, config: ProviderConfig) -> None:
        try:
            import litellm
        except ImportError as error:
            raise ConfigError(
                f"providers.{config.name}.kind: litellm is not installed: "
                f"pip install 'litellm=={_PINNED}' ({error})"
            ) from None
        litellm.suppress_debug_info = True
        self._litellm = litellm
        self._config = config

    @contextlib.asynccontextmanager
    async def post(
        self, path: str, body: dict[str, Any], api_key: SecretStr | None
    ) -> AsyncIterator[ProviderReply]:
        """As `Client.post`."""
        config = self._config
        if path != "/v1/chat/completions":
            raise ProviderFailed(f"{path} is not served through litellm", was_sent=False)
        secret = {} if api_key is None else {"api_key": api_key.get_secret_value()}
        base = {} if config.url is None else {"api_base": config.url}
        try:
            answer = await self._litellm.acompletion(
                **{**body, **secret, **base},
                num_retries=0,  # the router retries, elsewhere
                extra_headers=config.headers or None,
            )
        except Exception as error:  # each provider of litellm has errors of its own
            status = getattr(error, "status_code", None)
            if isinstance(error, self._litellm.exceptions.Timeout):
                raise ProviderFailed("no answer in time", Failure.TIMEOUT) from None
            if not isinstance(status, int):
                raise ProviderFailed(f"litellm: {type(error).__name__}") from None
            yield _ErrorReply(error, status)
            return
        yield _LitellmReply(answer, stream=bool(body.get("stream")))

    async def close(self) -> None:
        """Do nothing: litellm keeps its connections for all that use it."""

"""Which API keys are providers called with? Read from where the configuration points."""

import os
from pathlib import Path

from pydantic import SecretStr

from serving.config import ConfigError, ProviderConfig


def read_api_keys(provider: ProviderConfig) -> dict[str, SecretStr | None]:
    """Return the provider's API keys by their names; None for one that needs no secret.

    Raises `ConfigError` naming the setting, never what was read.
    """
    keys: dict[str, SecretStr | None] = {}
    for key in provider.keys:
        where = f"providers.{provider.name}.keys.{key.name}"
        if key.env is not None:
            keys[key.name] = _secret(os.environ.get(key.env, ""), f"{where}.env", key.env)
        elif key.file is not None:
            keys[key.name] = _secret(_content(key.file, where), f"{where}.file", str(key.file))
        else:
            keys[key.name] = None
    return keys


def _content(path: Path, where: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}.file: {path} cannot be read: {type(error).__name__}") from None


def _secret(text: str, where: str, source: str) -> SecretStr:
    secret = text.strip()
    if not secret:
        raise ConfigError(f"{where}: there is no key in {source}")
    if not secret.isascii() or not secret.isprintable() or " " in secret:
        raise ConfigError(f"{where}: what is in {source} is not one key on one line")
    return SecretStr(secret)

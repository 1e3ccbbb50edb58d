"""Is a client's API key known? Keys are made once, stored as hashes, checked in constant time.

A key is `hw-<id>-<secret>`. The id finds the entry and is no secret; what is
stored is the SHA-256 of the whole key, which is safe without salt or
stretching because the secret has 256 random bits.
"""

import datetime
import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import filelock
import msgspec

from serving.config import ConfigError

_KEY = re.compile(r"hw-([0-9a-f]{12})-[0-9a-f]{64}")
_TENANT = re.compile(r"[\w.@-]{1,64}")
# Compared with where no entry has the id, so that this takes as long.
_NO_HASH = hashlib.sha256(b"").hexdigest()

_Instant = Annotated[datetime.datetime, msgspec.Meta(tz=True)]


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is stored of a key."""

    id: str
    tenant: str
    sha256: str  # of the whole key, in hexadecimal
    created: _Instant
    expires: _Instant | None = None
    admin: bool = False  # may also see and change the server's state


class _KeysFile(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[Key]


class KeyRing:
    """All keys that are valid now."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = {key.id: key for key in keys}

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, text: str, now: datetime.datetime) -> Key | None:
        """Return the entry of this key, None if there is none or it has expired.

        Takes the same time for every wrong key: always one hash and one constant-time
        comparison.
        """
        match = _KEY.fullmatch(text)
        key = self._keys.get(match[1]) if match else None
        digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
        is_right = hmac.compare_digest(digest, key.sha256 if key else _NO_HASH)
        if key is None or not is_right or (key.expires is not None and key.expires <= now):
            return None
        return key

    def has_tenant(self, tenant: str, now: datetime.datetime) -> bool:
        """Whether a tenant has a key that is valid."""
        return any(
            key.tenant == tenant and (key.expires is None or key.expires > now)
            for key in self._keys.values()
        )


def make_key(
    tenant: str, *, admin: bool = False, expires: datetime.datetime | None = None
) -> tuple[str, Key]:
    """Return a new key, to be shown once, and its entry. Raises `ConfigError` for a bad name."""
    if not _TENANT.fullmatch(tenant):
        raise ConfigError(f"{tenant!r}: a tenant's name is 1 to 64 letters, digits or any of _.@-")
    key_id = secrets.token_hex(6)
    text = f"hw-{key_id}-{secrets.token_hex(32)}"
    return text, Key(
        id=key_id,
        tenant=tenant,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        created=datetime.datetime.now(datetime.UTC).replace(microsecond=0),
        expires=expires,
        admin=admin,
    )


def read_keys(path: Path) -> list[Key]:
    """Return the entries of a keys file. Raises `ConfigError` if it cannot be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_KeysFile).keys
    except OSError as error:
        raise ConfigError(
            f"auth.keys_file: {path} cannot be read: {error.strerror} "
            "(`headway key create` makes one)"
        ) from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"auth.keys_file: {path} is not a keys file: {error}") from None


class KeysFile:
    """A keys file, locked while it is being changed; no reader ever sees half of it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = filelock.FileLock(f"{path}.lock")
        self.keys: list[Key] = []

    def __enter__(self) -> "KeysFile":
        self._lock.acquire()
        try:
            self.keys = read_keys(self._path) if self._path.exists() else []
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def save(self) -> None:
        """Replace the file by one with the entries in `keys`, readable by its owner alone."""
        text = msgspec.json.format(msgspec.json.encode(_KeysFile(self.keys)), indent=1)
        handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text + b"\n")
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(self._path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

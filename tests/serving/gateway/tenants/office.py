"""Tenants with keys, before a running gateway."""

from serving.gateway.tenants.keys import KeysFile, make_key
from tests.support.running_gateway import running


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


class Office:
    """A keys file, and whoever is in it."""

    def __init__(self, folder) -> None:
        self.path = folder / "keys.json"
        with KeysFile(self.path) as file:
            file.save()
        self.texts: list[str] = []

    def hire(self, tenant: str, **fields) -> dict[str, str]:
        """Headers with a new key of a tenant."""
        with KeysFile(self.path) as file:
            text, key = make_key(tenant, **fields)
            file.keys.append(key)
            file.save()
        self.texts.append(text)
        return bearer(text)

    def running(self, tenants: dict | None = None, *, num_engines: int = 2, **sections):
        auth = {"keys_file": str(self.path), **sections.pop("auth", {})}
        return running(num_engines, auth=auth, tenants=tenants or {}, **sections)

"""A Hugging Face hub with four models, over HTTP on this machine."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_goodtoken"
SHAPE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 64,
    "max_position_embeddings": 2048,
}
FILES = {
    "config.json": json.dumps(SHAPE).encode(),
    "tokenizer.json": b"{}",
    "model.safetensors": b"w" * 300_000,
    "pytorch_model.bin": b"b" * 300_000,  # the same weights once more, which nobody wants
    "original/model.pth": b"o" * 300_000,
    "README.md": b"#",
}
OPEN, GATED, BROKEN, SLOW = "acme/open", "acme/gated", "acme/broken", "acme/slow"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.server.paths.append(self.path)
        if parts[:2] == ["api", "models"]:
            self._tell(parts[2:])
        else:
            self._send_file("/".join(parts[:2]), "/".join(parts[4:]), with_body=with_body)

    def _tell(self, parts: list[str]) -> None:
        name, rest = "/".join(parts[:2]), parts[2:]
        if name == BROKEN:
            self._reply(500, {"error": "the hub is ill"})
        elif name not in (OPEN, GATED, SLOW):
            self._reply(401, {"error": "Invalid username or password."}, "RepoNotFound")
        elif rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
            self._reply(404, {"error": "Invalid rev id"}, "RevisionNotFound")
        elif rest[:1] == ["auth-check"] and not self._may(name):
            self._reply(403, {"error": "Access is restricted."}, "GatedRepo")
        elif rest[:1] == ["tree"]:
            self._reply(
                200,
                [
                    {"type": "file", "path": p, "size": len(b), "oid": _etag(b)}
                    for p, b in FILES.items()
                ],
            )
        else:
            siblings = [{"rfilename": path, "size": len(body)} for path, body in FILES.items()]
            gated = "manual" if name == GATED else False
            self._reply(200, {"id": name, "sha": COMMIT, "gated": gated, "siblings": siblings})

    def _send_file(self, name: str, path: str, *, with_body: bool) -> None:
        if path not in FILES:
            self._reply(404, {"error": "Entry not found"}, "EntryNotFound")
            return
        if not self._may(name):
            self._reply(403, {"error": "Access is restricted."}, "GatedRepo")
            return
        body = FILES[path]
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{_etag(body)}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            if name == SLOW and path == "model.safetensors":
                self.server.is_released.wait(30)
            with contextlib.suppress(OSError):
                self.wfile.write(body)

    def _may(self, name: str) -> bool:
        return name != GATED or self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _reply(self, status: int, content: object, code: str = "") -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class FakeHub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.paths: list[str] = []
        self.is_released = threading.Event()  # large files of the slow model come then

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def _etag(body: bytes) -> str:
    return hashlib.sha1(body, usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.is_released.set()
        hub.shutdown()

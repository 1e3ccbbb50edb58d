"""nginx. It counts connections and knows no tokens."""

import shutil
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.peers.routers.peer import MissingError, Peer

_CONFIG = """\
daemon off;
worker_processes 1;
error_log {folder}/error.log;
pid {folder}/nginx.pid;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    client_max_body_size 64m;
    client_body_buffer_size 64m;  # its workers may not write files here
    upstream engines {{
        {policy};
        keepalive 512;
{servers}
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://engines;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 300s;
        }}
    }}
}}
"""


class Nginx(Peer):
    title = "nginx"
    policies = ("least_conn",)

    @classmethod
    def install(cls) -> str:
        if shutil.which("nginx") is None:
            raise MissingError("no nginx is installed here")
        version = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=True)
        return version.stderr.strip().rpartition(": ")[2]

    def command(self, folder: Path, port: int) -> list[str]:
        servers = "\n".join(f"        server {urlsplit(url).netloc};" for url in self.engine_urls)
        path = folder / "nginx.conf"
        path.write_text(
            _CONFIG.format(folder=folder, port=port, policy=self.policy, servers=servers)
        )
        return ["nginx", "-c", str(path), "-p", str(folder)]

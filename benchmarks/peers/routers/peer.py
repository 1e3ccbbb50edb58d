"""How is another router installed, started and told of the engines?"""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from serving.capacity.launch import Launch
from serving.capacity.service import SystemUnderTest, free_ports
from serving.planning.bundled_model import default_cache_dir

_INSTALL_TIMEOUT_S = 300.0


class MissingError(Exception):
    """This peer cannot be installed here; the message says why."""


class Peer(SystemUnderTest):
    """One peer with one policy, in front of engines that already run."""

    title: ClassVar[str]
    package: ClassVar[str] = ""  # on PyPI, pinned; empty: a binary that is already there
    policies: ClassVar[tuple[str, ...]]  # its best ones

    def __init__(
        self, policy: str, engine_urls: Sequence[str], model: str, engines: str = "ours"
    ) -> None:
        """`engines`: whose settings they have, `ours` or vLLM's own, `stock`."""
        name = f"{self.title} {policy}".strip()
        super().__init__(name + ("" if engines == "ours" else ", stock engines"), len(engine_urls))
        self.engines = engines
        self.policy = policy
        self.engine_urls = list(engine_urls)
        self.model = model

    @classmethod
    def install(cls) -> str:
        """Install the peer in an environment of its own, unless it is there. Return the version.

        Raises `MissingError` if it cannot be installed.
        """
        folder = cls.folder()
        done = folder / "headway-installed"
        if not done.exists() or done.read_text() != cls.package:
            folder.parent.mkdir(parents=True, exist_ok=True)
            uv = sys.executable, "-m", "uv"
            _run(*uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder))
            python = folder / "bin" / "python"
            _run(*uv, "pip", "install", "--quiet", "--python", str(python), cls.package)
            done.write_text(cls.package)
        return cls.package.replace("==", " ")

    @classmethod
    def folder(cls) -> Path:
        """Return the folder of its environment."""
        return default_cache_dir() / "peers" / cls.title

    @classmethod
    def binary(cls, name: str) -> str:
        """Return the path of a command in its environment."""
        return str(cls.folder() / "bin" / name)

    def command(self, folder: Path, port: int) -> list[str]:
        """Return the command that starts it. Files that it needs are written to `folder`."""
        raise NotImplementedError

    def _launch(self, folder: Path) -> None:
        (port,) = free_ports(1)
        self.urls = [f"http://127.0.0.1:{port}"]
        self.launches = [Launch(self.command(folder, port), folder / "peer.log")]

    def _is_ready(self) -> bool:
        return answers(self.urls[0], self.model)


def answers(url: str, model: str) -> bool:
    """Whether this endpoint answers a completion request."""
    body = json.dumps({"model": model, "prompt": "ready?", "max_tokens": 1}).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return b"choices" in reply.read()
    except OSError:
        return False


def _run(*command: str) -> None:
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S
        )
    except FileNotFoundError:
        raise MissingError(f"{command[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise MissingError(f"not installed after {_INSTALL_TIMEOUT_S:g} s") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise MissingError(f"cannot be installed: {reason}") from None

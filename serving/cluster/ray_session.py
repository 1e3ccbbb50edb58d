"""Which Ray does the application run on? A private one on this machine, or one that runs already.

The private one listens on the loopback interface only and has a random token. All
its files, vLLM's and HAProxy's are in one folder, which is removed at the end.
"""

import contextlib
import logging
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from serving.cluster.processes import become_subreaper, ending_new_processes
from serving.gateway.http.endpoint import StartError
from serving.planning.bundled_model import default_cache_dir

_OBJECT_STORE_BYTES = 200_000_000  # requests and tokens do not go through it
_PREFIX = "headway-"
_OWNER_FILE = "owner"  # holds pid and start time of the launcher
# HAProxy allows its sockets 97 characters; Ray Serve puts a folder of 56 in between.
_MAX_FOLDER_LENGTH = 97 - len("/proxy/") - 56 - len("/metrics.sock")
_NAMESPACE = "serve"  # Ray Serve's own
_CONTROLLER = "SERVE_CONTROLLER_ACTOR"


@dataclass(frozen=True, slots=True)
class RaySession:
    """A Ray that this process is connected to."""

    is_private: bool
    serve_was_running: bool  # if so, it may have applications of others
    folder: Path | None  # of all files of a private one

    @property
    def logs(self) -> Path | None:
        """The folder of all processes' logs; None if the Ray is not ours."""
        return self.folder / "ray" / "session_latest" / "logs" if self.folder else None


def private_environment(folder: Path, *, haproxy: bool, given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables of a private Ray, Serve, vLLM and HAProxy.

    They must be set before Ray is imported. Those that the user has `given`
    stay, except for the choice of the front and the places of files. `folder` is private to
    this run; HAProxy gets two free TCP ports.
    """
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Without a token, whoever can connect to Ray runs code as this user.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Otherwise Ray would replace 127.0.0.1 by the machine's network address and
        # listen there. Named after the systems where "0" is the default.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a future default; avoids a warning
        "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
        # With Ray's default of 15 everything else on the machine would run before our processes.
        "RAY_worker_niceness": "0",
        # Only our own HAProxy has to notice that a gateway stops.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        # Compiled kernels are kept for the next start; the rest of vLLM's files is not.
        "TORCHINDUCTOR_CACHE_DIR": str(default_cache_dir() / "torchinductor"),
    }
    if given.get("RAY_AUTH_MODE", "token") != "token":
        del defaults["RAY_AUTH_TOKEN"]
    if haproxy:
        for key in ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT"):
            defaults[key] = str(_free_port())
        # Otherwise Serve passes every chunk between two threads: twice the CPU per token.
        defaults["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] = "0"
    proxy = folder / "proxy"
    return {
        **{key: value for key, value in defaults.items() if key not in given},
        "RAY_SERVE_ENABLE_HA_PROXY": "1" if haproxy else "0",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(proxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(proxy / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(proxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(proxy / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(proxy / "metrics.sock"),
        "TMPDIR": str(folder / "tmp"),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Yield a new private folder and remove it afterwards.

    First remove folders that killed launchers left.
    """
    base = Path(tempfile.gettempdir())
    if len(str(base / _PREFIX)) + 8 > _MAX_FOLDER_LENGTH:  # mkdtemp adds eight characters
        base = Path("/tmp")
    for folder in base.glob(f"{_PREFIX}*"):
        if _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    try:
        (folder / _OWNER_FILE).write_text(f"{os.getpid()} {psutil.Process().create_time()}")
        for name in ("proxy", "tmp"):
            (folder / name).mkdir()
        yield folder
    finally:
        _remove_folder(folder)


def _is_abandoned(folder: Path) -> bool:
    """Whether the launcher that made `folder` has ended."""
    try:
        pid, started = (folder / _OWNER_FILE).read_text().split()
        owner = psutil.Process(int(pid))
        return owner.create_time() != float(started) or owner.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (OSError, ValueError, psutil.Error):
        return False  # of another user, or being made right now


def _remove_folder(folder: Path) -> None:
    for _ in range(20):  # a process that was just killed may still be writing
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


@contextlib.contextmanager
def private_session(
    folder: Path, num_cpus: int, num_gpus: int, runtime_env: dict[str, Any], verbose: bool
) -> Iterator[RaySession]:
    """Run a private Ray on this machine. `private_environment()` must have been set before.

    Call it from the main thread: Ray's processes end with the thread that started
    them, even if that is killed. Raise `StartError` if Ray cannot start.
    """
    become_subreaper()
    with (
        ending_new_processes(),
        _connected(
            "cannot start Ray",
            "local",
            runtime_env,
            verbose,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder / "ray"),
        ),
    ):
        yield RaySession(is_private=True, serve_was_running=False, folder=folder)


@contextlib.contextmanager
def joined_session(
    address: str, runtime_env: dict[str, Any], verbose: bool
) -> Iterator[RaySession]:
    """Connect to the Ray at `address` ("auto" for this machine's) and leave it running.

    Raise `StartError` if it cannot be reached.
    """
    with _connected(f"cannot join the Ray at {address}", address, runtime_env, verbose):
        yield RaySession(is_private=False, serve_was_running=_serve_is_running(), folder=None)


@contextlib.contextmanager
def _connected(
    trouble: str, address: str, runtime_env: dict[str, Any], verbose: bool, **options: Any
) -> Iterator[None]:
    import ray  # late: it reads the environment when imported

    level = logging.INFO if verbose else logging.ERROR
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(level)
    try:
        ray.init(
            address,
            namespace=_NAMESPACE,
            runtime_env=runtime_env or None,
            log_to_driver=verbose,
            logging_level=level,
            **options,
        )
    except Exception as error:  # Ray raises anything, from OSError to bare Exception
        raise StartError(f"{trouble}: {' '.join(str(error).split())}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _serve_is_running() -> bool:
    import ray

    try:
        ray.get_actor(_CONTROLLER, namespace=_NAMESPACE)
    except ValueError:
        return False
    return True

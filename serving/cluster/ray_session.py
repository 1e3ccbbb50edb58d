"""The Ray that an application runs on: our own on this machine, or one that is there.

Our own one is private: it listens on the loopback interface only, its token is
random, and every file of it, of vLLM and of HAProxy lies in one folder that
goes with it.
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

from serving.cluster.processes import become_subreaper, nothing_left
from serving.gateway.http.endpoint import StartError
from serving.planning.bundled_model import default_cache_dir

_OBJECT_STORE_BYTES = 200_000_000  # tokens do not travel through it
_PREFIX = "headway-"
_OWNER = "owner"  # file with pid and start time of the launcher
# HAProxy allows its sockets 97 characters; Ray Serve puts a folder of 56 in between.
_MAX_FOLDER_LENGTH = 97 - len("/proxy/") - 56 - len("/metrics.sock")
NAMESPACE = "serve"  # Ray Serve's own
_CONTROLLER = "SERVE_CONTROLLER_ACTOR"


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Ray that this process is connected to."""

    is_ours: bool
    serve_was_running: bool  # then somebody else's applications may be there
    folder: Path | None  # where our own one keeps its files

    @property
    def logs(self) -> Path | None:
        """Folder of the logs of all processes on our own Ray."""
        return self.folder / "ray" / "session_latest" / "logs" if self.folder else None


def environment(folder: Path, *, haproxy: bool, given: Mapping[str, str]) -> dict[str, str]:
    """Return what our own Ray, Serve, vLLM and HAProxy need set, before Ray is imported.

    What the user has `given` in the environment stays, but for the front and the
    files. `folder` is private to this run; two ports are drawn for HAProxy.
    """
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Without a token, whoever reaches a port of Ray runs code as this user.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # Ray would replace 127.0.0.1 by the address of the network otherwise,
        # and listen there; named after the systems where that is the default.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the default to be; silences a warning
        "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
        # Ray's default of 15 would let anything else on the machine go before gateway and engines.
        "RAY_worker_niceness": "0",
        # Nobody but our own HAProxy has to notice that a gateway leaves.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        # Compiled kernels are worth keeping; the rest of vLLM's files is not.
        "TORCHINDUCTOR_CACHE_DIR": str(default_cache_dir() / "torchinductor"),
    }
    if given.get("RAY_AUTH_MODE", "token") != "token":
        del defaults["RAY_AUTH_TOKEN"]
    if haproxy:
        for key in ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT"):
            defaults[key] = str(_free_port())
        # Serve passes every chunk between two threads otherwise: twice the CPU per token.
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
def own_folder() -> Iterator[Path]:
    """Yield a new private folder and remove it afterwards.

    Folders that a killed launcher left are removed first.
    """
    base = Path(tempfile.gettempdir())
    if len(str(base / _PREFIX)) + 8 > _MAX_FOLDER_LENGTH:  # mkdtemp adds eight characters
        base = Path("/tmp")
    for folder in base.glob(f"{_PREFIX}*"):
        if _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
    try:
        (folder / _OWNER).write_text(f"{os.getpid()} {psutil.Process().create_time()}")
        for name in ("proxy", "tmp"):
            (folder / name).mkdir()
        yield folder
    finally:
        _remove(folder)


def _is_abandoned(folder: Path) -> bool:
    try:
        pid, started = (folder / _OWNER).read_text().split()
        owner = psutil.Process(int(pid))
        return owner.create_time() != float(started) or owner.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (OSError, ValueError, psutil.Error):
        return False  # not ours, or just being made


def _remove(folder: Path) -> None:
    for _ in range(20):  # a process just killed may still be writing
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


@contextlib.contextmanager
def own_cluster(
    folder: Path, num_cpus: int, num_gpus: int, runtime_env: dict[str, Any], verbose: bool
) -> Iterator[Cluster]:
    """Run a Ray of our own on this machine; `environment()` has been set before.

    Call from the main thread: Ray's processes end with the thread that started
    them, even when it is killed. Raises `StartError`.
    """
    become_subreaper()
    with (
        nothing_left(),
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
        yield Cluster(is_ours=True, serve_was_running=False, folder=folder)


@contextlib.contextmanager
def joined_cluster(address: str, runtime_env: dict[str, Any], verbose: bool) -> Iterator[Cluster]:
    """Connect to the Ray at `address` ("auto" for this machine's); it is left running.

    Raises `StartError`.
    """
    with _connected(f"cannot join the Ray at {address}", address, runtime_env, verbose):
        yield Cluster(is_ours=False, serve_was_running=_serve_runs(), folder=None)


@contextlib.contextmanager
def _connected(
    trouble: str, address: str, runtime_env: dict[str, Any], verbose: bool, **options: Any
) -> Iterator[None]:
    import ray  # late: it reads the environment

    level = logging.INFO if verbose else logging.ERROR
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(level)
    try:
        ray.init(
            address,
            namespace=NAMESPACE,
            runtime_env=runtime_env or None,
            log_to_driver=verbose,
            logging_level=level,
            **options,
        )
    except Exception as error:  # Ray raises what comes up, from OSError to bare Exception
        raise StartError(f"{trouble}: {' '.join(str(error).split())}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _serve_runs() -> bool:
    import ray

    try:
        ray.get_actor(_CONTROLLER, namespace=NAMESPACE)
    except ValueError:
        return False
    return True

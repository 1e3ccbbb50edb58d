"""Which Ray does the application run on? A private one on this machine, or one that runs already.

The private one listens on the loopback interface only and has a random token. All
its files, vLLM's and HAProxy's are in one folder, which is removed at the end.
"""

import atexit
import contextlib
import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import psutil

from serving.cluster.logs import logs_of
from serving.cluster.processes import (
    RAY_HEADS,
    RUN_VARIABLE,
    adopt_orphans,
    deaf_to_stop_signals,
    end_processes,
    end_run,
    has_ended,
    pending_stop_signal,
    reap_children,
)
from serving.gateway.http.endpoint import StartError
from serving.planning.bundled_model import default_cache_dir

_OBJECT_STORE_BYTES = 200_000_000  # requests and tokens do not go through it
_NAMESPACE = "serve"  # Ray Serve's own
_CONTROLLER = "SERVE_CONTROLLER_ACTOR"
_LOOK_S = 0.2  # between two looks whether Ray is still there
_FINISH_S = 3.0  # for a call that a signal interrupts
_DISCONNECT_S = 1.5  # Ray's own way to end takes about one second
_END_S = 10.0  # for it to return in any case

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RaySession:
    """A Ray that this process is connected to."""

    is_private: bool
    serve_was_running: bool  # if so, it may have applications of others
    folder: Path | None  # of all files of a private one
    heads: dict[str, psutil.Process] = field(default_factory=dict)  # of a private one, by name

    @property
    def logs(self) -> Path | None:
        """The folder of all processes' logs; None if the Ray is not ours."""
        return logs_of(self.folder) if self.folder else None

    def check(self) -> None:
        """Raise `StartError` if a private Ray has ended."""
        for name, head in self.heads.items():
            if has_ended(head):
                raise StartError(f"Ray has ended: its {name} (process {head.pid}) is gone")

    def stop_signal(self) -> int | None:
        """Return the signal by which somebody asked a private Ray to stop; None if nobody did."""
        signums = [pending_stop_signal(head) for head in self.heads.values()]
        return next(filter(None, signums), None)

    def call(self, ask: Callable[[], T]) -> T:
        """Return what `ask()` returns, which calls Ray. Raise `StartError` if Ray ends meanwhile.

        A private Ray is called from a thread: without a GCS a call takes a minute, after which
        Ray ends the process that called.
        """
        if not self.is_private:
            return ask()
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(ask())
            except BaseException as error:
                future.set_exception(error)

        thread = threading.Thread(target=run, name="ray", daemon=True)
        thread.start()
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    return future.result(_LOOK_S)
                self.check()
        except KeyboardInterrupt:
            thread.join(_FINISH_S)  # Ray crashes if it is left in the middle of a call
            raise


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
        # When memory runs out Ray would end workers by age, gateways among them. The kernel ends
        # engines first: see `prefer_for_oom_kill`.
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_worker_oom_score_adjustment": "0",
        # A gateway that hangs cannot drain, which Serve would let it try, and one that is stopped
        # does not end when told to, which Ray would give it five seconds for.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
        "RAY_kill_worker_timeout_milliseconds": "1000",
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
        RUN_VARIABLE: str(folder),
        "SPT_NOENV": "1",  # otherwise a process that sets its title overwrites that variable
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def private_session(
    folder: Path, num_cpus: int, num_gpus: int, runtime_env: dict[str, Any], verbose: bool
) -> Iterator[RaySession]:
    """Run a private Ray on this machine. `private_environment()` must have been set before.

    Call it from the main thread: Ray's processes end with the thread that started
    them, even if that is killed. Stop signals do not reach them. Raise `StartError` if Ray
    cannot start.
    """
    adopt_orphans()
    heads: dict[str, psutil.Process] = {}
    try:
        with deaf_to_stop_signals():
            _connect(
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
            )
        heads = _find_heads()
        yield RaySession(True, False, folder, heads)
    finally:
        if any(map(has_ended, heads.values())):
            end_processes(heads.values())  # one comes to no end without the other
            end_run(folder)
            atexit.register(_exit_at_once)
        else:
            leaving = threading.Thread(target=_disconnect, name="leaving", daemon=True)
            leaving.start()
            leaving.join(_DISCONNECT_S)
            end_run(folder)
            leaving.join(_END_S)
        reap_children()


def _exit_at_once() -> NoReturn:
    """End this process as failed: without its processes Ray takes half a minute to leave it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _find_heads() -> dict[str, psutil.Process]:
    children = {child.name(): child for child in psutil.Process().children()}
    return {name: children[name] for name in RAY_HEADS}


@contextlib.contextmanager
def joined_session(
    address: str, runtime_env: dict[str, Any], verbose: bool
) -> Iterator[RaySession]:
    """Connect to the Ray at `address` ("auto" for this machine's) and leave it running.

    Raise `StartError` if it cannot be reached.
    """
    try:
        _connect(f"cannot join the Ray at {address}", address, runtime_env, verbose)
        yield RaySession(is_private=False, serve_was_running=_serve_is_running(), folder=None)
    finally:
        _disconnect()


def _connect(
    trouble: str, address: str, runtime_env: dict[str, Any], verbose: bool, **options: Any
) -> None:
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


def _disconnect() -> None:
    import ray

    ray.shutdown()


def _serve_is_running() -> bool:
    import ray

    try:
        ray.get_actor(_CONTROLLER, namespace=_NAMESPACE)
    except ValueError:
        return False
    return True

"""What happens in a launch, from start to end?

The application is built, Ray is started or joined, the application is deployed; then engines are
waited for and watched. At the end streams are drained, and no process and no file is left.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from serving.cli.config_file import ConfigFile, check_with_ray
from serving.cli.interrupts import Interrupts, StopSignal
from serving.cli.progress import (
    ProgressDisplay,
    engine_core_error,
    engine_phases,
    failure_cause,
    last_error,
    read_app_state,
)
from serving.cluster.logs import logs_of, place_for_logs
from serving.cluster.processes import reap_children, run_processes
from serving.cluster.ray_session import (
    RaySession,
    joined_session,
    private_environment,
    private_session,
)
from serving.cluster.run_folder import run_folder
from serving.gateway.http.endpoint import (
    StartError,
    check_port_is_free,
    is_loopback,
    port_reserved,
    wait_for_answer,
)
from serving.planning.hardware import Hardware
from serving.planning.plan import Plan

_ENGINE = "Engine"  # the deployment in `serving.cluster.application`
_POLL_S = 0.5
_WATCH_S = 5.0  # between two checks of running engines
# For Serve's own steps before and after the drain. A gateway behind HAProxy cannot know when its
# time is over: it ends its streams when Ray ends, before Serve would cut them (`build`).
_DRAIN_MARGIN_S = 5.0

Build = Callable[[dict[str, Any]], Any]  # makes the Serve application from its arguments


def launch(
    file: ConfigFile,
    plan: Plan,
    hardware: Hardware,
    console: Console,
    *,
    address: str | None = None,
    verbose: bool = False,
    build: Build | None = None,
    fetch: Callable[[], None] = lambda: None,
) -> int:
    """Serve until a signal comes; return the exit code.

    It is 0 after a drain, and 128 + signal if that came before anything was ready. Raise
    `ConfigError`, `BundledModelError` or `StartError` if the start fails; then nothing is left
    running. With `address` join the Ray that runs there. `fetch` downloads the weights, and is
    called where this machine's engines will load them. Tests replace
    `serving.cluster.application.build` by `build`.
    """
    start_s = time.monotonic()
    with Interrupts() as interrupts, contextlib.ExitStack() as stack:
        try:
            if address is None:
                check_port_is_free(file.host, file.port)
                if not file.haproxy:
                    stack.enter_context(port_reserved(file.host, file.port))
                for port in file.metrics_ports(plan.num_gateways):
                    check_port_is_free(file.config.gateway.host, port, "gateway.metrics_port")
                fetch()
                folder = stack.enter_context(run_folder())
                console.print(_where_logs_are(file, folder))
                variables = private_environment(folder, haproxy=file.haproxy, given=os.environ)
                os.environ.update(variables)
            else:
                os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1" if file.haproxy else "0"
            os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override the plan
            check_with_ray(file)
            # Built before Ray starts: errors show at once, the plan that it makes
            # sees the same free memory as ours, and the bundled model is
            # fetched if it is needed.
            application = (build or _import_build())(file.application["args"])
            runtime_env = file.application.get("runtime_env") or {}
            if address is None:
                console.print("starting Ray …")
                num_gpus = len(hardware.gpus) if plan.device == "cuda" else 0
                ray = private_session(folder, len(hardware.cores), num_gpus, runtime_env, verbose)
            else:
                ray = joined_session(address, runtime_env, verbose)
            session = stack.enter_context(ray)
            interrupts.install_handlers()
            return _serve(file, plan, application, session, console, interrupts, start_s)
        except StopSignal as stop:
            console.print("stopped before anything was ready")
            return 128 + stop.signum
        except SystemExit:  # Ray handles SIGTERM itself while it starts
            console.print("stopped before anything was ready")
            return 128 + signal.SIGTERM
        finally:
            interrupts.stop_raising()
            stack.close()


def _where_logs_are(file: ConfigFile, folder: Path) -> str:
    """Return where logs are now and later, which is noted in the run's folder."""
    place = place_for_logs(file.config.log, folder)
    now = f"logs of Ray, gateways and engines: {logs_of(folder)}"
    if place is None:
        return f"{now}, removed at the end (--log-dir keeps them)"
    requests = f"log of requests: {place.parent}/requests-*.log\n"
    return f"{requests if file.config.log.requests else ''}{now}, at the end in {place}"


def _import_build() -> Build:
    # Late: Ray Serve reads the environment when imported.
    from serving.cluster.application import build

    return build


def _serve(
    file: ConfigFile,
    plan: Plan,
    application: Any,
    session: RaySession,
    console: Console,
    interrupts: Interrupts,
    start_s: float,
) -> int:
    with _removed_at_end(file, session, console, interrupts) as removal:
        session.call(lambda: _deploy_application(file, application))
        display = ProgressDisplay(console)
        with display.shown():
            _wait_for_engines(file, plan, session, display)
        wait_for_answer(file.url)
        try:
            console.print(_ready_text(file, plan, time.monotonic() - start_s))
            _watch_engines(file, plan, session, console)
        except StopSignal:
            removal.drains = True
    return 0


@dataclass(slots=True)
class _Removal:
    """How the application is removed."""

    drains: bool = False  # running streams may finish first


@contextlib.contextmanager
def _removed_at_end(
    file: ConfigFile, session: RaySession, console: Console, interrupts: Interrupts
) -> Iterator[_Removal]:
    """Remove the application at the end, in the way that the block chooses.

    Without a drain there is nothing to remove from a private Ray, which ends as a whole.
    """
    removal = _Removal()
    try:
        yield removal
    finally:
        interrupts.stop_raising()
        if removal.drains:
            timeout_s = file.config.engine.drain_timeout_s
            console.print(
                f"draining: running streams may finish, for up to {timeout_s:.0f} s "
                "(Ctrl-C again to stop at once)"
            )
        else:
            timeout_s = 0.0
        if removal.drains or not session.is_private:
            _delete_application(file, session, timeout_s + _DRAIN_MARGIN_S, interrupts)
        if not session.is_private and not session.serve_was_running:
            from ray import serve

            serve.shutdown()


def _delete_application(
    file: ConfigFile, session: RaySession, timeout_s: float, interrupts: Interrupts
) -> None:
    """Have Serve delete the application and wait until it is gone, at most `timeout_s`."""
    from ray import serve

    deadline_s = time.monotonic() + timeout_s
    with contextlib.suppress(Exception):  # Ray itself may have failed; the launch ends anyhow
        session.call(lambda: serve.delete(file.name, _blocking=False))
        while session.call(lambda: read_app_state(file.name, _ENGINE)) is not None:
            if interrupts.must_hurry or time.monotonic() > deadline_s:
                return
            time.sleep(0.1)


def _deploy_application(file: ConfigFile, application: Any) -> None:
    """Pass the application to Ray Serve without waiting for it. Raise `StartError` if refused."""
    from ray import serve

    target = serve.RunTarget(
        target=application,
        name=file.name,
        route_prefix=file.application.get("route_prefix", "/"),
        logging_config=file.application.get("logging_config"),
    )
    try:
        serve.start(
            proxy_location=file.proxy_location,
            http_options=file.serve["http_options"] if file.haproxy else None,
            logging_config=file.serve.get("logging_config"),
        )
        serve.run_many(
            [target],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
    except Exception as error:  # Ray makes a class up for what a remote actor raised
        raise StartError(f"Ray Serve cannot start: {last_error(str(error))}") from error


def _wait_for_engines(
    file: ConfigFile, plan: Plan, session: RaySession, display: ProgressDisplay
) -> None:
    """Return once all engines and gateways run; raise `StartError` if one cannot."""
    timeout_s = file.config.engine.start_timeout_s
    deadline_s = time.monotonic() + timeout_s
    while True:
        state = session.call(lambda: read_app_state(file.name, _ENGINE))
        if state is None:
            raise StartError("the application was deleted while it started")
        if (cause := failure_cause(state)) is not None:
            raise StartError(f"cannot start: {engine_core_error(session.logs) or cause}")
        processes = run_processes(session.folder) if session.folder else []
        display.show_phases(
            engine_phases(processes, file.name, _ENGINE, plan.num_replicas, state.num_ready)
        )
        if state.status == "RUNNING":
            return
        if time.monotonic() > deadline_s:
            raise StartError(
                f"{state.num_ready} of {plan.num_replicas} engines are ready after "
                f"{timeout_s:.0f} s; raise engine.start_timeout_s"
                + (f" (Ray Serve says: {state.message})" if state.message else "")
            )
        _pause(session, _POLL_S)


def _pause(session: RaySession, duration_s: float) -> None:
    """Wait. Raise `StopSignal` if Ray is asked to stop meanwhile, `StartError` if it ends.

    The signal was meant for the launch: Ray, which is deaf to it, stays for the drain.
    """
    end_s = time.monotonic() + duration_s
    while (left_s := end_s - time.monotonic()) > 0:
        session.check()
        if (signum := session.stop_signal()) is not None:
            raise StopSignal(signum)
        time.sleep(min(left_s, _POLL_S))


def _watch_engines(file: ConfigFile, plan: Plan, session: RaySession, console: Console) -> None:
    """Report engines that stop and come back, until `StopSignal`.

    Raise `StartError` if Ray or the application is gone.
    """
    num_ready = plan.num_replicas
    while True:
        _pause(session, _WATCH_S)
        reap_children()
        try:
            state = session.call(lambda: read_app_state(file.name, _ENGINE))
        except StartError:
            raise
        except Exception as error:  # Ray's client raises anything when Ray is gone
            raise StartError(f"Ray is gone: {error}") from error
        if state is None:
            raise StartError("the application was deleted by somebody else")
        if state.num_ready != num_ready:
            num_ready = state.num_ready
            cause = failure_cause(state)
            console.print(
                f"{num_ready} of {plan.num_replicas} engines ready"
                + (f": {cause}" if cause else ""),
            )


def _ready_text(file: ConfigFile, plan: Plan, start_s: float) -> str:
    engines = f"{plan.num_replicas} engine" + ("s" if plan.num_replicas > 1 else "")
    question = json.dumps(
        {
            "model": plan.served_model_name,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
        }
    )
    text = (
        f"\nready after {start_s:.0f} s: {file.url}/v1\n"
        f"model {plan.served_model_name}, {engines} on {plan.device_name}\n\n"
        f"  curl {file.url}/v1/chat/completions -H 'Content-Type: application/json' "
        f"-d '{question}'\n\n"
    )
    if not is_loopback(file.host) and file.config.auth.keys_file is None:
        text += (
            "WARNING: open to the network, and nobody needs a key: whoever reaches the port may "
            "use it and switch policies. `headway key create` and auth.keys_file close it.\n"
        )
    return text + "Ctrl-C drains and stops."

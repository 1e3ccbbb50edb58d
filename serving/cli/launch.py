"""What happens in a launch, from start to end?

The application is built, Ray is started or joined, the application is deployed; then engines are
waited for and watched. At the end streams are drained, and no process and no file is left.
"""

import contextlib
import functools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from serving.cli.config_file import ConfigFile, check_with_ray
from serving.cli.interrupts import Interrupts, StopSignal
from serving.cli.launching.joining import Joined, leave_cluster
from serving.cli.launching.model_edits import ModelEdits
from serving.cli.launching.node_watch import NodeWatch
from serving.cli.launching.progress import ProgressDisplay, read_app_state
from serving.cli.launching.service_watch import ServiceWatch
from serving.cluster.logs import last_error, logs_of, place_for_logs
from serving.cluster.ray_session import (
    RaySession,
    private_environment,
    private_session,
)
from serving.cluster.run.run_folder import run_folder
from serving.config import Config
from serving.gateway.http.endpoint import (
    StartError,
    check_port_is_free,
    is_loopback,
    port_reserved,
    wait_for_answer,
)
from serving.planning.hardware import Hardware
from serving.planning.machine.nodes import this_machine
from serving.planning.plan import Plan
from serving.planning.service.service_plan import ServicePlan, range_of

# For Serve's own steps before and after the drain. A gateway behind HAProxy cannot know when its
# time is over: it ends its streams when Ray ends, before Serve would cut them (`build`).
_DRAIN_MARGIN_S = 5.0

Build = Callable[[dict[str, Any]], Any]  # makes the Serve application from its arguments


def launch(
    file: ConfigFile,
    plan: ServicePlan,
    hardware: Hardware,
    console: Console,
    *,
    joined: Joined | None = None,
    verbose: bool = False,
    build: Build | None = None,
    fetch: Callable[[], None] = lambda: None,
    reload: Callable[[], ConfigFile] | None = None,
) -> int:
    """Serve until a signal comes; return the exit code.

    It is 0 after a drain, and 128 + signal if that came before anything was ready. Raise
    `ConfigError`, `BundledModelError` or `StartError` if the start fails; then nothing is left
    running. With `joined` that Ray is used, for whose nodes `plan` is, and stays. `fetch` downloads
    the weights, and is called where this machine's engines will load them. `reload` reads a file
    again whose `models` may be edited while they are served. Tests replace what
    `serving.cluster.application` builds by what `build` does.
    """
    start_s = time.monotonic()
    with Interrupts() as interrupts, contextlib.ExitStack() as stack:
        try:
            if joined is None:
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
                check_with_ray(file)
            os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override the plan
            # Built before Ray starts: errors show at once, the plan that it makes
            # sees the same free memory as ours, and the bundled model is
            # fetched if it is needed.
            if build is None:
                plan, application = _plan_and_build(file, joined)
            else:
                application = build(file.application["args"])
            if joined is None:
                runtime_env = file.application.get("runtime_env") or {}
                console.print("starting Ray …")
                on_gpus = any(each.device == "cuda" for each in plan.plans)
                num_gpus = len(hardware.gpus) if on_gpus else 0
                session = stack.enter_context(
                    private_session(folder, len(hardware.cores), num_gpus, runtime_env, verbose)
                )
            else:
                session = joined.session
            interrupts.install_handlers()
            edits: ModelEdits | NodeWatch | None = None
            nodes = this_machine(hardware) if joined is None else joined.nodes
            deploy = functools.partial(_redeploy, file, session)
            if reload is not None and file.config.models and file.config.watch_file is not None:
                edits = ModelEdits(file, plan, nodes, console, reload=reload, deploy=deploy)
            elif joined is not None and build is None:
                edits = NodeWatch(file, plan, nodes, console, look=joined.look, deploy=deploy)
            watch = ServiceWatch(file.name, plan, session, console)
            url = file.url if joined is None else joined.url(file)
            return _serve(
                file, plan, application, session, console, interrupts, start_s, watch, edits, url
            )
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


def _plan_and_build(file: ConfigFile, joined: Joined | None) -> tuple[ServicePlan, Any]:
    """Return the plan by what is free now, and the application by it."""
    # Late: Ray Serve reads the environment when imported.
    from serving.cluster.application import make_application
    from serving.cluster.nodes.planned import plan_application

    args = file.application["args"]
    plan = plan_application(args, None if joined is None else joined.nodes)
    return plan, make_application(args, plan)


def _redeploy(
    file: ConfigFile,
    session: RaySession,
    args: dict[str, Any],
    plan: ServicePlan,
    leaving: Sequence[tuple[Config, Plan]],
) -> None:
    """Have Ray Serve start and stop what differs from what runs."""
    from serving.cluster.application import make_application

    application = make_application(args, plan, leaving)
    session.call(lambda: _run_application(file, application))


def _serve(
    file: ConfigFile,
    plan: ServicePlan,
    application: Any,
    session: RaySession,
    console: Console,
    interrupts: Interrupts,
    start_s: float,
    watch: ServiceWatch,
    edits: ModelEdits | NodeWatch | None,
    url: str,
) -> int:
    with _removed_at_end(file, plan, session, console, interrupts) as removal:
        session.call(lambda: _deploy_application(file, application))
        display = ProgressDisplay(console)
        with display.shown():
            watch.wait_until_ready(display)
        wait_for_answer(url)
        try:
            start_s = time.monotonic() - start_s
            console.print(_ready_text(file, plan, url, start_s, watch.num_failed))
            watch.watch(edits)
        except StopSignal:
            removal.drains = True
    return 0


@dataclass(slots=True)
class _Removal:
    """How the application is removed."""

    drains: bool = False  # running streams may finish first


@contextlib.contextmanager
def _removed_at_end(
    file: ConfigFile,
    plan: ServicePlan,
    session: RaySession,
    console: Console,
    interrupts: Interrupts,
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
            timeout_s = plan.drain_timeout_s
            console.print(
                f"draining: running streams may finish, for up to {timeout_s:.0f} s "
                "(Ctrl-C again to stop at once)"
            )
        else:
            timeout_s = 0.0
        if removal.drains or not session.is_private:
            _delete_application(file, session, timeout_s + _DRAIN_MARGIN_S, interrupts)
        if not session.is_private:
            leave_cluster(file.name, session)


def _delete_application(
    file: ConfigFile, session: RaySession, timeout_s: float, interrupts: Interrupts
) -> None:
    """Have Serve delete the application and wait until it is gone, at most `timeout_s`."""
    from ray import serve

    deadline_s = time.monotonic() + timeout_s
    with contextlib.suppress(Exception):  # Ray itself may have failed; the launch ends anyhow
        session.call(lambda: serve.delete(file.name, _blocking=False))
        while session.call(lambda: read_app_state(file.name)) is not None:
            if interrupts.must_hurry or time.monotonic() > deadline_s:
                return
            time.sleep(0.1)


def _deploy_application(file: ConfigFile, application: Any) -> None:
    """Pass the application to Ray Serve without waiting for it. Raise `StartError` if refused."""
    from ray import serve

    try:
        serve.start(
            proxy_location=file.proxy_location,
            http_options=file.serve["http_options"] if file.haproxy else None,
            logging_config=file.serve.get("logging_config"),
        )
        _run_application(file, application)
    except Exception as error:  # Ray makes a class up for what a remote actor raised
        raise StartError(f"Ray Serve cannot start: {last_error(str(error))}") from error


def _run_application(file: ConfigFile, application: Any) -> None:
    """Pass the application to Ray Serve, which may have one of its name already."""
    from ray import serve

    target = serve.RunTarget(
        target=application,
        name=file.name,
        route_prefix=file.application.get("route_prefix", "/"),
        logging_config=file.application.get("logging_config"),
    )
    serve.run_many(
        [target],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


def _ready_text(
    file: ConfigFile, plan: ServicePlan, url: str, start_s: float, num_failed: int
) -> str:
    first = plan.plans[0]
    question = json.dumps(
        {
            "model": first.served_model_name,
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
        }
    )
    failed = f", but for {num_failed} of {len(plan.plans)} models" if num_failed else ""
    models = "\n".join(
        f"model {each.served_model_name}, {range_of(config, each)} engine"
        + ("s" if each.num_replicas > 1 else "")
        + f" on {each.device_name}"
        for config, each in plan.models
    )
    text = (
        f"\nready after {start_s:.0f} s{failed}: {url}/v1\n"
        f"{models}\n\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' "
        f"-d '{question}'\n\n"
    )
    if not is_loopback(file.host) and file.config.auth.keys_file is None:
        text += (
            "WARNING: open to the network, and nobody needs a key: whoever reaches the port may "
            "use it and switch policies. `headway key create` and auth.keys_file close it.\n"
        )
    return text + "Ctrl-C drains and stops."

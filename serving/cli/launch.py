"""One launch from start to end: deploy, show progress, wait, drain, leave nothing behind."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from serving.cli.config_file import LaunchFile, check_with_ray
from serving.cli.interrupts import Interrupts, Stop
from serving.cli.progress import (
    Board,
    engine_core_error,
    engine_phases,
    failure,
    last_error,
    read_state,
)
from serving.cluster.processes import descendants
from serving.cluster.ray_session import (
    Cluster,
    environment,
    joined_cluster,
    own_cluster,
    own_folder,
)
from serving.gateway.http.endpoint import StartError, check_port, is_loopback, wait_for_answer
from serving.planning.hardware import Hardware
from serving.planning.plan import Plan

_ENGINE = "Engine"  # the deployment in `serving.cluster.application`
_POLL_S = 0.5
_WATCH_S = 5.0  # between looks at engines that run
_DRAIN_MARGIN_S = 15.0  # Serve's own steps around the engines' drain


Build = Callable[[dict[str, Any]], Any]  # arguments -> Serve application


def launch(
    file: LaunchFile,
    plan: Plan,
    hardware: Hardware,
    console: Console,
    *,
    address: str | None = None,
    verbose: bool = False,
    build: Build | None = None,
) -> int:
    """Serve until a signal comes; return the exit code.

    0 after a drain, 128 + signal if it came before anything was ready. Raises
    `ConfigError`, `OnboardError` and `StartError`; nothing is left running
    then. `address` joins a Ray that runs already. `build` stands for
    `serving.cluster.application.build`; for tests.
    """
    start_s = time.monotonic()
    with Interrupts() as interrupts, contextlib.ExitStack() as stack:
        try:
            if address is None:
                check_port(file.host, file.port)
                folder = stack.enter_context(own_folder())
                os.environ.update(environment(folder, haproxy=file.haproxy, given=os.environ))
            else:
                os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1" if file.haproxy else "0"
            os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override the plan
            check_with_ray(file)
            # Built before Ray starts: what is wrong shows at once, the plan made in
            # there counts the same free memory as ours, and the model on board is
            # fetched where it is needed.
            application = (build or _build())(file.application["args"])
            runtime_env = file.application.get("runtime_env") or {}
            if address is None:
                console.print("starting Ray …")
                num_gpus = len(hardware.gpus) if plan.device == "cuda" else 0
                ray = own_cluster(folder, len(hardware.cores), num_gpus, runtime_env, verbose)
            else:
                ray = joined_cluster(address, runtime_env, verbose)
            cluster = stack.enter_context(ray)
            interrupts.install()
            return _serve(file, plan, application, cluster, console, interrupts, start_s)
        except Stop as stop:
            console.print("stopped before anything was ready")
            return 128 + stop.signum
        finally:
            interrupts.quiet()
            stack.close()


def _build() -> Build:
    from serving.cluster.application import (
        build,  # late: Ray Serve reads the environment when imported
    )

    return build


def _serve(
    file: LaunchFile,
    plan: Plan,
    application: Any,
    cluster: Cluster,
    console: Console,
    interrupts: Interrupts,
    start_s: float,
) -> int:
    with _removed_at_end(file, cluster, console, interrupts) as drained:
        _deploy(file, application)
        board = Board(console)
        with board.shown():
            _wait_for_engines(file, plan, cluster, board)
        wait_for_answer(file.url)
        try:
            console.print(_ready_text(file, plan, time.monotonic() - start_s))
            _watch(file, plan, console)
        except Stop:
            drained.append(True)
    return 0


@contextlib.contextmanager
def _removed_at_end(
    file: LaunchFile, cluster: Cluster, console: Console, interrupts: Interrupts
) -> Iterator[list[bool]]:
    """Remove the application at the end: gently if the block appends to the list.

    On our own Ray an abrupt end needs no removal, for Ray goes as a whole.
    """
    gently: list[bool] = []
    try:
        yield gently
    finally:
        interrupts.quiet()
        if gently:
            timeout_s = file.config.engine.drain_timeout_s
            console.print(
                f"draining: running streams may finish, for up to {timeout_s:.0f} s "
                "(Ctrl-C again to stop at once)"
            )
        else:
            timeout_s = 0.0
        if gently or not cluster.is_ours:
            _remove(file, timeout_s + _DRAIN_MARGIN_S, interrupts)
        if not cluster.is_ours and not cluster.serve_was_running:
            from ray import serve

            serve.shutdown()


def _remove(file: LaunchFile, timeout_s: float, interrupts: Interrupts) -> None:
    """Have Serve delete the application and wait until it is gone, at most `timeout_s`."""
    from ray import serve

    deadline_s = time.monotonic() + timeout_s
    with contextlib.suppress(Exception):  # Ray may be what failed; we are leaving anyhow
        serve.delete(file.name, _blocking=False)
        while read_state(file.name, _ENGINE) is not None:
            if interrupts.hurry or time.monotonic() > deadline_s:
                return
            time.sleep(0.1)


def _deploy(file: LaunchFile, application: Any) -> None:
    """Hand the application to Ray Serve; returns before it runs. Raises `StartError`."""
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
    except Exception as error:  # what a remote actor raised comes as a class made up by Ray
        raise StartError(f"Ray Serve cannot start: {last_error(str(error))}") from error


def _wait_for_engines(file: LaunchFile, plan: Plan, cluster: Cluster, board: Board) -> None:
    """Return once all engines and gateways run; raise `StartError` if one cannot."""
    timeout_s = file.config.engine.start_timeout_s
    deadline_s = time.monotonic() + timeout_s
    while True:
        state = read_state(file.name, _ENGINE)
        if state is None:
            raise StartError("the application was deleted while it started")
        if (cause := failure(state)) is not None:
            raise StartError(f"cannot start: {engine_core_error(cluster.logs) or cause}")
        processes = descendants() if cluster.is_ours else []
        board.update(
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
        time.sleep(_POLL_S)


def _watch(file: LaunchFile, plan: Plan, console: Console) -> None:
    """Report engines that go and come back; ends by `Stop`, or `StartError` if all is lost."""
    num_ready = plan.num_replicas
    while True:
        time.sleep(_WATCH_S)
        try:
            state = read_state(file.name, _ENGINE)
        except Exception as error:  # whatever Ray's client raises when Ray is gone
            raise StartError(f"Ray is gone: {error}") from error
        if state is None:
            raise StartError("the application was deleted by somebody else")
        if state.num_ready != num_ready:
            num_ready = state.num_ready
            cause = failure(state)
            console.print(
                f"{num_ready} of {plan.num_replicas} engines ready"
                + (f": {cause}" if cause else ""),
            )


def _ready_text(file: LaunchFile, plan: Plan, start_s: float) -> str:
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

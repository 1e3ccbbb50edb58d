"""Are the engines up, and do they stay? One model's failure is the launch's; one of several is not.

Where there are several models, one that cannot start is told of, and the others serve.
"""

import time
from typing import Protocol

from rich.console import Console

from serving.cli.interrupts import StopSignal
from serving.cli.launching.progress import (
    FAILED,
    AppState,
    ProgressDisplay,
    engine_core_error,
    engine_phases,
    read_app_state,
)
from serving.cluster.processes import reap_children, run_processes
from serving.cluster.ray_session import RaySession
from serving.gateway.http.endpoint import StartError
from serving.planning.plan import Plan
from serving.planning.service.service_plan import ServicePlan, num_first, range_of

_POLL_S = 0.5
_WATCH_S = 5.0  # between two checks of running engines
_CHANGE_S = 1.0  # where models may be edited, or nodes may come


class Changes(Protocol):
    """What changes the plan of a service while it runs: edits of models, nodes that come."""

    plan: ServicePlan

    def look(self, state: AppState) -> None:
        """Do what is to be done now."""


class ServiceWatch:
    """Waits for an application's engines, and then tells what becomes of them."""

    def __init__(self, app: str, plan: ServicePlan, session: RaySession, console: Console) -> None:
        self._app = app
        self._plan = plan
        self._session = session
        self._console = console
        self._failed: dict[str, str] = {}  # deployments that nobody waits for, and why
        self._num_ready: dict[str, int] = {}  # engines, by deployment, as told last

    @property
    def num_failed(self) -> int:
        """Models that could not be started."""
        return len(self._failed)

    # --- until they are up -----------------------------------------------------

    def wait_until_ready(self, display: ProgressDisplay) -> None:
        """Return once all engines and gateways run; raise `StartError` if they cannot.

        Of several models one that runs is enough, when the others have failed.
        """
        start_s = time.monotonic()
        while True:
            state = self._session.call(lambda: read_app_state(self._app))
            if state is None:
                raise StartError("the application was deleted while it started")
            self._note_failures(state, time.monotonic() - start_s)
            display.show_phases(self._phases(state))
            if self._is_up(state):
                break
            self.pause(_POLL_S)
        self._num_ready = {
            each.deployment: state.of(each.deployment).num_ready for each in self._plan.plans
        }

    def _is_up(self, state: AppState) -> bool:
        if state.status == "RUNNING":
            return True
        return (
            bool(self._failed)
            and state.of("Gateway").num_ready >= self._plan.num_gateways
            and all(
                state.of(plan.deployment).num_ready >= num_first(config, plan)
                for config, plan in self._plan.models
                if plan.deployment not in self._failed
            )
        )

    def _note_failures(self, state: AppState, waited_s: float) -> None:
        """Give up models that have failed; raise `StartError` if it is all, or the gateway."""
        if cause := state.of("Gateway").failure:
            raise StartError(f"cannot start: {cause}")
        is_only = len(self._plan.plans) == 1
        if is_only and (cause := state.failure):
            raise StartError(f"cannot start: {engine_core_error(self._session.logs) or cause}")
        for config, plan in self._plan.models:
            seen = state.of(plan.deployment)
            number = num_first(config, plan)
            if plan.deployment in self._failed or seen.num_ready >= number:
                continue
            timeout_s = config.engine.start_timeout_s
            if seen.failure:
                first = engine_core_error(self._session.logs) if not self._failed else None
                why = first or seen.failure
            elif waited_s > timeout_s:
                why = (
                    f"{seen.num_ready} of {number} engines are ready after "
                    f"{timeout_s:.0f} s; raise engine.start_timeout_s"
                    + (f" (Ray Serve says: {state.message})" if state.message else "")
                )
                if is_only:
                    raise StartError(why)
            else:
                continue
            self._failed[plan.deployment] = why
            if len(self._failed) == len(self._plan.plans):
                raise StartError(f"cannot start: none of the models can, the last one for: {why}")
            self._console.print(
                f"model {plan.served_model_name} cannot start: {why} (the others go on)"
            )

    def _phases(self, state: AppState) -> dict[str, str]:
        """Return how far each engine is, by what people call it."""
        folder = self._session.folder
        processes = run_processes(folder) if folder else []
        phases: dict[str, str] = {}
        for config, plan in self._plan.models:
            number = num_first(config, plan)
            num_ready = min(state.of(plan.deployment).num_ready, number)
            found = engine_phases(processes, self._app, plan.deployment, number, num_ready)
            if plan.deployment in self._failed and not num_ready:
                found = [FAILED] * number
            phases |= dict(zip(self._names(plan, number), found, strict=True))
        return phases

    def _names(self, plan: Plan, num_engines: int) -> list[str]:
        of_model = "" if len(self._plan.plans) == 1 else f"{plan.served_model_name} "
        return [f"{of_model}engine {number}" for number in range(1, num_engines + 1)]

    # --- while they serve --------------------------------------------------------

    def watch(self, changes: Changes | None) -> None:
        """Tell of engines that stop and come back, and follow changes, until `StopSignal`.

        Raise `StartError` if Ray or the application is gone.
        """
        while True:
            self.pause(_WATCH_S if changes is None else _CHANGE_S)
            reap_children()
            try:
                state = self._session.call(lambda: read_app_state(self._app))
            except StartError:
                raise
            except Exception as error:  # Ray's client raises anything when Ray is gone
                raise StartError(f"Ray is gone: {error}") from error
            if state is None:
                raise StartError("the application was deleted by somebody else")
            if changes is not None:
                changes.look(state)
                self._plan = changes.plan
            self._tell(state)

    def _tell(self, state: AppState) -> None:
        """Tell what is other than it was."""
        several = len(self._plan.plans) > 1 or len(self._num_ready) > 1
        for config, plan in self._plan.models:
            seen = state.of(plan.deployment)
            who = f"model {plan.served_model_name}: " if several else ""
            before = self._num_ready.get(plan.deployment, 0)
            if seen.num_ready != before:
                self._num_ready[plan.deployment] = seen.num_ready
                self._failed.pop(plan.deployment, None)
                if seen.failure:
                    self._failed[plan.deployment] = seen.failure
                self._console.print(
                    f"{who}{seen.num_ready} of {range_of(config, plan)} engines ready"
                    + (f": {seen.failure}" if seen.failure else "")
                )
            elif several and seen.failure and plan.deployment not in self._failed:
                self._failed[plan.deployment] = seen.failure
                self._console.print(f"{who}cannot start: {seen.failure}")
        for deployment in self._num_ready.keys() - {each.deployment for each in self._plan.plans}:
            if deployment not in state.deployments:
                del self._num_ready[deployment]
                self._console.print(f"{deployment}: its engines have ended")

    def pause(self, duration_s: float) -> None:
        """Wait. Raise `StopSignal` if Ray is asked to stop meanwhile, `StartError` if it ends.

        The signal was meant for the launch: Ray, which is deaf to it, stays for the drain.
        """
        end_s = time.monotonic() + duration_s
        while (left_s := end_s - time.monotonic()) > 0:
            self._session.check()
            if (signum := self._session.stop_signal()) is not None:
                raise StopSignal(signum)
            time.sleep(min(left_s, _POLL_S))

"""How far has the start got, and why did it fail? As a terminal or a log shows it.

Ray Serve says how many replicas of a deployment run. On a private Ray the
processes show how far the others are.
"""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.live import Live
from rich.table import Table

_PHASES = ("waiting for a process", "starting", "loading the model", "ready")
_HEARTBEAT_S = 15.0  # between lines that say nothing new, where there is no terminal
_ERROR = re.compile(r"^\S*?(?:\w\.)*(\w*(?:Error|Exception|Interrupt|Exit)\b.*)$")
_LOG_PREFIX = re.compile(r"^\(\w+ pid=\d+\)\s*(?:[A-Z]+ [\d-]+ [\d:]+ (?:\[[^\]]+\] )?)?")
_MAX_LOG_BYTES = 1 << 20  # at each log's end, where the cause of a failure is


@dataclass(frozen=True, slots=True)
class AppState:
    """What `serve.status()` says of the application."""

    status: str  # NOT_STARTED, DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY, DELETING
    num_ready: int  # engines that run
    message: str  # what Serve says about unhealthy deployments


def read_app_state(app: str, engine: str) -> AppState | None:
    """Return what Ray Serve knows of application `app`; None once it is deleted."""
    from ray import serve

    overview = serve.status().applications.get(app)
    if overview is None:
        return None
    engines = overview.deployments.get(engine)
    messages = [deployment.message for deployment in overview.deployments.values()]
    return AppState(
        str(getattr(overview.status, "value", overview.status)),
        int(engines.replica_states.get("RUNNING", 0)) if engines else 0,
        "\n".join(filter(None, [*messages, overview.message])),
    )


def failure_cause(state: AppState) -> str | None:
    """Return the error of a replica that could not start; None if none has failed.

    Serve would try again several times for each replica. But the same engine on the same machine
    fails again, minutes later.
    """
    failed = state.status == "DEPLOY_FAILED" or "failed to start" in state.message
    return last_error(state.message) or "no reason given" if failed else None


def last_error(text: str) -> str:
    """Return the last exception in `text`, else its last line."""
    lines = [_LOG_PREFIX.sub("", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    errors = [match[1] for line in lines if (match := _ERROR.match(line))]
    return (errors or lines or [""])[-1]


def engine_core_error(logs: Path | None) -> str | None:
    """Return the last exception that an engine core wrote to Ray's logs, if any.

    vLLM's engine core is a process of its own, and its parent's exception does not name
    the cause.
    """
    for log in sorted(logs.glob("worker-*")) if logs else ():
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _MAX_LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        core = [line for line in lines if line.startswith("(EngineCore")]
        errors = [line for line in core if _ERROR.match(_LOG_PREFIX.sub("", line).strip())]
        if errors:
            return last_error(errors[-1])
    return None


def engine_phases(
    processes: Sequence[psutil.Process], app: str, engine: str, num_engines: int, num_ready: int
) -> list[str]:
    """Return the phase of each engine, the most advanced first.

    Serve names a replica's process after application and deployment; vLLM names
    the child process that loads the model.
    """
    title = f"ray::ServeReplica:{app}:{engine}"
    replicas, cores = set(), set()
    for process in processes:
        try:
            line = " ".join(process.cmdline())
            if line.startswith(title):
                replicas.add(process.pid)
            elif line.startswith("VLLM::"):
                cores.add(process.ppid())
        except psutil.Error:
            continue
    ranks = sorted((1 + (pid in cores) for pid in replicas), reverse=True)[:num_engines]
    ranks = [3] * num_ready + ranks[num_ready:]
    ranks += [0] * (num_engines - len(ranks))
    return [_PHASES[rank] for rank in ranks]


class ProgressDisplay:
    """Show the engines' progress: a live table on a terminal, else a line per change."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._start_s = clock()
        self._phases: list[tuple[str, float]] = []  # of each engine, and when it began
        self._live: Live | None = None
        self._last_line_s = self._start_s

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keep the live table on the terminal while in the block."""
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, refresh_per_second=4, transient=False) as self._live:
            yield

    def show_phases(self, phases: list[str]) -> None:
        """Show the current phase of every engine."""
        now_s = self._clock()
        before = [phase for phase, _ in self._phases]
        self._phases += [("", now_s)] * (len(phases) - len(self._phases))
        for i, phase in enumerate(phases):
            if self._phases[i][0] != phase:
                self._phases[i] = (phase, now_s)
        if self._live:
            self._live.update(self._table(now_s))
        elif before != phases or now_s - self._last_line_s >= _HEARTBEAT_S:
            self._last_line_s = now_s
            engines = ", ".join(f"engine {i} {phase}" for i, phase in enumerate(phases, 1))
            self._console.print(f"{now_s - self._start_s:4.0f} s  {engines}")

    def _table(self, now_s: float) -> Table:
        table = Table.grid(padding=(0, 2))
        for i, (phase, since_s) in enumerate(self._phases, 1):
            end_s = since_s if phase == _PHASES[-1] else now_s
            table.add_row(f"engine {i}", phase, f"{end_s - self._start_s:.0f} s")
        return table

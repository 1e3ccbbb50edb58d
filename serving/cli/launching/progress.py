"""How far has the start got, and why did it fail? As a terminal or a log shows it.

Ray Serve says how many replicas of a deployment run. On a private Ray the
processes show how far the others are.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.live import Live
from rich.table import Table

from serving.cluster.logs import is_error, last_error, start_failure

FAILED = "cannot start"  # in place of a phase
_PHASES = ("waiting for a process", "starting", "loading the model", "ready")
_HEARTBEAT_S = 15.0  # between lines that say nothing new, where there is no terminal
_MAX_LOG_BYTES = 1 << 20  # at each log's end, where the cause of a failure is


@dataclass(frozen=True, slots=True)
class DeploymentState:
    """What Ray Serve says of one deployment."""

    num_ready: int = 0  # replicas that run
    failure: str = ""  # why one could not start
    is_settled: bool = False  # Serve has nothing left to do there


@dataclass(frozen=True, slots=True)
class AppState:
    """What Ray Serve says of the application."""

    status: str  # NOT_STARTED, DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY, DELETING
    message: str  # about what is unhealthy
    deployments: Mapping[str, DeploymentState]

    def of(self, deployment: str) -> DeploymentState:
        """Return the state of a deployment, which Serve may not know of yet."""
        return self.deployments.get(deployment, DeploymentState())

    @property
    def failure(self) -> str:
        """Why anything could not start; "" if nothing has failed to."""
        failures = (each.failure for each in self.deployments.values())
        return next(filter(None, failures), "") or start_failure(self.status, self.message)


def read_app_state(app: str) -> AppState | None:
    """Return what Ray Serve knows of application `app`; None once it is deleted."""
    from ray import serve

    overview = serve.status().applications.get(app)
    if overview is None:
        return None
    messages = [deployment.message for deployment in overview.deployments.values()]
    return AppState(
        str(getattr(overview.status, "value", overview.status)),
        "\n".join(filter(None, [*messages, overview.message])),
        {
            name: DeploymentState(
                int(each.replica_states.get("RUNNING", 0)),
                start_failure(
                    status := str(getattr(each.status, "value", each.status)), each.message
                ),
                status == "HEALTHY",
            )
            for name, each in overview.deployments.items()
        },
    )


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
        errors = [line for line in core if is_error(line)]
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
    title = re.compile(rf"ray::ServeReplica:{re.escape(app)}:{re.escape(engine)}(?![\w-])")
    replicas, cores = set(), set()
    for process in processes:
        try:
            line = " ".join(process.cmdline())
            if title.match(line):
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
        self._phases: dict[str, tuple[str, float]] = {}  # of each engine, and when it began
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

    def show_phases(self, phases: Mapping[str, str]) -> None:
        """Show the current phase of every engine, by what people call it."""
        now_s = self._clock()
        has_news = False
        for engine, phase in phases.items():
            if engine not in self._phases or self._phases[engine][0] != phase:
                self._phases[engine] = (phase, now_s)
                has_news = True
        if self._live:
            self._live.update(self._table(now_s))
        elif has_news or now_s - self._last_line_s >= _HEARTBEAT_S:
            self._last_line_s = now_s
            engines = ", ".join(f"{engine} {phase}" for engine, phase in phases.items())
            self._console.print(f"{now_s - self._start_s:4.0f} s  {engines}")

    def _table(self, now_s: float) -> Table:
        table = Table.grid(padding=(0, 2))
        for engine, (phase, since_s) in self._phases.items():
            end_s = since_s if phase in (_PHASES[-1], FAILED) else now_s
            table.add_row(engine, phase, f"{end_s - self._start_s:.0f} s")
        return table

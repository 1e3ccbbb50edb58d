"""How much CPU time and memory do the processes of a launch use, by role?"""

import contextlib
import resource
import time
from collections import defaultdict

import psutil

from serving.capacity.launch import Launch

# A part of a process's title and the role that it proves; the first match counts.
_ROLES = (
    ("ServeReplica:headway:Gateway", "gateway"),
    ("ServeReplica:headway:Engine", "engines"),
    ("benchmarks.systems.null_engine", "engines"),
    ("benchmarks.peers.emulated_server", "engines"),
    ("VLLM::APIServer", "front"),
    ("VLLM::DPCoordinator", "front"),
    ("vllm_server", "engines"),
    ("VLLM::", "engines"),
    ("haproxy", "front"),
)
OTHER_ROLE = "ray"


class ResourceUsage:
    """What the processes of one launch use, by role."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._roles: dict[psutil.Process, str] = {}

    def refresh(self) -> None:
        """Find new processes. Takes tens of milliseconds."""
        self._launch.refresh()
        for process in self._launch.processes:
            with contextlib.suppress(psutil.Error):
                # A worker gets its title after it has started.
                self._roles[process] = self._role(process)

    def cpu_s(self) -> defaultdict[str, float]:
        """Return the CPU seconds used so far, by role; 0 for a role without a process."""
        used: defaultdict[str, float] = defaultdict(float)
        for process, role in self._roles.items():
            with contextlib.suppress(psutil.Error):
                used[role] += _cpu_s(process)
        return used

    def rss_bytes(self, role: str) -> int:
        """Return the resident memory of all processes of a role, shared pages included."""
        total = 0
        for process, its_role in self._roles.items():
            if its_role == role:
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
        return total

    def _role(self, process: psutil.Process) -> str:
        """Return the role by the title, or else the parent's: an engine core may have no title."""
        title = _title(process)
        role = next((role for part, role in _ROLES if part in title), None)
        if role is None and (parent := process.parent()) is not None:
            role = self._roles.get(parent)
        return role or OTHER_ROLE


def engine_core(actor: psutil.Process) -> psutil.Process:
    """Return the process in which vLLM computes, by the actor that started it.

    Its title says `EngineCore`, unless `setproctitle` found no room for one. Raises `LookupError`
    or `psutil.Error` if one of the two processes is gone.
    """
    for child in actor.children():
        with contextlib.suppress(psutil.Error):
            line = " ".join(child.cmdline())
            if "EngineCore" in line or "spawn_main" in line:
                return child
    raise LookupError(f"process {actor.pid} has no engine core")


def machine_busy_s() -> float:
    """Return the CPU seconds that all processes of the machine have used since boot."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq


def raise_file_limit() -> None:
    """Allow this process, and those that it starts, as many sockets as the system permits."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


def _cpu_s(process: psutil.Process) -> float:
    """Return the CPU seconds that the process has used. Raises `psutil.Error` if it is gone.

    By the process's own clock, for the kernel's table counts in hundredths of a second.
    """
    try:
        return time.clock_gettime(~process.pid << 3 | 2)  # `clock_getcpuclockid` of Linux
    except OSError:
        times = process.cpu_times()
        return times.user + times.system


def _title(process: psutil.Process) -> str:
    return f"{process.name()} {' '.join(process.cmdline())}"

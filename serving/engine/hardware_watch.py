"""How is the hardware that an engine runs on, and may it go on?

NVML is asked from a thread, once a second, and never from the event loop: some questions take
milliseconds, and a GPU in trouble may not answer at all. What a GPU does not tell is absent.

| what is seen                                                      | what it is            |
|-------------------------------------------------------------------|-----------------------|
| memory errors that could not be corrected, since we looked first  | a fault, for good     |
| an Xid of the hardware (`FAULT_XIDS`)                             | a fault, for good     |
| the GPU does not answer any more                                  | a fault, until it does|
| slowed down by heat or a failing supply for `SLOW_S` on end       | slow, until it is not |

The power cap alone is none of these: a busy GPU is often at it.
"""

import asyncio
import importlib
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import psutil

from serving.planning.hardware import read_text, visible_gpus

INTERVAL_S = 1.0
LOOK_S = 60.0  # between two looks for children: it reads all processes of the node
SLOW_S = 10.0  # shorter slowdowns are not worth moving work for

# Of NVIDIA's "XID Errors" guide those that the hardware has, not the program on it: 48, 94 and 95
# are memory errors that could not be corrected, 63 and 64 rows that are or cannot be remapped,
# 74 NVLink, 79 fallen off the bus, 119 and 120 the GPU's own processor, 140 memory again.
FAULT_XIDS = frozenset((48, 63, 64, 74, 79, 94, 95, 119, 120, 140))

# By the constant's name in NVML. True where the GPU is slower than it should be.
_REASONS = {
    "SwPowerCap": ("power cap", False),
    "HwSlowdown": ("hardware slowdown", True),
    "SwThermalSlowdown": ("heat", True),
    "HwThermalSlowdown": ("heat, by hardware", True),
    "HwPowerBrakeSlowdown": ("power brake", True),
}


class GpuState(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU at one moment. None: it does not tell."""

    uuid: str
    name: str
    num_bytes: int | None = None
    num_free_bytes: int | None = None
    utilization: float | None = None  # 0-1: of the last second, when some kernel ran
    power_w: float | None = None
    energy_j: float | None = None  # since the driver was loaded
    temperature_c: int | None = None
    slowed_by: tuple[str, ...] = ()  # in words
    num_ecc_errors: int | None = None  # not corrected, since the driver was loaded
    last_xid: int = 0  # since we look; 0: none


class HardwareState(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's hardware at one moment."""

    gpus: tuple[GpuState, ...] = ()
    num_cores: int = 0  # that the replica's processes may use
    num_rss_bytes: int = 0  # of them all; what they share counts several times
    fault: str = ""  # why nothing new should go there, in words
    slow: str = ""  # why others are better, in words


class HardwareWatch:
    """Asks NVML for some GPUs and the kernel for this process and its children."""

    def __init__(self, nvml: Any = None, *, has_gpus: bool = True) -> None:
        """Tests replace the module pynvml by `nvml`."""
        self._nvml: Any = None
        self._handles: list[Any] = []
        self._events: Any = None  # NVML's set of events; None where there are none
        self._first_errors: dict[str, int] = {}  # by GPU
        self._xids: dict[str, int] = {}  # the last one, by GPU
        self._slow_since_s: dict[str, float] = {}
        self._fault = ""  # for good
        self._processes: list[psutil.Process] = []  # ours, as they were when last looked for
        self._looked_s = -math.inf
        if has_gpus:
            self._open(nvml)

    def _open(self, nvml: Any) -> None:
        try:
            nvml = nvml or importlib.import_module("pynvml")
            nvml.nvmlInit()
        except Exception:  # without NVML there is nothing to ask
            return
        self._nvml = nvml
        try:
            self._handles = visible_gpus(nvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
            events = nvml.nvmlEventSetCreate()
            for handle in self._handles:
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
            self._events = events
        except nvml.NVMLError:
            pass  # not of this GPU, driver or MIG instance

    def read(self, now_s: float) -> HardwareState:
        """Return the state at `now_s`, on any clock. It takes milliseconds and may block."""
        self._read_xids()
        gpus: list[GpuState] = []
        lost: list[str] = []
        for i, handle in enumerate(self._handles):
            try:
                gpus.append(self._read_gpu(handle))
            except self._nvml.NVMLError as error:
                lost.append(f"GPU {i} does not answer: {error}")
        slow = [text for gpu in gpus if (text := self._slowness(gpu, now_s))]
        faults = [text for gpu in gpus if (text := self._find_fault(gpu))]
        self._fault = self._fault or next(iter(faults), "")
        return HardwareState(
            gpus=tuple(gpus),
            num_cores=len(os.sched_getaffinity(0)),
            num_rss_bytes=self._rss_bytes(now_s),
            fault=self._fault or next(iter(lost), ""),
            slow="; ".join(slow),
        )

    def _read_gpu(self, handle: Any) -> GpuState:
        nvml = self._nvml

        def ask(question: Callable[[], Any]) -> Any:
            try:
                return question()
            except nvml.NVMLError as error:
                if error.value == nvml.NVML_ERROR_GPU_IS_LOST:
                    raise
                return None

        uuid = read_text(nvml.nvmlDeviceGetUUID(handle))
        memory = ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        rates = ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        milliwatts = ask(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        millijoules = ask(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle))
        reasons = ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) or 0
        return GpuState(
            uuid=uuid,
            name=read_text(nvml.nvmlDeviceGetName(handle)),
            num_bytes=memory and memory.total,
            num_free_bytes=memory and memory.free,
            utilization=None if rates is None else rates.gpu / 100,
            power_w=None if milliwatts is None else milliwatts / 1000,
            energy_j=None if millijoules is None else millijoules / 1000,
            temperature_c=ask(
                lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
            ),
            slowed_by=tuple(
                words
                for name, (words, _) in _REASONS.items()
                if reasons & getattr(nvml, f"nvmlClocksThrottleReason{name}")
            ),
            num_ecc_errors=ask(
                lambda: nvml.nvmlDeviceGetTotalEccErrors(
                    handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
                )
            ),
            last_xid=self._xids.get(uuid, 0),
        )

    def _read_xids(self) -> None:
        """Take in all events that have come since; there is one for each Xid."""
        while self._events is not None:
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._events, 0)
                uuid = read_text(self._nvml.nvmlDeviceGetUUID(event.device))
            except self._nvml.NVMLError:  # a time-out: there is none
                return
            if self._xids.get(uuid) not in FAULT_XIDS:  # what follows such a one tells less
                self._xids[uuid] = event.eventData

    def _find_fault(self, gpu: GpuState) -> str:
        if gpu.num_ecc_errors is not None:
            grown = gpu.num_ecc_errors - self._first_errors.setdefault(gpu.uuid, gpu.num_ecc_errors)
            if grown > 0:
                return f"{gpu.name}: {grown} memory errors that could not be corrected"
        if gpu.last_xid in FAULT_XIDS:
            return f"{gpu.name}: Xid {gpu.last_xid}"
        return ""

    def _slowness(self, gpu: GpuState, now_s: float) -> str:
        slowing = [words for words, slows in _REASONS.values() if slows and words in gpu.slowed_by]
        if not slowing:
            self._slow_since_s.pop(gpu.uuid, None)
            return ""
        if now_s - self._slow_since_s.setdefault(gpu.uuid, now_s) < SLOW_S:
            return ""
        return f"{gpu.name} is slowed down by {' and '.join(slowing)}"

    def _rss_bytes(self, now_s: float) -> int:
        """Return the resident memory of this process and its children, vLLM's among them."""
        if now_s - self._looked_s >= LOOK_S:
            me = psutil.Process()
            self._processes = [me, *me.children(recursive=True)]
            self._looked_s = now_s
        total = 0
        for process in self._processes:
            try:
                total += process.memory_info().rss
            except psutil.Error:  # it has ended
                continue
        return total


def unfit(states: Mapping[str, HardwareState], models: Mapping[str, str]) -> set[str]:
    """Return the engines whose hardware has a fault, or is slow while that of others is not.

    Of others of the same model: `models` has that of each engine.
    """
    well = {models[each] for each, state in states.items() if not (state.fault or state.slow)}
    return {
        each
        for each, state in states.items()
        if state.fault or (state.slow and models[each] in well)
    }


async def watch_hardware(tell: Callable[[HardwareState], object], *, has_gpus: bool) -> None:
    """Call `tell` with every state, once a second, until cancelled."""
    watch = await asyncio.to_thread(lambda: HardwareWatch(has_gpus=has_gpus))
    while True:
        tell(await asyncio.to_thread(watch.read, time.monotonic()))
        await asyncio.sleep(INTERVAL_S)

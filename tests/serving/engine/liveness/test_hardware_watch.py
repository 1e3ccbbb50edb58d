"""What NVML and the kernel tell of an engine's hardware, and what is made of it."""

# ruff: noqa: N802, N815  (the fake has pynvml's names)

import asyncio
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from serving.engine.hardware_watch import (
    LOOK_S,
    SLOW_S,
    HardwareState,
    HardwareWatch,
    watch_hardware,
)

NOT_SUPPORTED, TIMEOUT, LOST = 3, 10, 15
HEAT = 0x20


class NvmlError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"error {value}")
        self.value = value


@dataclass
class FakeGpu:
    watts: int | None = 500
    reasons: int = 0
    ecc: int | None = 0
    answer: int = 0  # the error that it answers everything with


@dataclass
class FakeNvml:
    """As much of pynvml as is used; `gpus` are changed by the test."""

    gpus: list[FakeGpu]
    xids: list[tuple[int, int]] = field(default_factory=list)  # GPU and number, yet to be read
    has_events: bool = True

    NVMLError = NvmlError
    NVML_ERROR_GPU_IS_LOST = LOST
    NVML_TEMPERATURE_GPU = 0
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0
    nvmlEventTypeXidCriticalError = 8
    nvmlClocksThrottleReasonSwPowerCap = 0x4
    nvmlClocksThrottleReasonHwSlowdown = 0x8
    nvmlClocksThrottleReasonSwThermalSlowdown = HEAT
    nvmlClocksThrottleReasonHwThermalSlowdown = 0x40
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 0x80

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, gpu: int) -> bytes:
        self._ask(gpu)
        return f"GPU-{gpu}".encode()

    def nvmlDeviceGetName(self, gpu: int) -> str:
        return self._ask(gpu, "H100")

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> Any:
        return self._ask(gpu, SimpleNamespace(total=80, free=30))

    def nvmlDeviceGetUtilizationRates(self, gpu: int) -> Any:
        return self._ask(gpu, SimpleNamespace(gpu=87, memory=40))

    def nvmlDeviceGetPowerUsage(self, gpu: int) -> int:
        watts = self.gpus[gpu].watts
        return self._ask(gpu, None if watts is None else watts * 1000)

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: int) -> int:
        return self._ask(gpu, 123_500)

    def nvmlDeviceGetTemperature(self, gpu: int, sensor: int) -> int:
        return self._ask(gpu, 65)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, gpu: int) -> int:
        return self._ask(gpu, self.gpus[gpu].reasons)

    def nvmlDeviceGetTotalEccErrors(self, gpu: int, kind: int, since: int) -> int:
        assert (kind, since) == (1, 0)
        return self._ask(gpu, self.gpus[gpu].ecc)

    def nvmlEventSetCreate(self) -> object:
        return object()

    def nvmlDeviceRegisterEvents(self, gpu: int, kinds: int, events: object) -> None:
        if not self.has_events:
            raise NvmlError(NOT_SUPPORTED)

    def nvmlEventSetWait_v2(self, events: object, timeout_ms: int) -> Any:
        assert timeout_ms == 0
        if not self.xids:
            raise NvmlError(TIMEOUT)
        gpu, xid = self.xids.pop(0)
        return SimpleNamespace(device=gpu, eventData=xid)

    def _ask(self, gpu: int, answer: Any = "") -> Any:
        if self.gpus[gpu].answer:
            raise NvmlError(self.gpus[gpu].answer)
        if answer is None:
            raise NvmlError(NOT_SUPPORTED)
        return answer


@pytest.fixture(autouse=True)
def _all_gpus_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_what_a_gpu_tells() -> None:
    (gpu,) = HardwareWatch(FakeNvml([FakeGpu()])).read(0.0).gpus
    assert (gpu.uuid, gpu.name, gpu.num_bytes, gpu.num_free_bytes) == ("GPU-0", "H100", 80, 30)
    assert (gpu.utilization, gpu.power_w, gpu.energy_j) == (0.87, 500.0, 123.5)
    assert (gpu.temperature_c, gpu.slowed_by, gpu.num_ecc_errors, gpu.last_xid) == (65, (), 0, 0)


def test_what_it_does_not_tell_is_absent() -> None:
    state = HardwareWatch(FakeNvml([FakeGpu(watts=None, ecc=None)], has_events=False)).read(0.0)
    assert (state.gpus[0].power_w, state.gpus[0].num_ecc_errors) == (None, None)
    assert (state.gpus[0].energy_j, state.fault, state.slow) == (123.5, "", "")


def test_only_our_gpus_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    nvml = FakeNvml([FakeGpu(answer=LOST), FakeGpu()])
    nvml.gpus[0].answer = 0
    watch = HardwareWatch(nvml)
    nvml.gpus[0].answer = LOST
    state = watch.read(0.0)
    assert ([gpu.uuid for gpu in state.gpus], state.fault) == (["GPU-1"], "")


def test_cores_and_memory_are_told_without_gpus() -> None:
    state = HardwareWatch(has_gpus=False).read(0.0)
    assert state.gpus == ()
    assert state.num_cores == len(os.sched_getaffinity(0))
    assert state.num_rss_bytes > 10_000_000


def test_children_count_once_they_are_found_and_are_missed_without_harm() -> None:
    watch = HardwareWatch(has_gpus=False)
    alone = watch.read(0.0).num_rss_bytes
    with subprocess.Popen(
        [sys.executable, "-c", "x = 60_000_000 * b'x'; input()"], stdin=subprocess.PIPE
    ) as it:
        child = psutil.Process(it.pid)
        while child.memory_info().rss < 60_000_000:
            time.sleep(0.01)
        assert watch.read(LOOK_S / 2).num_rss_bytes < alone + 50_000_000
        assert watch.read(LOOK_S).num_rss_bytes > alone + 50_000_000
        it.kill()
    assert watch.read(LOOK_S + 1).num_rss_bytes < alone + 50_000_000


def test_new_memory_errors_are_a_fault_for_good() -> None:
    gpu = FakeGpu(ecc=7)  # of before, which whoever had the card then has seen
    watch = HardwareWatch(FakeNvml([gpu]))
    assert watch.read(0.0).fault == ""
    gpu.ecc = 9
    assert watch.read(1.0).fault == "H100: 2 memory errors that could not be corrected"
    gpu.ecc = 7
    assert watch.read(2.0).fault != ""


@pytest.mark.parametrize(("xid", "is_fault"), [(79, True), (48, True), (31, False), (13, False)])
def test_an_xid_of_the_hardware_is_a_fault_and_one_of_a_program_is_not(
    xid: int, is_fault: bool
) -> None:
    nvml = FakeNvml([FakeGpu(), FakeGpu()], xids=[(1, xid)])
    state = HardwareWatch(nvml).read(0.0)
    assert [gpu.last_xid for gpu in state.gpus] == [0, xid]
    assert state.fault == (f"H100: Xid {xid}" if is_fault else "")


def test_what_follows_a_fault_does_not_hide_it() -> None:
    nvml = FakeNvml([FakeGpu()], xids=[(0, 79), (0, 45)])
    assert HardwareWatch(nvml).read(0.0).fault == "H100: Xid 79"


def test_a_gpu_that_does_not_answer_is_a_fault_until_it_does() -> None:
    gpu = FakeGpu()
    watch = HardwareWatch(FakeNvml([gpu]))
    gpu.answer = LOST
    state = watch.read(0.0)
    assert (state.gpus, state.fault) == ((), "GPU 0 does not answer: error 15")
    gpu.answer = 0
    assert watch.read(1.0).fault == ""


def test_heat_counts_when_it_lasts() -> None:
    gpu = FakeGpu(reasons=HEAT)
    watch = HardwareWatch(FakeNvml([gpu]))
    assert (watch.read(0.0).slow, watch.read(SLOW_S - 1).slow) == ("", "")
    state = watch.read(SLOW_S)
    assert (state.slow, state.fault) == ("H100 is slowed down by heat", "")
    gpu.reasons = 0
    assert watch.read(SLOW_S + 1).slow == ""
    gpu.reasons = HEAT
    assert watch.read(SLOW_S + 2).slow == ""  # it begins anew


def test_a_busy_gpu_at_its_power_cap_is_not_slow() -> None:
    watch = HardwareWatch(FakeNvml([FakeGpu(reasons=0x4)]))
    watch.read(0.0)
    state = watch.read(2 * SLOW_S)
    assert (state.gpus[0].slowed_by, state.slow) == (("power cap",), "")


async def test_it_is_told_from_a_thread() -> None:
    told: asyncio.Queue[HardwareState] = asyncio.Queue()
    watching = asyncio.ensure_future(watch_hardware(told.put_nowait, has_gpus=False))
    assert (await told.get()).num_cores > 0
    watching.cancel()

"""Hardware is what we may use, not what the machine has."""

# ruff: noqa: N802  (the fake has pynvml's names)
from pathlib import Path
from types import SimpleNamespace

import pytest

from serving.planning.hardware import detect_hardware
from serving.planning.machine.cgroup import CgroupLimits, read_limits

GIB = 1 << 30


class NvmlError(Exception):
    def __init__(self, value: int, text: str = "") -> None:
        super().__init__(text)
        self.value = value


class FakeNvml:
    """As much of pynvml as is used: `num_gpus` H100s; `init_error` for a broken driver."""

    NVMLError = NvmlError
    NVML_ERROR_LIBRARY_NOT_FOUND = 12

    def __init__(self, num_gpus: int = 8, init_error: NvmlError | None = None) -> None:
        self.num_gpus = num_gpus
        self.init_error = init_error

    def nvmlInit(self) -> None:
        if self.init_error:
            raise self.init_error

    def nvmlShutdown(self) -> None:
        pass

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.65.06"

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 13010

    def nvmlDeviceGetCount(self) -> int:
        return self.num_gpus

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid != "MIG-7":
            raise NvmlError(6, "Not Found")
        return 7

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}{handle}-abc"

    def nvmlDeviceGetIndex(self, handle: int) -> int:
        return handle

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H100 80GB HBM3"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=80 * GIB, free=79 * GIB)

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return (9, 0)

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if link >= 4:
            raise NvmlError(3, "Not Supported")
        return 1

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        raise NvmlError(3, "Not Supported")


def test_gpus_as_nvml_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    hardware = detect_hardware(FakeNvml(2))
    assert [gpu.index for gpu in hardware.gpus] == [0, 1]
    gpu = hardware.gpus[0]
    assert (gpu.name, gpu.num_bytes, gpu.num_free_bytes, gpu.compute_capability) == (
        "NVIDIA H100 80GB HBM3",
        80 * GIB,
        79 * GIB,
        "9.0",
    )
    assert (gpu.num_nvlinks, gpu.mig) == (4, False)
    assert (hardware.driver, hardware.cuda, hardware.gpu_error) == ("580.65.06", "13.1", "")


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("3", [3]),
        ("5,1", [5, 1]),
        ("0,9,1", [0]),  # the first unknown one ends the list
        ("GPU-22,GPU-44-abc", [2, 4]),
        ("GPU-", []),  # the beginning of several
        ("MIG-7,0", [7, 0]),
        ("MIG-8,0", []),
    ],
)
def test_only_visible_gpus_count(
    monkeypatch: pytest.MonkeyPatch, visible: str, indices: list[int]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in detect_hardware(FakeNvml()).gpus] == indices


def test_no_library_is_no_gpus() -> None:
    hardware = detect_hardware(FakeNvml(init_error=NvmlError(12, "NVML Shared Library Not Found")))
    assert (hardware.gpus, hardware.gpu_error) == ((), "")


def test_a_broken_driver_is_told() -> None:
    hardware = detect_hardware(
        FakeNvml(init_error=NvmlError(18, "RM has detected a version mismatch."))
    )
    assert (hardware.gpus, hardware.gpu_error) == ((), "RM has detected a version mismatch.")


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_cgroup_2_the_tightest_of_all_groups_binds(tmp_path: Path) -> None:
    root = _write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/box\n",
            "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pod/box/memory.max": f"{8 * GIB}\n",
            "sys/fs/cgroup/pod/box/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/pod/box/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            "sys/fs/cgroup/pod/memory.max": f"{16 * GIB}\n",
            "sys/fs/cgroup/pod/memory.current": f"{12 * GIB}\n",
        },
    )
    assert read_limits(root) == CgroupLimits(1.5, 8 * GIB, 4 * GIB)


def test_cgroup_1_and_paths_of_the_host(tmp_path: Path) -> None:
    root = _write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{4 * GIB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
        },
    )
    assert read_limits(root) == CgroupLimits(2.0, 4 * GIB, 3 * GIB)


def test_no_limits(tmp_path: Path) -> None:
    root = _write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/x\n2:cpu:/x\n",
            "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert read_limits(root) == CgroupLimits()
    assert read_limits(tmp_path / "nothing") == CgroupLimits()


def test_a_quota_takes_cores_away(tmp_path: Path) -> None:
    root = _write(
        tmp_path,
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"},
    )
    assert len(detect_hardware(FakeNvml(0), root).cores) == 1


@pytest.mark.parametrize(
    ("cpuinfo", "has_bfloat16"),
    [
        ("model name\t: Zen 4\nflags\t\t: avx2 avx512f avx512_bf16\n", True),
        ("model name\t: Zen 3\nflags\t\t: avx avx2\n", False),
        ("Features\t: asimd bf16\n", True),
        ("Features\t: asimd\n", False),
        ("", True),  # a system that does not tell
    ],
)
def test_bfloat16_by_the_flags_of_the_cpu(tmp_path: Path, cpuinfo: str, has_bfloat16: bool) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    assert detect_hardware(FakeNvml(0), tmp_path).has_bfloat16 is has_bfloat16

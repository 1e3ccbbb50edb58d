"""What does Prometheus get of the engines' hardware?"""

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from serving.engine.hardware_watch import HardwareState

_GAUGES = {
    "memory_bytes": ("num_bytes", "Memory of the GPU"),
    "free_memory_bytes": ("num_free_bytes", "Memory of the GPU that nobody has"),
    "utilization_ratio": ("utilization", "Share of the last second with a kernel, 0 to 1"),
    "power_watts": ("power_w", "Power that the GPU draws"),
    "temperature_celsius": ("temperature_c", "Temperature of the GPU"),
}
_COUNTERS = {
    "energy_joules": ("energy_j", "Energy since the driver was loaded"),
    "ecc_errors": ("num_ecc_errors", "Memory errors not corrected since the driver was loaded"),
}


def hardware_metrics(hardware: Mapping[str, HardwareState]) -> Iterable[Metric]:
    """Yield series by engine, and by GPU what each GPU tells.

    Joules per token are the rate of `headway_gpu_energy_joules_total` over that of
    `headway_engine_generation_tokens_total`.
    """
    of_gpus: list[tuple[type[Any], dict[str, tuple[str, str]]]] = [
        (GaugeMetricFamily, _GAUGES),
        (CounterMetricFamily, _COUNTERS),
    ]
    for kind, names in of_gpus:
        for name, (field, words) in names.items():
            metric = kind(f"headway_gpu_{name}", words, labels=["engine", "gpu"])
            for engine, state in hardware.items():
                for gpu in state.gpus:
                    if (value := getattr(gpu, field)) is not None:
                        metric.add_metric([engine, gpu.uuid], value)
            yield metric
    slowed = GaugeMetricFamily(
        "headway_gpu_slowed", "1 for each reason", labels=["engine", "gpu", "reason"]
    )
    memory = GaugeMetricFamily(
        "headway_engine_resident_memory_bytes", "Of the engine's processes", labels=["engine"]
    )
    cores = GaugeMetricFamily(
        "headway_engine_cores", "Cores that the engine may use", labels=["engine"]
    )
    faults = GaugeMetricFamily(
        "headway_engine_hardware_fault", "1 where nothing new goes for it", labels=["engine"]
    )
    for engine, state in hardware.items():
        memory.add_metric([engine], state.num_rss_bytes)
        cores.add_metric([engine], state.num_cores)
        faults.add_metric([engine], float(bool(state.fault)))
        for gpu in state.gpus:
            for reason in gpu.slowed_by:
                slowed.add_metric([engine, gpu.uuid, reason], 1.0)
    yield from (slowed, memory, cores, faults)

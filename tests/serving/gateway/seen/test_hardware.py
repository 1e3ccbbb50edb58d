"""Engines on hardware with a fault get no new work, slow ones none while their model has better."""

from serving.engine.hardware_watch import GpuState, HardwareState
from tests.support.running_gateway import CHAT, System, running

GPU = GpuState(
    uuid="GPU-a",
    name="H100",
    num_bytes=80,
    num_free_bytes=30,
    utilization=0.5,
    power_w=612.5,
    energy_j=1234.0,
    slowed_by=("heat",),
)
GOOD = HardwareState(gpus=(GPU,), num_cores=4, num_rss_bytes=1000)
FAULTY = HardwareState(gpus=(GPU,), fault="H100: Xid 79")
SLOW = HardwareState(gpus=(GPU,), slow="H100 is slowed down by heat")


async def tell(system: System, **states: HardwareState) -> None:
    """Have engines tell of their hardware and wait until the gateway knows."""
    for replica_id, state in states.items():
        system.servers[int(replica_id[1:])].tell_hardware(state)
    hardware = system.gateway.driver.engines.hardware
    await system.until(lambda: all(hardware.get(name) == each for name, each in states.items()))


def draining(system: System) -> set[str]:
    replicas = system.gateway.state().replicas
    return {name for name, replica in replicas.items() if replica.is_draining}


async def num_started(system: System) -> list[int]:
    """Ask for several answers; return how many each engine was asked for."""
    before = [engine.num_started for engine in system.engines]
    for _ in range(6):
        assert (await system.client.post(CHAT, json=system.chat())).status_code == 200
    return [engine.num_started - old for engine, old in zip(system.engines, before, strict=True)]


async def test_a_fault_drains_until_it_is_gone() -> None:
    async with running(num_engines=2) as system:
        await tell(system, r0=GOOD, r1=FAULTY)
        assert draining(system) == {"r1"}
        assert await num_started(system) == [6, 0]
        await tell(system, r1=GOOD)
        assert draining(system) == set()


async def test_a_fault_drains_the_last_engine_too() -> None:
    async with running(num_engines=1) as system:
        await tell(system, r0=FAULTY)
        assert draining(system) == {"r0"}
        assert (await system.client.get("/health")).status_code == 503


async def test_slow_engines_work_while_there_is_none_better() -> None:
    async with running(num_engines=2) as system:
        await tell(system, r0=SLOW)  # of the other one nothing is known
        assert draining(system) == set()
        await tell(system, r1=GOOD)
        assert draining(system) == {"r0"}
        await tell(system, r1=SLOW)
        assert draining(system) == set()


async def test_the_hardware_of_an_engine_that_is_gone_is_forgotten() -> None:
    async with running(num_engines=2) as system:
        await tell(system, r0=SLOW, r1=GOOD)
        system.servers[1].close()
        engines = system.gateway.driver.engines
        await system.until(lambda: "r1" not in engines.infos)
        assert list(engines.hardware) == ["r0"]
        await tell(system, r0=SLOW)
        await system.until(lambda: draining(system) == set())


async def test_whoever_connects_is_told_at_once() -> None:
    async with running(num_engines=2) as system:
        await tell(system, r1=FAULTY)
        engines = system.gateway.driver.engines
        before = engines._connections["r1"]
        before.close()
        await system.until(lambda: engines._connections.get("r1") not in (before, None))
        system.servers[1].tell_hardware = None  # type: ignore[assignment]  # nobody tells again
        await system.until(lambda: draining(system) == {"r1"})


async def test_neither_a_fault_nor_a_stop_ends_the_other_ones_drain() -> None:
    async with running(num_engines=3) as system:
        engines = system.gateway.driver.engines
        await tell(system, r0=FAULTY, r1=FAULTY)
        engines.empty({"r1", "r2"})
        assert draining(system) == {"r0", "r1", "r2"}
        engines.empty({"r0"})
        assert draining(system) == {"r0", "r1"}
        await tell(system, r0=GOOD, r1=GOOD)
        assert draining(system) == {"r0"}
        engines.empty(set())
        assert draining(system) == set()


async def test_state_and_metrics_show_it() -> None:
    async with running(num_engines=1) as system:
        await tell(system, r0=GOOD)
        state = (await system.client.get("/headway/state")).json()
        assert state["hardware"]["r0"]["gpus"][0]["power_w"] == 612.5
        assert state["hardware"]["r0"]["num_cores"] == 4
        text = (await system.client.get("/metrics")).text
        assert series(text, "headway_gpu_energy_joules_total") == 1234.0
        assert series(text, "headway_gpu_power_watts") == 612.5
        assert series(text, "headway_gpu_slowed") == 1.0
        assert series(text, "headway_engine_resident_memory_bytes") == 1000.0
        assert series(text, "headway_engine_hardware_fault") == 0.0
        assert "headway_gpu_temperature_celsius{" not in text  # it does not tell


def series(text: str, name: str) -> float:
    """Return the value of a metric's only series."""
    (line,) = [each for each in text.splitlines() if each.startswith(f"{name}{{")]
    return float(line.split()[-1])

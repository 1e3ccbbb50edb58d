"""What becomes of five times more requests than the engines carry, for ten minutes?

    python -m benchmarks.overload

The deployed gateway on Ray Serve in front of emulated engines. They take the time of vLLM's
scheduler on a GPU but hardly any CPU time, so that the engines are short, and neither the gateway
nor the load generator. First the capacity is measured. Then the load is that capacity, a multiple
of it, and the capacity again; goodput is compared. At last come ten thousand connections that
give nothing.
"""

import argparse
import asyncio
import sys
import time
from dataclasses import asdict
from typing import Any

from benchmarks.overload.monitor import DeploymentMonitor
from benchmarks.overload.phases import HEAD_TIMEOUT_S, MIX, MODEL, PAUSE_S, OverloadRun, Scenario
from benchmarks.report.plot_overload import plot_overload
from benchmarks.report.report import RESULTS, Report
from benchmarks.report.runner import print_progress, run_to_the_end
from benchmarks.systems.processes import ResourceUsage, raise_file_limit
from benchmarks.systems.system import EmulatedHeadway
from router.simulation.figures import Slo

_PROFILE = "h100-llama8b"
# A step of 2,048 tokens takes an H100 42 ms: less than the target for the time per token.
_STEP_TOKENS = 2048
_RETURN_EVERY = 20
_BODY_TIMEOUT_S = 20.0
_MAX_HELD_BYTES = 64 * 2**20
_MAX_RECORD_BYTES = 16 * 2**20
_MAX_INCOMING_BYTES = 64 * 2**20


class BoundedHeadway(EmulatedHeadway):
    """Headway with emulated engines, and bounds so small that the load reaches them."""

    def config(self, port: int, gateway_port: int) -> dict[str, Any]:
        """Return the content of the config file."""
        config = super().config(port, gateway_port)
        args = config["applications"][0]["args"]
        args["engine"]["args"]["max_num_batched_tokens"] = _STEP_TOKENS
        args["router"] = {"max_held_bytes": _MAX_HELD_BYTES}
        args["gateway"] |= {
            "max_record_bytes": _MAX_RECORD_BYTES,
            "max_incoming_bytes": _MAX_INCOMING_BYTES,
            "head_timeout_s": HEAD_TIMEOUT_S,
            "body_timeout_s": _BODY_TIMEOUT_S,
        }
        return config


async def run(scenario: Scenario) -> tuple[Report, DeploymentMonitor, float]:
    """Run the scenario. Return the report, the monitor and the gateway's memory bound, MB."""
    config = asdict(scenario) | {
        "profile": _PROFILE,
        "max_num_batched_tokens": _STEP_TOKENS,
        "mix": asdict(MIX),
        "promise": str(Slo()),
        "max_held_bytes": _MAX_HELD_BYTES,
        "max_record_bytes": _MAX_RECORD_BYTES,
        "max_incoming_bytes": _MAX_INCOMING_BYTES,
        "head_timeout_s": HEAD_TIMEOUT_S,
        "body_timeout_s": _BODY_TIMEOUT_S,
    }
    report = Report("overload", "emulated", scenario.seed, config)
    async with BoundedHeadway(_PROFILE, scenario.num_engines, MODEL) as deployment:
        monitor = DeploymentMonitor(ResourceUsage(deployment.launches[0]), deployment.find_state)
        async with monitor.running():
            await asyncio.sleep(PAUSE_S)
            phases = OverloadRun(scenario, deployment, monitor, report)
            rate = await phases.measure_capacity()
            report.add_row("capacity", requests_per_s=rate)
            await asyncio.sleep(PAUSE_S)
            await phases.send_load("1x", rate, scenario.usual_s)
            base_mb = max(each.gateway_mb for each in monitor.observations)
            phase = f"{scenario.times_capacity:g}x"
            start_s = time.perf_counter()
            sent = await phases.send_load(
                phase, scenario.times_capacity * rate, scenario.overload_s, _RETURN_EVERY
            )
            phases.report_minutes(sent)
            phases.report_returns(sent, start_s + scenario.overload_s)
            await phases.send_load("afterwards 1x", rate, scenario.usual_s / 2)
            hostile = await phases.connect_hostile_clients(rate)
            monitor.phase = "end"
            await asyncio.sleep(PAUSE_S)
            last = await monitor.observe()
            state = await asyncio.to_thread(deployment.find_state)
    bounds_bytes = _MAX_HELD_BYTES + _MAX_RECORD_BYTES + _MAX_INCOMING_BYTES
    bound_mb = base_mb + bounds_bytes / 1e6
    _report_memory(report, monitor)
    for title, compared in ((f"at {phase}", phase), ("at 1x afterwards", "afterwards 1x")):
        usual = phases.goodputs["1x"]
        share = phases.goodputs[compared] / usual if usual else None
        report.add_target(f"goodput {title}, of that at 1x", share, ">= 0.9")
    refused = [each for each in sent if each.record.status not in (0, 200)]
    wrong = [each for each in refused if not each.is_refused or each.record.retry_after_s is None]
    report.add_target("refusals other than 429 with Retry-After", len(wrong), "== 0")
    num_unanswered = sum(each.record.status == 0 or bool(each.record.error) for each in sent)
    report.add_target("requests lost in the overload", num_unanswered - len(refused), "== 0")
    report.add_target(
        "looks at the overload with an open breaker",
        sum(bool(each.num_open_breakers) for each in monitor.during(phase)),
        "== 0",
    )
    gateway_mb = max(each.gateway_mb for each in monitor.observations)
    report.add_target("gateway's memory at most, of its bound", gateway_mb / bound_mb, "<= 1")
    report.add_target(
        "idle connections at the same time", hostile.cut["idle"], f">= {scenario.num_idle}"
    )
    report.add_target("promises kept beside them", phases.share_beside_hostile, ">= 0.95")
    num_left = None
    if state is not None:
        num_booked = sum(each.ledger.num_open for each in state.replicas.values())
        num_left = last.num_held + last.num_placed + state.num_record_bytes + num_booked
    report.add_target("requests, records and bookings left over", num_left, "== 0")
    report.add_note(
        "Capacity: requests per second completed while every engine always has a full step (closed "
        f"loop). Goodput: requests per second that met the SLO ({Slo()}), counted from when each "
        "was due."
    )
    report.add_note(
        f"Bound of the gateway's memory: its maximum before the overload ({base_mb:.0f} MB), plus "
        "what may be held, recorded and received (max_held_bytes, max_record_bytes, "
        "max_incoming_bytes)."
    )
    report.add_note(
        f"Of the refused clients one in {_RETURN_EVERY} returns once, when Retry-After allows; "
        "these requests come on top of the load asked for."
    )
    report.add_note("Engines are emulated: vLLM's scheduler at a profile's step times, no model.")
    return report, monitor, bound_mb


def _report_memory(report: Report, monitor: DeploymentMonitor) -> None:
    """Report the memory of gateway and engines by phase."""
    for phase in dict.fromkeys(each.phase for each in monitor.observations):
        observed = monitor.during(phase)
        report.add_row(
            "resident memory, MB",
            phase=phase,
            gateway_first=observed[0].gateway_mb,
            gateway_most=max(each.gateway_mb for each in observed),
            gateway_last=observed[-1].gateway_mb,
            engines_most=max(each.engines_mb for each in observed),
            held_most=max(each.num_held for each in observed),
            held_most_mb=max(each.held_mb for each in observed),
            record_most_mb=max(each.record_mb for each in observed),
        )


def _parse() -> Scenario:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--times", type=float, default=5.0, help="load, in capacities")
    parser.add_argument("--capacity", type=float, default=15.0, help="seconds of measuring it")
    parser.add_argument("--usual", type=float, default=60.0, help="seconds of load at 1x")
    parser.add_argument("--duration", type=float, default=600.0, help="seconds of overload")
    parser.add_argument("--idle", type=int, default=10_000, help="connections that send nothing")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    return Scenario(
        options.engines,
        options.times,
        options.capacity,
        options.usual,
        options.duration,
        options.idle,
        num_half_sent=100,
        num_bombs=50,
        seed=options.seed,
    )


def main() -> int:
    scenario = _parse()
    raise_file_limit()  # 10,000 clients are 10,000 sockets, here and in what is started
    report, monitor, bound_mb = run_to_the_end(lambda: run(scenario))
    report.finish()
    lines = RESULTS / "overload.csv"
    monitor.write_csv(lines)
    print_progress(f"Every observation: {lines.name}; plot: {plot_overload(lines, bound_mb).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

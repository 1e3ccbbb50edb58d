"""How long do clients notice a gateway that hangs or dies beside another one?

    python -m benchmarks.chaos.gateways

`headway serve` with two gateways on one port and two emulated engines; every request opens a
connection of its own, as new clients do. A gateway is stopped (SIGSTOP: it answers nothing, and
the kernel goes on giving it connections) or killed, one at a time, and has to be replaced.
"""

import argparse
import asyncio
import math
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import psutil

from benchmarks.chaos.client import Question, Reply, send_question
from benchmarks.report.report import Report, percentile
from benchmarks.report.runner import print_progress, run_and_judge
from serving.capacity.launch import MeasureError
from serving.capacity.service import Service

_MODEL = "emulated"
_TITLE = "ServeReplica:headway:Gateway"
_REPLACED_WITHIN_S = 10.0
_PATIENCE_S = 5.0  # of a client; longer is a failure here
_SETTLE_S = 20.0  # from one fault to the next
# A request sent so shortly before a fault may be under way when it strikes: it is counted there.
_UNDER_WAY_S = 1.0


@dataclass(frozen=True)
class Scenario:
    """What one run does."""

    num_rounds: int  # of a stop and a kill each
    requests_per_s: float
    seed: int


class TwoGateways(Service):
    """Two gateways that share a port, and two emulated engines."""

    def __init__(self) -> None:
        super().__init__(2, {"engine": "emulated", "served_model_name": _MODEL})

    def config(self, port: int, gateway_port: int) -> dict[str, Any]:
        """Return the content of the config file."""
        config = super().config(port, gateway_port)
        config["applications"][0]["args"]["gateway"]["replicas"] = 2
        return config

    def gateways(self) -> list[psutil.Process]:
        """Return the processes of the gateways."""
        launch = self.launches[0]
        launch.refresh()
        return [process for process in launch.living() if _TITLE in " ".join(process.cmdline())]


class GatewayRun:
    """One run: requests at a steady rate, and faults."""

    def __init__(self, scenario: Scenario, service: TwoGateways) -> None:
        self.scenario = scenario
        self.sent: list[tuple[float, Reply]] = []  # when, and what came
        self.faults: list[tuple[float, signal.Signals]] = []
        self._service = service
        self._rng = random.Random(f"gateways {scenario.seed}")

    async def run(self) -> None:
        """Send load and inject faults."""
        async with asyncio.TaskGroup() as tasks:
            load = tasks.create_task(self._send_load(tasks))
            for number in range(2 * self.scenario.num_rounds):
                await asyncio.sleep(5.0 if number == 0 else _SETTLE_S)
                await self._inject((signal.SIGSTOP, signal.SIGKILL)[number % 2])
            await asyncio.sleep(_SETTLE_S)
            load.cancel()

    async def _inject(self, signum: signal.Signals) -> None:
        gateways = await asyncio.to_thread(self._service.gateways)
        if len(gateways) != 2:
            raise MeasureError(f"{len(gateways)} gateways instead of 2 before {signum.name}")
        self.faults.append((time.monotonic(), signum))
        self._rng.choice(gateways).send_signal(signum)
        print_progress(f"{signum.name} after {len(self.sent)} requests")

    async def _send_load(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            tasks.create_task(self._send())
            await asyncio.sleep(1.0 / self.scenario.requests_per_s)

    async def _send(self) -> None:
        sent_s = time.monotonic()
        question = Question("Count.", 5, user=str(sent_s))
        async with httpx.AsyncClient(base_url=self._service.urls[0]) as http:
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    reply = await send_question(http, _MODEL, question)
            except TimeoutError:
                reply = Reply(question, error=f"not answered within {_PATIENCE_S:g} s")
        self.sent.append((sent_s, reply))

    def fill_report(self, report: Report) -> None:
        """Judge the replies; add figures and targets."""
        worst_s = 0.0
        failed_late = 0
        ends_s = [at_s - _UNDER_WAY_S for at_s, _ in self.faults[1:]] + [math.inf]
        for number, (at_s, signum) in enumerate(self.faults):
            own = [
                (sent_s - at_s, reply)
                for sent_s, reply in self.sent
                if at_s - _UNDER_WAY_S <= sent_s < ends_s[number]
            ]
            failed = [after_s for after_s, reply in own if reply.error]
            noticed_s = max([0.0, *failed])
            worst_s = max(worst_s, noticed_s)
            failed_late += sum(after_s > _REPLACED_WITHIN_S for after_s in failed)
            report.add_row(
                "faults",
                number=number,
                fault=signum.name,
                requests=len(own),
                failed=len(failed),
                last_failure_after_s=noticed_s,
            )
        before = [
            reply
            for sent_s, reply in self.sent
            if not self.faults or sent_s < self.faults[0][0] - _UNDER_WAY_S
        ]
        waits_s = [reply.times_s[0] - sent_s for sent_s, reply in self.sent if reply.times_s]
        report.add_row("first token, s", p50=percentile(waits_s, 50), p99=percentile(waits_s, 99))
        report.add_target(
            "failed before the first fault", sum(bool(r.error) for r in before), "== 0"
        )
        report.add_target(
            "last failure after a fault, s, worst", worst_s, f"<= {_REPLACED_WITHIN_S}"
        )
        report.add_target("failed later than that", failed_late, "== 0")
        report.add_note(
            "A request fails here that is not answered whole within "
            f"{_PATIENCE_S:g} s. Engines are emulated. While a gateway is stopped about half of "
            "the new connections are given to it; clients that try again may reach the other."
        )


async def run(scenario: Scenario) -> Report:
    """Run the scenario; return the report."""
    report = Report("chaos-gateway", "emulated", scenario.seed, asdict(scenario))
    async with TwoGateways() as service:
        gateways = GatewayRun(scenario, service)
        await gateways.run()
        gateways.fill_report(report)
    report.add_target("processes that had to be killed", len(service.killed), "== 0")
    return report


def _parse() -> Scenario:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="of a stop and a kill each")
    parser.add_argument("--rate", type=float, default=20.0, help="requests per second")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    return Scenario(options.rounds, options.rate, options.seed)


def main() -> int:
    scenario = _parse()
    return run_and_judge(lambda: run(scenario))


if __name__ == "__main__":
    sys.exit(main())

"""Which fault is a failed request counted under?"""

import signal
from typing import Any, cast

import pytest

from benchmarks.chaos.client import Question, Reply
from benchmarks.chaos.gateways import GatewayRun, Scenario
from benchmarks.report.report import Report

QUESTION = Question("Count.", 5)
FAULTS = [(100.0, signal.SIGSTOP), (120.0, signal.SIGKILL)]


def judged(*failed_s: float) -> tuple[list[int], list[bool]]:
    """Failures under each fault, and the targets that are met, of requests sent every 0.1 s."""
    run = GatewayRun(Scenario(num_rounds=1, requests_per_s=10.0, seed=0), cast(Any, None))
    run.faults = FAULTS
    for tenth in range(950, 1400):
        sent_s = tenth / 10
        reply = Reply(QUESTION, error="lost" if sent_s in failed_s else "")
        reply.times_s = [sent_s + 0.05]
        run.sent.append((sent_s, reply))
    report = Report("chaos-gateway", kind="emulated", seed=0, config={})
    run.fill_report(report)
    failed = [row["failed"] for row in report.tables["faults"]]
    return failed, [target["met"] for target in report.targets]


@pytest.mark.parametrize(
    ("failed_s", "failed", "met"),
    [
        ([], [0, 0], [True, True, True]),
        ([100.3, 107.0], [2, 0], [True, True, True]),
        ([119.9], [0, 1], [True, True, True]),  # it was under way when the next fault struck
        ([99.9], [1, 0], [True, True, True]),
        ([111.0], [1, 0], [True, False, False]),
        ([118.9], [1, 0], [True, False, False]),
        ([131.0], [0, 1], [True, False, False]),
        ([98.0], [0, 0], [False, True, True]),
    ],
)
def test_a_failure_is_that_of_the_fault_it_met(failed_s, failed, met):
    assert judged(*failed_s) == (failed, met)

"""A client that sends every known poison hurts nobody else: a small run of `make chaos-poison`."""

import pytest

from benchmarks.chaos.poisoned import Scenario, run


@pytest.mark.timeout(300)
async def test_nobody_else_is_hurt():
    report = await run(Scenario(num_engines=5, num_workers=8, seed=1))
    missed = [target for target in report.targets if not target["met"]]
    assert missed == [], report.notes

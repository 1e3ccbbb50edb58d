"""What gateways would carry if the load came from elsewhere, by the CPU time of each process."""

from collections import defaultdict

import pytest

from benchmarks.overhead.gateways import _KINDS, _without_load
from benchmarks.overhead.phases import LOAD_ROLE, Window


def window(gateway_s: float, engines_s: float) -> Window:
    cpu_s = defaultdict(float, gateway=gateway_s, engines=engines_s, ray=-0.01)
    cpu_s[LOAD_ROLE] = 0.7  # is left out
    return Window(1.0, 4000, 1000, 1000, cpu_s)


@pytest.mark.parametrize(
    ("num_gateways", "cpu_s", "per_s"),
    [
        (1, (0.5, 0.1), 2000.0),  # its core is full
        (2, (0.5, 0.1), 2 * 1000 / 0.6),  # both cores are full
        (8, (0.5, 0.0), 4000.0),
    ],
)
def test_a_gateway_fills_a_core_at_most(num_gateways, cpu_s, per_s) -> None:
    for kind in _KINDS[:2]:
        assert _without_load(kind, num_gateways, window(*cpu_s), 2) == pytest.approx(per_s)
    for kind in _KINDS[2:]:  # tokens, of which there are four times as many
        assert _without_load(kind, num_gateways, window(*cpu_s), 2) == pytest.approx(4 * per_s)

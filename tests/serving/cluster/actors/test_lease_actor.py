"""The keeper of leases as a real Ray actor, in a Ray of its own."""

import subprocess
import sys
import tempfile
import textwrap

import pytest

SCRIPT = """
    import asyncio, os, signal, sys, time
    import ray
    from router.limits.rate_limit import Amount
    from router.limits.settings import RateLimits
    from serving.cluster.actors.lease_actor import actor_sender
    from serving.gateway.providers.leases import Leases

    ray.init(
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _temp_dir=sys.argv[1],
    )

    async def granted(leases, limiter, name):
        limiter.note_waiting(name, Amount(1, 10))
        leases.rearm_timer()
        async with asyncio.timeout(50):
            while limiter.wait_s(Amount(1, 10), time.monotonic()) > 0.0:
                if limiter.state(0.0).paused_s:
                    return False
                await asyncio.sleep(0.01)
        limiter.reserve(name, Amount(1, 10), time.monotonic())
        return True

    async def main():
        limits = RateLimits(rpm=2)
        pairs = []
        for gateway in ("g0", "g1"):
            leases = Leases(gateway, actor_sender("app"), lambda: None)
            pairs.append((leases, leases.make_limiter("p/k", limits)))
        print([await granted(*pair, "a") for pair in pairs])
        leases, limiter = pairs[0]
        leases.rearm_timer()
        await asyncio.sleep(0.3)
        print(limiter.state(time.monotonic()).requests.used)
        actor = ray.get_actor("leases-app", namespace="headway")
        # Dead before the next update, which it would answer else; and Ray starts it again.
        pid = await actor.__ray_call__.remote(lambda _: os.getpid())
        os.kill(pid, signal.SIGKILL)
        other = Leases("g2", actor_sender("app"), lambda: None)
        print(await granted(other, other.make_limiter("p/k", limits), "b"))

    asyncio.run(main())
"""


@pytest.mark.timeout(180)
def test_gateways_lease_from_one_actor_and_a_restarted_one_waits():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # Ray's sockets need a short path
        reply = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(SCRIPT), folder],
            capture_output=True,
            text=True,
            timeout=170,
        )
    assert reply.returncode == 0, reply.stderr
    lines = [line for line in reply.stdout.splitlines() if "(raylet)" not in line]
    assert lines == ["[True, True]", "2.0", "False"]

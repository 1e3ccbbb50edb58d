"""An engine whose core is as hard to end as a core can be."""

import asyncio
import sys
from typing import TYPE_CHECKING

from benchmarks.systems.null_engine import NullEngine
from serving.config import Config

if TYPE_CHECKING:
    from serving.planning.plan import Plan

# In a session of its own, ignoring what asks it to stop, and not ending with its parent.
CORE = """
import signal, time
for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(signum, signal.SIG_IGN)
time.sleep(1e6)
"""


class EngineWithCore(NullEngine):
    """A null engine with a process that computes nothing but stays."""

    @classmethod
    async def start(cls, config: Config, plan: "Plan", local_rank: int) -> "NullEngine":
        engine = await super().start(config, plan, local_rank)
        engine.core = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CORE, "EngineCore"), start_new_session=True
        )
        return engine

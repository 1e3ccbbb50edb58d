"""On which core does an engine of several in one vLLM server compute?"""

import os

from serving.engine.vllm.cpu_executor import CpuExecutor


class PinnedExecutor(CpuExecutor):
    """Keeps the engine core that it runs in on one CPU core, by its data-parallel rank."""

    def _init_executor(self) -> None:
        cores = sorted(os.sched_getaffinity(0))
        rank = self.vllm_config.parallel_config.data_parallel_index
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
        super()._init_executor()

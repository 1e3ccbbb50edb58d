"""Where does an engine on CPU cores compute? In the process of its core."""

from vllm.v1.executor.uniproc_executor import UniProcExecutor

from serving.engine.vllm.patches import (
    avoid_amx_attention,
    draw_only_for_whole_prompts,
    leave_out_adapters_of_others,
)


class CpuExecutor(UniProcExecutor):
    """Runs the only worker in the engine core; vLLM's default on a CPU spins in one of its own."""

    def _init_executor(self) -> None:
        avoid_amx_attention()
        draw_only_for_whole_prompts()
        leave_out_adapters_of_others()
        super()._init_executor()

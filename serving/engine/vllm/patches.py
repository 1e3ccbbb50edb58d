"""What of vLLM's insides do we touch, and does it still look as we take it for?

Routing by tokens, and going on with a reply that another engine has begun, take more than vLLM
documents. `PATCHES` has a row for each thing that we replace, subclass, call, set or read; the
functions below it make all assignments. `check_vllm` compares the rows with the installed vLLM
once, before an engine starts. A fatal row that differs stops the start: without it requests would
fail, or be counted, ordered or answered wrongly. Any other is a warning in the log.

Upgrading vLLM:

1. Pin the new version in pyproject.toml (extras `cpu` and `gpu`), then `make lock install`.
2. Run `pytest tests/serving/engine/test_patches.py`. It names every row that differs, and every
   fault that we work around and vLLM has no longer. Read vLLM's new code with the row's `why` in
   mind, adapt what `ours` names, then the row. With a fault go its row, our code and tests.
3. Run the `guards` of all rows: `make test`. A shape compares names; whether these still mean
   the same, only guards can tell. None of them runs on a GPU: repeat docs/gpu.md there.
4. Put the new version into `VERSIONS`.

Not listed is what vLLM documents: engine arguments, sampling parameters, its HTTP API. This stays
one file, however long it gets: it is what one reads when vLLM changes.
"""

import contextlib
import functools
import logging
import sys
from typing import TYPE_CHECKING, Any

from serving.config import ConfigError
from serving.engine.vllm.adapters.watch import AdapterWatch
from serving.engine.vllm.grammar.grammars import (
    GrammarRefused,
    Grammars,
    apply_verdict,
    check_length,
)
from serving.engine.vllm.grammar.sandbox import SandboxEnded
from serving.engine.vllm.shape import Patch, Shape, classes, resolve
from serving.engine.vllm.stable_ids import (
    DATED_MODULES,
    INTERNAL_IDS,
    SIGNING_MODULE,
    RequestTime,
    RequestUuids,
    stable_uuid,
)
from serving.stream.accounting import current_accounting

if TYPE_CHECKING:  # both import vLLM, which reads the environment that the engine sets before
    from serving.engine.vllm.resume import Resumer
    from serving.engine.vllm.stats import EngineStats

logger = logging.getLogger(__name__)

VERSIONS = ("0.32.0",)  # of vLLM, with which all guards passed

_LLM = "vllm.v1.engine.async_llm:AsyncLLM"
_OUTPUTS = "vllm.v1.engine.output_processor"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_GRAMMARS = "vllm.v1.structured_output"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_MODELS = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"
_LORA_OPS = "vllm.lora.ops.torch_ops.lora_ops"
_RESPONSES = "vllm.entrypoints.openai.responses.serving:OpenAIServingResponses"

# Responses that an engine keeps: at 16 KB of text and events each, 64 MB.
_MAX_RESPONSES = 4096

PATCHES = (
    Patch(
        how="replaced",
        ours="serving.engine.vllm.patches:watch_requests",
        why="a request meets its accounting, and gets the priority and the recorded tokens that "
        "come with it, before the engine core has it; vLLM passes no object of ours on",
        guards=("test_a_request_is_known_before_the_core_has_it", "test_nothing_shows"),
        shapes=(
            Shape(
                f"{_OUTPUTS}:OutputProcessor.add_request",
                "(self, request, prompt, parent_req=None, request_index=0, queue=None)",
            ),
            Shape(f"{_LLM}._add_request", uses="add_request add_request_async"),
            Shape(f"{_LLM}.add_request", uses="_add_request add_request add_request_async"),
            *classes(_OUTPUTS, OutputProcessor="request_states"),
            Shape(_LLM, has="output_processor"),
            *classes("vllm.v1.engine.parallel_sampling", ParentRequest="request_id n"),
            *classes(
                "vllm.v1.engine",
                EngineCoreRequest="request_id external_req_id priority prompt_token_ids "
                "sampling_params",
            ),
            *classes(
                "vllm.sampling_params",
                SamplingParams="sampling_type clone",
                StructuredOutputsParams="all_constraints_none",
            ),
        ),
    ),
    Patch(
        how="replaced",
        ours="serving.engine.vllm.patches:admit_requests",
        why="what a request cannot be handed to the core with (a number beyond 64 bits, half a "
        "surrogate pair) is its own fault, where vLLM says that the engine failed, and not why; "
        "and what its grammar takes is known before anything is compiled here",
        guards=(
            "test_what_the_core_cannot_be_told_is_refused",
            "test_a_grammar_that_is_too_much",
            "test_one_whose_files_are_gone_ends_no_engine",
        ),
        shapes=(
            Shape(f"{_LLM}.add_request", has="request_id prompt params lora_request"),
            Shape(f"{_LLM}.generate", uses="add_request VLLMClientError EngineGenerateError"),
            *classes("vllm.exceptions", VLLMClientError="", VLLMError="", RetryableRequestError=""),
        ),
    ),
    Patch(
        how="replaced",
        ours="serving.engine.vllm.patches:check_grammars_once",
        why="what the sandbox has found out about a grammar vLLM need not find out again, on the "
        "event loop; nor need it read a grammar of any length there",
        guards=("test_a_verdict_stands_for_vllms_own_checks", "test_a_grammar_without_end"),
        shapes=(
            Shape(
                "vllm.sampling_params:SamplingParams._validate_structured_outputs",
                "(self, model_config, structured_outputs_config, tokenizer)",
                uses="_backend _backend_was_auto validate_xgrammar_grammar",
            ),
            *classes(
                "vllm.sampling_params",
                StructuredOutputsParams="json regex choice grammar json_object structural_tag "
                "disable_any_whitespace disable_additional_properties whitespace_pattern "
                "_backend _backend_was_auto",
            ),
            Shape(f"{_GRAMMARS}.backend_xgrammar:validate_xgrammar_grammar", "(sampling_params)"),
            Shape(f"{_GRAMMARS}.utils:choice_as_grammar", "(choice)"),
            Shape("vllm.exceptions:VLLMValidationError"),
        ),
    ),
    Patch(
        how="replaced",
        ours="serving.engine.vllm.patches:blame_grammars",
        why="a grammar that leads nowhere is the request's fault; vLLM says that the server failed",
        guards=("test_a_grammar_that_leads_nowhere",),
        shapes=(
            Shape(
                "vllm.entrypoints.generate.base.serving:GenerateBaseServing._raise_if_error",
                "(self, finish_reason, request_id)",
            ),
        ),
        is_fatal=False,
    ),
    Patch(
        how="called",
        ours="serving.engine.vllm.grammar.sandbox:Sandbox",
        why="grammars are compiled in a sandbox as the core will compile them",
        guards=("test_a_grammar_that_is_too_much", "test_what_the_core_could_not_compile"),
        shapes=(
            Shape(
                f"{_GRAMMARS}:StructuredOutputManager.grammar_init",
                "(self, request)",
                uses="backend _backend _use_async_grammar_compilation _create_grammar grammar",
            ),
            *classes(f"{_GRAMMARS}.request", StructuredOutputRequest="params grammar"),
            *classes(
                f"{_GRAMMARS}.backend_types",
                StructuredOutputBackend="allocate_token_bitmask",
                StructuredOutputGrammar="fill_bitmask",
            ),
            Shape("vllm.sampling_params:SamplingParams", has="structured_outputs"),
            Shape("vllm.config:ParallelConfig", has="distributed_executor_backend"),
        ),
    ),
    Patch(
        how="replaced",
        ours="serving.engine.vllm.resume:Resumer.record_outputs",
        why="what the core generates is recorded, for another engine to go on from there; what "
        "it generates a second time is kept back",
        guards=("test_nothing_shows", "test_a_stop_string_across_the_seam"),
        shapes=(
            Shape(f"{_OUTPUTS}:OutputProcessor.process_outputs", has="engine_core_outputs"),
            Shape(f"{_LLM}._run_output_handler", uses="process_outputs record"),
            Shape(
                "vllm.v1.outputs:LogprobsLists",
                "(logprob_token_ids, logprobs, sampled_token_ranks, cu_num_generated_tokens=None)",
            ),
            *classes(
                "vllm.v1.engine",
                EngineCoreOutput="request_id new_token_ids new_logprobs prefill_stats "
                "new_prompt_logprobs_tensors finish_reason stop_reason",
                FinishReason="STOP LENGTH ABORT",
            ),
            *classes(_OUTPUTS, RequestState="request_id prompt_len is_prefilling stats"),
            *classes(
                "vllm.v1.metrics.stats",
                RequestStateStats="num_generation_tokens",
                PrefillStats="num_cached_tokens",
            ),
        ),
    ),
    Patch(
        how="replaced",
        ours="serving.engine.vllm.stats:EngineStats.count_finished",
        why="what a request took is counted when it ends, for its usage and its tenant's quota",
        guards=("test_what_a_request_took_is_counted",),
        shapes=(
            Shape(
                f"{_OUTPUTS}:OutputProcessor._update_stats_from_finished",
                "(self, req_state, finish_reason, iteration_stats)",
            ),
            Shape(
                f"{_OUTPUTS}:OutputProcessor.process_outputs",
                uses="_finish_request _update_stats_from_finished",
            ),
            *classes(_OUTPUTS, RequestState="num_cached_tokens stats"),
        ),
    ),
    Patch(
        how="replaced",
        ours="serving.engine.vllm.resume:Collector",
        why="hands out what was replayed before what is new, and ends a group of the record with "
        "each taking",
        guards=("test_nothing_shows", "test_a_reply_that_is_not_streamed_keeps_what_was_generated"),
        shapes=(
            Shape("vllm.v1.engine.async_llm:RequestOutputCollector", "(output_kind, request_id)"),
            Shape(f"{_LLM}.add_request", uses="RequestOutputCollector _add_request"),
            Shape(f"{_LLM}.generate", uses="get_nowait get finished"),
            *classes(_OUTPUTS, RequestOutputCollector="output ready put get get_nowait"),
        ),
    ),
    Patch(
        how="replaced",
        ours="serving.engine.vllm.stable_ids:stable_uuid",
        why="a reply that goes on in another engine keeps its ids",
        guards=("test_ids_and_dates_follow_from_the_request",),
        shapes=(
            Shape("vllm.utils:random_uuid", "()"),
            Shape("vllm.entrypoints.openai.chat_completion.protocol", has="random_uuid"),
            Shape("vllm.entrypoints.openai.completion.protocol", has="random_uuid"),
            Shape("vllm.entrypoints.openai.responses.protocol", has="random_uuid"),
            Shape("vllm.entrypoints.openai.responses.streaming_events", has="random_uuid"),
            Shape("vllm.entrypoints.openai.responses.utils", has="random_uuid"),
            Shape(SIGNING_MODULE, has="uuid"),
            Shape(f"{INTERNAL_IDS}:InputProcessor.assign_request_id", uses="random_uuid"),
        ),
        is_fatal=False,
    ),
    Patch(
        how="replaced",
        ours="serving.engine.vllm.stable_ids:RequestTime",
        why="a reply that goes on in another engine keeps its date",
        guards=("test_ids_and_dates_follow_from_the_request",),
        shapes=tuple(Shape(f"{module}:time", has="time") for module in DATED_MODULES),
        is_fatal=False,
    ),
    Patch(
        how="replaced",
        ours="serving.engine.vllm.patches:keep_responses",
        why="vLLM keeps every response with `store` for ever; one that runs in the background "
        "outlives the call that began it, with which what it computes would be aborted",
        guards=("test_a_response_in_the_background_is_carried_through",),
        shapes=(
            *(
                Shape(f"{_RESPONSES}.{name}", has="self request args kwargs")
                for name in ("_run_background_request", "_run_background_request_stream")
            ),
            Shape(
                f"{_RESPONSES}.__init__",
                uses="enable_store response_store msg_store event_store background_tasks",
            ),
        ),
        is_fatal=False,
    ),
    Patch(
        how="subclassed",
        ours="serving.engine.vllm.stats:EngineStats",
        why="snapshots are made of each step's statistics, which vLLM calls unstable",
        guards=(
            "test_a_step_lasts_by_the_cores_clock",
            "test_pending_prefill_agrees_with_vllms_counters",
            "test_kv_usage_is_vllms_block_count",
        ),
        shapes=(
            Shape(
                "vllm.v1.metrics.loggers:StatLoggerBase.record",
                "(self, scheduler_stats, iteration_stats, mm_cache_stats=None, engine_idx=0)",
            ),
            Shape(f"{_LLM}.from_vllm_config", has="stat_loggers disable_log_stats"),
            *classes(
                "vllm.v1.metrics.stats",
                SchedulerStats="num_running_reqs num_waiting_reqs num_skipped_waiting_reqs "
                "kv_cache_usage iteration_details prefix_cache_stats kv_connector_stats",
                SchedulerIterationDetails="num_ctx_tokens num_generation_requests",
                PrefixCacheStats="queries hits",
                IterationStats="num_generation_tokens num_preempted_reqs",
            ),
            *classes("vllm.config", CacheConfig="num_gpu_blocks block_size"),
        ),
    ),
    Patch(
        how="subclassed",
        ours="serving.engine.vllm.scheduler:StatsMixin",
        why="pending prefill (vllm#38025), prompts' block hashes and KV events come with their "
        "step's statistics, in the free-form `kv_connector_stats`",
        guards=(
            "test_with_async_scheduling_a_step_that_runs_is_pending_as_well",
            "test_a_conversation_stays_where_its_prefix_is",
            "test_on_a_real_engine",
        ),
        shapes=(
            Shape(f"{_SCHEDULER}.make_stats", has="kv_connector_stats"),
            Shape(f"{_SCHEDULER}.add_request", "(self, request)"),
            Shape(f"{_SCHEDULER}._free_request", "(self, request, delay_free_blocks=False)"),
            Shape(f"{_SCHEDULER}.__init__", has="hash_block_size"),
            Shape(f"{_SCHEDULER}._update_after_schedule", "(self, scheduler_output)"),
            Shape(
                f"{_SCHEDULER}.update_from_output",
                "(self, scheduler_output, model_runner_output)",
                uses="kv_event_publisher publish make_stats",
            ),
            *classes("vllm.config", SchedulerConfig="scheduler_cls async_scheduling"),
            *classes("vllm.v1.core.sched.async_scheduler", AsyncScheduler="_preempt_request"),
            *classes(
                "vllm.v1.request",
                Request="request_id status num_tokens num_computed_tokens num_output_tokens "
                "block_hashes lora_request",
                RequestStatus="PREEMPTED",
            ),
            *classes(
                "vllm.v1.core.sched.output",
                SchedulerOutput="num_scheduled_tokens total_num_scheduled_tokens "
                "scheduled_new_reqs scheduled_cached_reqs",
                NewRequestData="req_id num_computed_tokens",
                CachedRequestData="req_ids num_computed_tokens num_output_tokens",
            ),
            *classes(
                "vllm.distributed.kv_events",
                KVEventBatch="events",
                BlockStored="block_hashes group_idx",
                BlockRemoved="block_hashes group_idx",
                NullEventPublisher="publish",
            ),
            Shape("vllm.v1.utils:compute_iteration_details", "(scheduler_output)"),
            Shape("vllm.v1.core.kv_cache_utils:maybe_convert_block_hash", "(hash_bytes)"),
        ),
    ),
    Patch(
        how="subclassed",
        ours="serving.engine.vllm.lifeline:AliveMixin",
        why="the core itself tells the gateways that it lives and steps, and ends with its "
        "replica; vLLM's API process, which else would speak for it, may write at one reply for a "
        "minute",
        guards=(
            "test_a_huge_reply_is_not_held_against_its_engine",
            "test_a_core_that_is_stopped_is_left_as_soon_as_ever",
            "test_a_core_does_not_outlive_its_replica",
        ),
        shapes=(
            Shape(
                f"{_SCHEDULER}.update_from_output", "(self, scheduler_output, model_runner_output)"
            ),
            Shape(f"{_SCHEDULER}.get_num_unfinished_requests", "(self)"),
        ),
    ),
    Patch(
        how="subclassed",
        ours="serving.engine.vllm.scheduler:StepBudgetMixin",
        why="a step prefills no more than fits into the ITL target, and a prompt leaves room in it "
        "for sooner ones; vLLM's limits are fixed numbers of tokens",
        guards=(
            "test_a_long_prompt_shares_with_sooner_ones",
            "test_the_very_same_steps",
            "test_a_prompt_whose_adapter_nobody_else_uses_gives_no_way",
        ),
        shapes=(
            Shape(
                f"{_SCHEDULER}.schedule",
                uses="max_num_scheduled_tokens running long_prefill_token_threshold waiting",
            ),
            Shape(
                _SCHEDULER,
                has="scheduler_config vllm_config lora_config num_spec_tokens running waiting",
            ),
            *classes("vllm.config", VllmConfig="additional_config"),
            *classes(
                "vllm.v1.request",
                Request="priority num_output_tokens num_tokens num_computed_tokens",
            ),
            *classes("vllm.v1.core.sched.request_queue", PriorityRequestQueue="peek_request"),
            *classes("vllm.v1.core.sched.request_queue", SchedulingPolicy="PRIORITY"),
        ),
    ),
    Patch(
        how="subclassed",
        ours="serving.engine.vllm.scheduler:PreemptionFixMixin",
        why="vLLM leaves blocks in its prefix cache that a preemption has kept from being "
        "computed: whoever has the same prompt gets a wrong text",
        guards=(
            "test_a_chunk_that_is_withdrawn_leaves_the_prefix_cache",
            "test_vllm_still_caches_what_nobody_computed",
        ),
        shapes=(
            Shape(f"{_SCHEDULER}._preempt_request", has="request"),
            Shape(f"{_SCHEDULER}.schedule", uses="allocate_slots _preempt_request"),
            Shape(_SCHEDULER, has="kv_cache_manager"),
            *classes(
                "vllm.v1.core.kv_cache_manager",
                KVCacheManager="coordinator evict_blocks get_block_ids",
            ),
            Shape(
                "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator", has="single_type_managers"
            ),
            *classes(
                "vllm.v1.core.single_type_kv_cache_manager", SingleTypeKVCacheManager="block_size"
            ),
        ),
        versions=("0.32.0",),
    ),
    Patch(
        how="called",
        ours="serving.engine.vllm.engine:VllmEngine",
        why="vLLM's OpenAI application runs in our process, without its HTTP server; what nobody "
        "listens to is aborted by its internal name",
        guards=(
            "test_vllms_own_features_pass_through",
            "test_nothing_is_computed_for_who_hung_up_with_a_token_on_its_way",
        ),
        shapes=(
            Shape(
                "vllm.entrypoints.launchers.api_server.app_state:init_app_state",
                "(engine_client, state, args, supported_tasks=None)",
            ),
            Shape(
                "vllm.entrypoints.launchers.app:build_app", has="args supported_tasks model_config"
            ),
            Shape(
                "vllm.entrypoints.launchers.launcher:terminate_if_errored",
                "(server, engine)",
                uses="should_exit",
            ),
            Shape(
                "vllm.entrypoints.launchers.cli_args",
                has="make_arg_parser FrontendArgs validate_parsed_serve_args "
                "propagate_flash_late_interaction",
            ),
            Shape("vllm.entrypoints.launchers.launcher:validate_api_server_args", "(args)"),
            *classes("vllm.entrypoints.openai.models.protocol", LoRAModulePath="name path"),
            Shape("vllm.tool_parsers:ToolParserManager", has="import_tool_parser"),
            Shape("vllm.reasoning:ReasoningParserManager", has="import_reasoning_parser"),
            Shape("vllm.utils.argparse_utils:FlexibleArgumentParser"),
            Shape("vllm.usage.usage_lib:UsageContext", has="OPENAI_API_SERVER"),
            Shape(f"{_LLM}.abort", "(self, request_id, internal=False)"),
            Shape(_LLM, has="errored is_sleeping get_supported_tasks model_config shutdown"),
        ),
    ),
    Patch(
        how="called",
        ours="serving.engine.vllm.engine:refuse_unreadable_bodies",
        why="vLLM's handler of errors writes the reply to bodies that its own checks break down on",
        guards=("test_each_is_answered_or_refused_and_nothing_stays",),
        shapes=(
            Shape(
                "vllm.entrypoints.serve.exception_handling.handlers.exception:exception_handler",
                "(req, exc)",
            ),
        ),
    ),
    Patch(
        how="subclassed",
        ours="serving.engine.vllm.adapters.worker:AdapterWorker",
        why="which LoRA adapters a worker has, and what loading each took, it tells nobody",
        guards=("test_an_adapter_that_is_at_hand_is_preferred",),
        shapes=(
            Shape("vllm.config:ParallelConfig", has="worker_extension_cls"),
            Shape(
                "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager",
                has="add_adapter list_adapters",
            ),
            Shape(
                "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager.create_lora_manager",
                uses="_adapter_manager",
            ),
            Shape("vllm.lora.model_manager:LoRAModelManager.__init__", uses="lora_index_to_id"),
            Shape(
                "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model",
                uses="lora_manager",
            ),
            Shape(f"{_LLM}.collective_rpc", "(self, method, timeout=None, args=(), kwargs=None)"),
        ),
    ),
    Patch(
        how="replaced",
        ours="serving.engine.vllm.adapters.watch:AdapterWatch",
        why="gateways hear of adapters that are loaded and unloaded while serving; one that "
        "another engine has loaded is served here without loading it before it is asked for",
        guards=("test_an_adapter_that_is_at_hand_is_preferred",),
        shapes=(
            Shape(f"{_MODELS}.load_lora_adapter", uses="lora_requests add_lora"),
            Shape(f"{_MODELS}.unload_lora_adapter", uses="lora_requests"),
            Shape(f"{_MODELS}._check_load_lora_adapter_request", "(self, request)"),
            Shape(f"{_MODELS}.__init__", uses="lora_requests lora_id_counter lora_resolver_lock"),
            Shape(
                "vllm.lora.request:LoRARequest",
                has="lora_name lora_int_id lora_path load_inplace is_3d_lora_weight adapter_id",
            ),
            *classes("vllm.entrypoints.serve.lora.protocol", LoadLoRAAdapterRequest="model_fields"),
            Shape("vllm.lora.peft_helper:PEFTHelper", has="from_local_dir validate_legal"),
            Shape("vllm.lora.utils:get_adapter_absolute_path", "(lora_path)"),
            *classes("vllm.v1.engine.output_processor", RequestState="lora_name"),
        ),
    ),
    Patch(
        how="subclassed",
        ours="serving.engine.vllm.cpu_executor:CpuExecutor",
        why="on a CPU the worker of the default executor spins on a core even when idle",
        guards=("test_what_the_documents_ask_gets_paris",),
        shapes=(
            Shape("vllm.v1.executor.uniproc_executor:UniProcExecutor._init_executor", "(self)"),
        ),
    ),
    Patch(
        how="replaced",
        ours="serving.engine.vllm.patches:avoid_amx_attention",
        why="on a CPU with AMX, attention in bfloat16 gives wrong text (SmolLM2: a list of French "
        "words for the capital of France, where float32 and AVX-512 give Paris)",
        guards=("test_amx_attention_is_avoided", "test_what_the_documents_ask_gets_paris"),
        shapes=(
            Shape(
                "vllm.v1.attention.backends.cpu_attn:_get_attn_isa",
                "(dtype, block_size, head_size=None, kv_cache_dtype=None)",
            ),
        ),
        versions=("0.32.0",),
        is_fatal=False,
    ),
    Patch(
        how="replaced",
        ours="serving.engine.vllm.patches:draw_only_for_whole_prompts",
        why="on a CPU a prompt with a seed that one step does not compute whole ends the engine: "
        "what was drawn for it is taken back by the generator's offset, and a CPU generator has "
        "none",
        guards=("test_a_seed_draws_the_same_however_the_prompt_is_cut",),
        shapes=(
            Shape(
                f"{_RUNNER}._bookkeeping_sync",
                uses="input_batch num_reqs discard_request_mask generators set_offset get_offset",
            ),
            Shape(f"{_RUNNER}._sample", "(self, logits, spec_decode_metadata)"),
            Shape(f"{_RUNNER}.sample_tokens", uses="_sample _bookkeeping_sync"),
            *classes("vllm.v1.worker.gpu_input_batch", InputBatch="generators num_reqs"),
            Shape("vllm.v1.worker.cpu_model_runner:CPUModelRunner"),
        ),
        versions=("0.32.0",),
    ),
    Patch(
        how="replaced",
        ours="serving.engine.vllm.patches:leave_out_adapters_of_others",
        why="on a CPU who asks for no LoRA adapter gets another's text in a step beside requests "
        "that do: -1, for none, is taken for the last one",
        guards=("test_one_beyond_what_an_engine_has_room_for_waits_or_takes_a_place",),
        shapes=(
            Shape(
                f"{_LORA_OPS}:bgmv_shrink",
                "(inputs, lora_b_weights, output_tensor, lora_indices_tensor, scaling=1.0)",
            ),
            Shape(f"{_LORA_OPS}:sgmv_shrink", uses="bgmv_shrink"),
            Shape("vllm.lora.punica_wrapper.punica_cpu", has="bgmv_shrink sgmv_shrink"),
        ),
        versions=("0.32.0",),
    ),
    Patch(
        how="set",
        ours="serving.planning.plan:make_plan",
        why="torch.compile's CPU code gave a wrong text for SmolLM2 (AVX-512 BF16): it is off",
        guards=("test_what_the_documents_ask_gets_paris",),
        shapes=(Shape("vllm.engine.arg_utils:AsyncEngineArgs", has="enforce_eager"),),
        versions=("0.32.0",),
        is_fatal=False,
    ),
    Patch(
        how="set",
        ours="serving.engine.vllm.engine:on_core",
        why="the engine core is a process of its own; its KV cache is as planned, whatever the "
        "environment says (serving.cli.launch); block hashes are numbers",
        guards=("test_block_hashes_are_numbers",),
        shapes=(
            Shape(
                "vllm.envs:environment_variables",
                has="VLLM_ENABLE_V1_MULTIPROCESSING VLLM_CPU_KVCACHE_SPACE "
                "VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES",
            ),
        ),
        is_fatal=False,
    ),
    Patch(
        how="read",
        ours="serving.cli.launching.progress:engine_phases",
        why="how far a start has come, and why it failed, is read off the core's title and log",
        guards=("test_the_title_of_the_engine_core",),
        shapes=(
            Shape("vllm.utils.system_utils:set_process_title", has="name prefix"),
            Shape("vllm.v1.engine.core:EngineCoreProc.run_engine_core", uses="set_process_title"),
        ),
        is_fatal=False,
    ),
)


def check_vllm() -> None:
    """Compare `PATCHES` with the installed vLLM, and log a warning for each row that differs.

    Raises `ConfigError`, in one line, if a fatal one does.
    """
    from vllm import __version__

    version = __version__.partition("+")[0]  # without the build's own part
    is_tried = version in VERSIONS
    rows = [row for row in PATCHES if not is_tried or version in (row.versions or VERSIONS)]
    found = [(row, text) for row in rows if (text := row.explain_differences())]
    advice = f"Install vLLM {' or '.join(VERSIONS)}, or adapt serving/engine/vllm/patches.py."
    if fatal := "; ".join(text for row, text in found if row.is_fatal):
        raise ConfigError(f"engine: vLLM {version} is not as expected: {fatal}. {advice}")
    for _, text in found:
        logger.warning("vLLM %s is not as expected: %s. %s", version, text, advice)
    if not is_tried:
        logger.warning("vLLM %s has never been tried. %s", version, advice)


def set_scheduler(config: Any) -> None:
    """Have the engine core run our subclass of the scheduler that vLLM would choose."""
    name = "HeadwayAsyncScheduler" if config.async_scheduling else "HeadwayScheduler"
    config.scheduler_cls = f"serving.engine.vllm.scheduler.{name}"


def set_itl_target(config: Any, itl_target_s: float | None) -> float:
    """Have the engine core's scheduler keep to a target; return what holds, 0 for none."""
    if not itl_target_s or not isinstance(config.additional_config, dict):
        return 0.0
    from serving.engine.vllm.scheduler import ITL_TARGET

    config.additional_config[ITL_TARGET] = itl_target_s
    return itl_target_s


def avoid_amx_attention() -> None:
    """Have this process, an engine core, compute attention by AVX-512 where vLLM would take AMX."""
    cpu_attn = resolve("vllm.v1.attention.backends.cpu_attn")
    choose = cpu_attn._get_attn_isa

    def choose_but_amx(*args: Any, **kwargs: Any) -> str:
        isa = choose(*args, **kwargs)
        return "vec" if isa == "amx" else isa

    cpu_attn._get_attn_isa = choose_but_amx


def draw_only_for_whole_prompts() -> None:
    """Have this process, an engine core on a CPU, leave seeds alone until their prompt is computed.

    vLLM draws a token in every step, for a prompt with more to come as well, and throws that one
    away. Here such a prompt's generator is out of reach meanwhile: the token comes from the
    generator that all share, and the seed's first draw is for the first token of the reply.
    """
    runner = resolve("vllm.v1.worker.cpu_model_runner:CPUModelRunner")
    sample, keep_books = runner._sample, runner._bookkeeping_sync

    def sample_without_partial_prompts(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.input_batch
        partial = self.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
        self.generators_aside = {
            row: batch.generators.pop(row) for row in partial if row in batch.generators
        }
        return sample(self, *args, **kwargs)

    def keep_books_and_put_back(self: Any, *args: Any, **kwargs: Any) -> Any:
        books = keep_books(self, *args, **kwargs)
        self.input_batch.generators.update(self.generators_aside)
        return books

    runner._sample = sample_without_partial_prompts
    runner._bookkeeping_sync = keep_books_and_put_back


def leave_out_adapters_of_others() -> None:
    """Have this process, an engine core on a CPU, compute nothing for tokens without an adapter.

    All that an adapter adds goes through its first, narrow matrix. What comes out there is set to
    zero for those that have none; vLLM multiplies them with the last adapter that is resident.
    """
    ops = resolve("vllm.lora.ops.torch_ops.lora_ops")
    shrink = ops.bgmv_shrink

    def shrink_those_with_one(
        inputs: Any, weights: Any, outputs: Any, indices: Any, scaling: float = 1.0
    ) -> None:
        shrink(inputs, weights, outputs, indices, scaling)
        outputs.masked_fill_((indices < 0).unsqueeze(1), 0.0)

    ops.bgmv_shrink = shrink_those_with_one
    resolve("vllm.lora.punica_wrapper.punica_cpu").bgmv_shrink = shrink_those_with_one


def watch_requests(output_processor: Any, stats: "EngineStats", resumer: "Resumer") -> None:
    """Have both told of every request of one engine: its registration, its tokens, its end."""
    register = output_processor.add_request
    process = output_processor.process_outputs
    update_stats = output_processor._update_stats_from_finished

    def add_request(
        request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, queue: Any = None
    ) -> None:
        register(request, prompt, parent_req, request_index, queue)
        stats.register_request(request, request_index)
        resumer.register_request(request, parent_req, request_index, queue)

    def process_outputs(engine_core_outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
        return process(resumer.record_outputs(engine_core_outputs), *args, **kwargs)

    def update_stats_from_finished(req_state: Any, finish_reason: Any, stats_: Any) -> None:
        update_stats(req_state, finish_reason, stats_)
        stats.count_finished(req_state, stats_)

    output_processor.add_request = add_request
    output_processor.process_outputs = process_outputs
    output_processor._update_stats_from_finished = update_stats_from_finished


def admit_requests(llm: Any, grammars: Grammars, adapters: AdapterWatch | None = None) -> None:
    """Have an engine refuse, with the reason, the requests that must not reach its core or cannot.

    The same errors are a client's where vLLM meets them a moment earlier.
    """
    from vllm.exceptions import RetryableRequestError, VLLMClientError, VLLMError

    add_request = llm.add_request

    async def add_request_or_refuse(
        request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            if (outputs := getattr(params, "structured_outputs", None)) is not None:
                await grammars.check(outputs)
            if adapters is not None and (lora := kwargs.get("lora_request")) is not None:
                adapters.check_request(lora)
            return await add_request(request_id, prompt, params, *args, **kwargs)
        except VLLMError:
            raise
        except GrammarRefused as error:
            raise VLLMClientError(str(error)) from error
        except SandboxEnded as error:
            raise RetryableRequestError("The sandbox of grammars ended; please retry") from error
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise VLLMClientError(f"The request cannot be passed to the engine: {error}") from error

    llm.add_request = add_request_or_refuse


def check_grammars_once() -> None:
    """Have vLLM go by the verdict on a grammar, where there is one, and read none without end."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams
    from vllm.v1.structured_output.utils import choice_as_grammar

    backend_xgrammar = resolve(f"{_GRAMMARS}.backend_xgrammar")
    validate = SamplingParams._validate_structured_outputs
    read = backend_xgrammar.validate_xgrammar_grammar

    @functools.wraps(validate)  # so that a second engine here still finds vLLM as it was
    def validate_unless_known(self: Any, *args: Any, **kwargs: Any) -> None:
        outputs = self.structured_outputs
        if outputs is None or not apply_verdict(outputs, choice_as_grammar):
            validate(self, *args, **kwargs)

    @functools.wraps(read)
    def read_unless_long(sampling_params: Any) -> None:
        if (outputs := sampling_params.structured_outputs) is not None:
            try:
                check_length(outputs)
            except GrammarRefused as error:
                raise VLLMValidationError(str(error)) from error
        read(sampling_params)

    SamplingParams._validate_structured_outputs = validate_unless_known
    backend_xgrammar.validate_xgrammar_grammar = read_unless_long


def blame_grammars() -> None:
    """Have vLLM's API layer refuse a request whose grammar the core could not go on with."""
    from vllm.entrypoints.generate.base.serving import GenerateBaseServing
    from vllm.exceptions import VLLMClientError

    raise_if_error = GenerateBaseServing._raise_if_error

    @functools.wraps(raise_if_error)
    def raise_whose_error(self: Any, finish_reason: str | None, request_id: str) -> None:
        accounting = current_accounting.get()
        if finish_reason == "error" and accounting is not None and accounting.has_grammar:
            raise VLLMClientError("The grammar leads to where nothing is allowed to follow.")
        raise_if_error(self, finish_reason, request_id)

    GenerateBaseServing._raise_if_error = raise_whose_error


class BoundedDict(dict[str, Any]):
    """The newest so many entries; older ones are forgotten."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if len(self) > _MAX_RESPONSES:
            del self[next(iter(self))]


def keep_responses(state: Any) -> None:
    """Have one engine keep a bounded number of responses, and carry on those in the background."""
    if (serving := getattr(state, "openai_serving_responses", None)) is None:
        return  # a model that generates nothing
    for name in ("response_store", "msg_store", "event_store"):
        setattr(serving, name, BoundedDict(getattr(serving, name)))

    def detach(run: Any) -> Any:
        @functools.wraps(run)
        async def run_for_nobody(*args: Any, **kwargs: Any) -> None:
            current_accounting.set(None)  # of this task alone: the call that began it may end
            await run(*args, **kwargs)

        return run_for_nobody

    for name in ("_run_background_request", "_run_background_request_stream"):
        setattr(serving, name, detach(getattr(serving, name)))


@functools.cache  # once per process
def patch_modules() -> None:
    """Replace what all engines of this process share: checks, collector, makers of ids and dates.

    What vLLM imports from here on finds the replacements.
    """
    import vllm.utils
    from vllm.v1.engine import async_llm

    from serving.engine.vllm.resume import Collector

    check_grammars_once()
    blame_grammars()
    async_llm.RequestOutputCollector = Collector
    for name in DATED_MODULES:
        with contextlib.suppress(ImportError):  # `check_vllm` has told of it
            resolve(name).time = RequestTime()
    with contextlib.suppress(ImportError):
        resolve(SIGNING_MODULE).uuid = RequestUuids()
    random_uuid = vllm.utils.random_uuid
    replacement = stable_uuid(random_uuid)
    for name, module in list(sys.modules.items()):
        is_api = name.startswith("vllm.") and name != INTERNAL_IDS
        if is_api and getattr(module, "random_uuid", None) is random_uuid:
            module.random_uuid = replacement  # type: ignore[attr-defined]

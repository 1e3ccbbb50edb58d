"""What do the router and its shells say to each other? Frozen values, no logic.

Times are seconds of the caller's monotonic clock and always passed in. Token
counts are the model's own tokens. Structs rather than dataclasses because
`EngineInfo` and `EngineSnapshot` also travel on the wire as they are.
"""

import enum

import msgspec

# How often an engine sends its state, seconds. A snapshot is at most this old under load; more
# often than the fastest engine steps (~5 ms) would only cost CPU.
SNAPSHOT_INTERVAL_S = 0.010
# With several gateways, what one has sent an engine is told to the others sooner: they go by it.
BOOKING_INTERVAL_S = 0.001
# An engine records nothing while idle; this tells the gateway that it lives.
HEARTBEAT_S = 0.5
# Share of the memory of `EngineSnapshot.prefill_tokens_per_s` that one prefill step replaces:
# about the last 20 steps count, a few seconds of a busy engine.
PREFILL_RATE_FORGETTING = 0.05

# About the tokens of one block of `Request.prefix_hashes`. vLLM's own blocks of 16 would
# find a few more tokens for four times the work and memory.
PREFIX_BLOCK_TOKENS = 64


class Outcome(enum.Enum):
    """How a request ended. Every request ends in exactly one of these."""

    COMPLETED = "completed"
    REJECTED = "rejected"  # it could not be held, was evicted, or nothing can serve it
    EXPIRED = "expired"  # its deadline passed while it was held
    RENEGED = "reneged"  # the client left
    FAILED = "failed"  # an engine or the connection to it failed


class RequestClass(enum.Enum):
    """How urgent a request is to whoever sent it."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"  # fills gaps; yields to all others until its TTFT deadline


class RejectReason(enum.Enum):
    """Why the router refuses a request; the gateway maps it to a status code."""

    QUEUE_FULL = "queue_full"
    EXPIRED = "expired"
    HOPELESS = "hopeless"  # it would expire before an engine had room for it
    OVERLOADED = "overloaded"  # its first token would come too late: `router.scheduling`
    UNKNOWN_MODEL = "unknown_model"
    NO_BUDGET = "no_budget"  # only providers serve the model, and none may be sent it
    ENDS_ENGINES = "ends_engines"  # two engines died or hung under it: `router.resilience.suspects`


class FailedCall(msgspec.Struct, frozen=True):
    """A call that failed, at an engine or a provider: nobody knows yet whose fault it was."""

    callee: str  # the replica's id, or the provider's key's
    permit: int  # of its breaker
    had_answered: bool  # it had begun to generate


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One request as the router sees it: sizes and times, never its text."""

    id: str
    model: str
    num_prompt_tokens: int  # estimated before dispatch unless the body has token ids
    max_output_tokens: int | None = None  # the client's own limit
    num_expected_output_tokens: int = 128  # predicted by the router, per sequence
    # What KV room is kept for, per sequence; set by the router. 0: as many as expected.
    num_booked_output_tokens: int = 0
    num_prompts: int = 1  # a list of prompts is one request
    num_sequences: int = 1  # OpenAI's `n`, of each prompt
    # What the model's engines took per prompt token when it came; set by the router.
    prefill_s_per_token: float = float("inf")
    # Its place in the order of service, earliest deadline first (`router.queueing.deadline`);
    # set by the router. inf: by arrival.
    edf_key_s: float = float("inf")
    num_bytes: int = 0  # body size, for the queue's byte bound
    fingerprint: int = 0  # equal for equal bodies; 0: unknown
    tenant: str = ""
    weight: float = 1.0  # the tenant's share of tokens, relative to others'
    priority_class: RequestClass = RequestClass.STANDARD
    # By its client's own priority it comes so much later among its tenant's; sooner if negative.
    put_off_s: float = 0.0
    arrival_s: float = 0.0
    deadline_s: float = float("inf")  # held past this, it expires
    # Its model's own targets, seconds; None: those of the settings, which are of all models.
    ttft_target_base_s: float | None = None
    ttft_target_s_per_token: float | None = None
    tpot_target_s: float | None = None
    # Chained hashes of the prompt's successive blocks as the gateway cuts it: each
    # covers all before it. Whole blocks only; none unless the policy reads them.
    prefix_hashes: tuple[int, ...] = ()
    # What its instruction says, as numbers (`router.estimators.lengths.text_model`), and the same
    # number for the same system prompt; 0: none, or unknown.
    wording: tuple[int, ...] = ()
    system_prompt: int = 0
    prefix_block_share: float = 0.0  # share of the prompt that each of them covers
    # Likewise of all its text, by which its answer will be known; 0: no text that can be continued.
    end_hash: int = 0
    # Of the text before the last answer in it: the `end_hash` of the turn before. And up to the
    # end of that answer, its share of the prompt.
    answered_hash: int = 0
    answered_share: float = 0.0
    session: int = 0  # equal for requests that their client says belong together; 0: it does not
    # Leading KV blocks of the prompt by the engines' own hashes, as far as known, and the prompt's
    # tokens up to the end of each. Not all of a long prompt's: see `router.fleet.prompt_blocks`.
    block_hashes: tuple[int, ...] = ()
    block_ends: tuple[int, ...] = ()
    # Engines and provider keys that did not complete it, and when the last one gave up.
    tried: tuple[str, ...] = ()
    num_bounces: int = 0  # engines that gave it back as busy: it is placed again, and no retry
    num_stuck: int = 0  # of these the last ones in a row that got its reply no further
    retried_s: float = float("-inf")
    # Of engines that failed under it alone: whose fault that was shows where it goes next.
    failed_calls: tuple[FailedCall, ...] = ()
    # An engine may have died or hung because of it: `router.resilience.suspects`.
    is_suspect: bool = False
    # The one engine that can serve it, as it keeps what the request goes on from; "": any.
    only_at: str = ""
    engines_only: bool = False  # providers do not have what it asks for
    # Part of its reply was sent: by an engine, then only engines can continue it; or by a
    # provider, then only providers that say they can.
    has_begun: bool = False
    begun_externally: bool = False  # by an engine that `is_external`: others of them continue it

    @property
    def was_placed(self) -> bool:
        """Whether it was at an engine or provider, so that no bound of the queue is for it."""
        return bool(self.tried or self.num_bounces)


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change while an engine lives; sent once per connection."""

    model: str  # the name clients ask for
    tasks: tuple[str, ...]  # vLLM's supported tasks, e.g. ("generate",)
    max_model_len: int  # tokens, prompt and output together
    max_num_seqs: int  # sequences in one scheduler step
    max_num_batched_tokens: int  # token budget of one scheduler step
    max_prefill_chunk: int = 0  # of that, what one prompt may take, tokens; 0 = all
    # The longest gap between tokens that prefill should cause: `router.fleet.step_budget`; 0 = any.
    itl_target_s: float = 0.0
    async_scheduling: bool = False  # a step is launched before the one before it has ended
    num_kv_tokens: int  # capacity of the KV cache, tokens
    block_size: int  # tokens per KV block
    vocab_size: int = 0  # tokens; 0 = unknown
    aliases: tuple[str, ...] = ()  # further names of the model, LoRA adapters among them
    root: str = ""  # where the model was loaded from: Hugging Face id or folder
    adapters: dict[str, str] = {}  # of LoRA: where each is loaded from, by name; may change
    max_loras: int = 0  # adapters that one step can use; 0: none
    routes: tuple[str, ...] = ()  # what its API answers, as "POST /v1/messages"; empty: unknown
    device: str = ""  # hardware, in words
    engine: str = ""  # engine and version; says "simulated" where it is
    heartbeat_s: float = 0.0  # longest time between snapshots while it lives; 0 = unknown
    pid: int = 0  # of the replica's process, on its node; for people
    # Somebody else's server: its state is looked at now and then, not pushed after each step, and
    # only others like it can go on with a reply that it has begun.
    is_external: bool = False

    def with_adapters(self, paths: dict[str, str]) -> "EngineInfo":
        """Return the description of the same engine, with these adapters and no others."""
        names = [name for name in self.aliases if name not in self.adapters]
        return msgspec.structs.replace(self, aliases=(*names, *paths), adapters=paths)


class AdapterState(msgspec.Struct, frozen=True, kw_only=True):
    """Which LoRA adapters an engine has at hand, and which it is using. By their names."""

    resident: list[str] = []  # where steps can use them, at most `max_loras`
    cached: list[str] = []  # in its memory beside: no file is read for these
    num_requests: dict[str, int] = {}  # that it has for each, running or waiting
    load_s: dict[str, float] = {}  # what loading each took last, from its files; others unknown
    swap_s: float = 0.0  # what it took last to make a cached one resident; 0: unknown


class EngineSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's live scheduler state.

    Dated by the receiver's clock on receipt: monotonic clocks of different
    processes do not compare. Counters (`…_total`) grow from the engine's
    start; everything else is the state at the end of the last scheduler step,
    with submissions counted as soon as the replica has read them.
    """

    seq: int  # grows by one per snapshot of this engine
    last_booking: int = 0  # this and every lower booking of the receiver is contained
    num_running_reqs: int = 0  # vLLM's scheduler: in the batch
    num_waiting_reqs: int = 0  # vLLM's scheduler: waiting, deferred ones included
    num_inflight_reqs: int = 0  # all that the replica has received and not ended
    kv_cache_usage: float = 0.0  # 0-1, cached but free blocks not counted
    num_free_kv_tokens: int = 0
    num_pending_prefill_tokens: int = 0  # submitted minus computed, exact per request
    num_step_demand_tokens: int = 0  # of these, what the next step could compute at most
    num_decoding_reqs: int = 0
    num_decode_context_tokens: int = 0  # prompt + generated, over decoding requests
    prefill_tokens_per_s: float = 0.0  # measured over recent steps; 0 = not known yet
    step_s: float = 0.0  # duration of the last step
    step_num_prefill_tokens: int = 0  # what that step computed
    step_num_prefill_pairs: float = 0.0  # of attention: each of these tokens times those before it
    step_num_decode_reqs: int = 0
    num_prefill_tokens_total: int = 0  # computed by prefill, recomputation included
    num_prefix_queries_total: int = 0  # tokens looked up in the prefix cache
    num_prefix_hits_total: int = 0  # tokens found there
    num_preemptions_total: int = 0
    num_output_tokens_total: int = 0
    num_steps_total: int = 0
    # Of LoRA, and only if it has changed since the snapshot before; None: it has not. The second
    # is where each adapter that is served is loaded from, by name.
    adapters: AdapterState | None = None
    adapter_paths: dict[str, str] | None = None


class BlockUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """What changed in the set of KV blocks that one engine's prefix cache holds.

    Blocks by their hashes as vLLM computes them (64 bits), which cover all that
    comes before the block. Positions count changes; an update that does not
    begin where the last one ended means that one was missed.
    """

    since: int  # position that it continues; -1: `stored` is all that is cached
    until: int  # position it leads to
    stored: list[int] = []
    removed: list[int] = []


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that a finished request used, as vLLM counted them."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    # The last whole KV block of prompt and answer, by its engine's hash; 0: not known.
    last_block: int = 0


class Dispatch(msgspec.Struct, frozen=True):
    """Send the request to this replica under this booking number.

    A request that is at an engine already is sent to a second one: a hedge. Whichever answers
    first has it.
    """

    request_id: str
    replica_id: str
    booking: int
    num_cached_tokens: int = 0  # of the prompt, expected in the engine's prefix cache
    # With more to prefill already than so many tokens an engine of several gateways gives it back
    # as busy: others have sent it something meanwhile. 0: never.
    max_pending_tokens: int = 0


class Withdraw(msgspec.Struct, frozen=True):
    """Tell this engine to stop: another one answers the request."""

    request_id: str
    replica_id: str
    booking: int


class Hold(msgspec.Struct, frozen=True):
    """Keep the request; a later event dispatches or rejects it."""

    request_id: str


class Reject(msgspec.Struct, frozen=True):
    """Refuse the request. `retry_after_s` is when trying again makes sense."""

    request_id: str
    reason: RejectReason
    retry_after_s: float | None = None


class Fallback(msgspec.Struct, frozen=True):
    """Send the request to this provider, under this key of it."""

    request_id: str
    provider: str
    key: str


class Fail(msgspec.Struct, frozen=True):
    """Give the request up: no engine completes it, or no retry is left for it."""

    request_id: str


class Evacuate(msgspec.Struct, frozen=True):
    """Take every request off this replica, as if its connection were lost."""

    replica_id: str
    reason: str


Decision = Dispatch | Withdraw | Hold | Fallback | Reject | Fail | Evacuate

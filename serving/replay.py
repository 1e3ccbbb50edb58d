"""Going on, in one vLLM engine, with requests that another has begun (vLLM 0.32).

The API layer makes a response out of what the engine's collector hands it,
step by step. A request with a record is registered as if new, and then its
collector is given the recorded steps, through vLLM's own output processor:
detokenizer, stop strings, log probabilities, parsers and `n` come into the
state they were in, and the same bytes come out (`serving.stream` drops those
that the client has). The engine core gets prompt and tokens as one prompt, so
what was generated is prefilled, not generated again.

Some requests the core cannot take up in the middle: what it has generated
counts for penalties, seeds and grammars. Where the same tokens can be expected
to come again (greedy, or a seed), they are generated again from the start, in
groups of the recorded sizes; else the core goes on with what a prompt lets it
know, which is a valid answer, though drawn from a slightly other distribution.
"""

import hashlib
import sys
import time
from collections import deque
from typing import Any

import numpy as np
import vllm.utils
from vllm.sampling_params import RequestOutputKind, SamplingParams, SamplingType
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason, async_llm
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.outputs import LogprobsLists

from serving.account import Account, current_account
from serving.record import Entry, Group, Recorder, groups

_API_MODULES = tuple(
    f"vllm.entrypoints.openai.{name}"
    for name in (
        "chat_completion.protocol",
        "chat_completion.serving",
        "completion.protocol",
        "completion.serving",
    )
)


class Collector(RequestOutputCollector):
    """Hands out what was replayed before what is new, and tells the recorder of each taking."""

    def __init__(self, output_kind: RequestOutputKind, request_id: str) -> None:
        super().__init__(output_kind, request_id)
        self.recorder: Recorder | None = None
        self.output: Any = None
        self.replayed: deque[Any] = deque()
        self.sizes: deque[int] = deque()  # of groups to be generated again, outputs each
        self._num_put = 0

    def put(self, output: Any) -> None:
        super().put(output)
        if not self.sizes or isinstance(output, Exception):
            return
        # The first engine's API layer had taken so many at once: so shall this one's.
        self._num_put += 1
        if self._num_put < self.sizes[0] and not output.finished:
            self.ready.clear()
            return
        self.sizes.popleft()
        self._num_put = 0
        self.replayed.append(self.output)  # apart from what follows, which would be merged
        self.output = None
        self.ready.set()

    async def get(self) -> Any:
        while not self._has_any():
            self.ready.clear()
            await self.ready.wait()
        return self.get_nowait()

    def get_nowait(self) -> Any:
        if self.replayed:
            output = self.replayed.popleft()
        elif self._has_any():
            output = super().get_nowait()
        else:
            return None
        if self.recorder is not None:
            self.recorder.cut()
        return output

    def _has_any(self) -> bool:
        if self.replayed:
            return True
        return self.output is not None and (not self.sizes or isinstance(self.output, Exception))


class Replayer:
    """Records what one engine generates, and goes on with what others have recorded."""

    def __init__(self, output_processor: OutputProcessor) -> None:
        """Watch the requests of this engine, from the moment vLLM registers them."""
        self._recorders: dict[str, tuple[Recorder, int, bool]] = {}  # by vLLM's request id
        self._children: dict[str, list[EngineCoreRequest]] = {}  # registered so far, by parent
        self._processor = output_processor
        self._process = output_processor.process_outputs
        self._register = output_processor.add_request
        output_processor.process_outputs = self._record
        output_processor.add_request = self._add_request
        async_llm.RequestOutputCollector = Collector
        _make_repeatable()

    def forget(self, account: Account) -> None:
        """The request has ended, whichever way."""
        for key in [key for key, value in self._recorders.items() if value[0] is account.recorder]:
            del self._recorders[key]

    def _record(self, outputs: list[EngineCoreOutput], *args: Any, **kwargs: Any) -> Any:
        """vLLM's `process_outputs`, written down."""
        for output in outputs:
            if (known := self._recorders.get(output.request_id)) is None:
                continue
            recorder, index, is_streamed = known
            recorder.add(_entry(index, output), is_streamed=is_streamed)
        return self._process(outputs, *args, **kwargs)

    def _add_request(
        self,
        request: EngineCoreRequest,
        prompt: str | None,
        parent: ParentRequest | None = None,
        index: int = 0,
        queue: Collector | None = None,
    ) -> None:
        self._register(request, prompt, parent, index, queue)
        account = current_account.get()
        if account is None or queue is None or request.sampling_params is None:
            return
        is_streamed = request.sampling_params.output_kind == RequestOutputKind.DELTA
        self._recorders[request.request_id] = (account.recorder, index, is_streamed)
        account.recorder.own(request.external_req_id or request.request_id)
        queue.recorder = account.recorder
        siblings = [request]
        if parent is not None:
            siblings = self._children.setdefault(parent.request_id, [])
            siblings.append(request)
            if len(siblings) < parent.n:
                return
            del self._children[parent.request_id]
        if account.resume is None or not (recorded := groups(account.resume.record)):
            return
        account.resume = None  # a second prompt would be another one
        if _comes_again(request.sampling_params):
            if parent is None:
                queue.sizes.extend(len(group) for group in recorded)
            return
        self._replay(recorded, siblings, queue, account)

    def _replay(
        self,
        recorded: list[Group],
        requests: list[EngineCoreRequest],
        queue: Collector,
        account: Account,
    ) -> None:
        """Put the request, its sequences in the order of their index, where it was."""
        tokens: list[list[int]] = [[] for _ in requests]
        for group in recorded:
            for entry in group:
                tokens[entry.index].extend(entry.token_ids)
                self._process([_output(requests[entry.index].request_id, entry)])
            if queue.output is not None:
                queue.replayed.append(queue.output)
                queue.output = None
        for request, token_ids in zip(requests, tokens, strict=True):
            state = self._processor.request_states.get(request.request_id)
            params = request.sampling_params.clone()
            if state is None:
                # It had ended. The core is given it all the same, as vLLM will do that
                # next, and its one token goes nowhere.
                params.max_tokens, params.min_tokens = 1, 0
                account.num_output_tokens += len(token_ids)
            else:
                state.is_prefilling = True
                if state.stats is not None:
                    state.stats.num_generation_tokens = len(token_ids)
                if params.max_tokens is not None:
                    params.max_tokens = max(1, params.max_tokens - len(token_ids))
                params.min_tokens = max(0, params.min_tokens - len(token_ids))
            request.sampling_params = params
            request.prompt_token_ids = [*(request.prompt_token_ids or ()), *token_ids]


def _comes_again(params: SamplingParams) -> bool:
    """Whether the core must begin anew, and can be expected to come to the same tokens.

    Seeds, penalties on what was generated, grammars and forbidden words work on
    a request's own output, which a prompt is not.
    """
    is_greedy = params.sampling_type == SamplingType.GREEDY
    if not is_greedy:
        return params.seed is not None
    structured = params.structured_outputs
    return bool(
        params.presence_penalty
        or params.frequency_penalty
        or params.bad_words
        or params.prompt_logprobs is not None
        or (structured is not None and not structured.all_constraints_none())
    )


def _entry(index: int, output: EngineCoreOutput) -> Entry:
    logprobs = None
    if output.new_logprobs is not None:
        ids, values, ranks, _ = output.new_logprobs
        logprobs = (ids.tolist(), values.tolist(), ranks.tolist())
    finish_reason = None if output.finish_reason is None else int(output.finish_reason)
    return Entry(index, tuple(output.new_token_ids), finish_reason, output.stop_reason, logprobs)


def _output(request_id: str, entry: Entry) -> EngineCoreOutput:
    logprobs = None
    if entry.logprobs is not None:
        ids, values, ranks = entry.logprobs
        logprobs = LogprobsLists(
            np.array(ids, np.int32), np.array(values, np.float32), np.array(ranks, np.int32)
        )
    return EngineCoreOutput(
        request_id,
        list(entry.token_ids),
        new_logprobs=logprobs,
        finish_reason=None if entry.finish_reason is None else FinishReason(entry.finish_reason),
        stop_reason=entry.stop_reason,
    )


class _RequestTime:
    """The module `time` as the API layer sees it: a request is as old as its gateway says."""

    def time(self) -> float:
        account = current_account.get()
        return float(account.created_s) if account and account.created_s else time.time()

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def _make_repeatable() -> None:
    """Let the ids and dates in a response follow from its request, in whichever engine."""
    random_uuid = vllm.utils.random_uuid

    def repeatable_uuid() -> str:
        account = current_account.get()
        if account is None or not account.request_id:
            return random_uuid()
        account.num_ids += 1
        text = f"{account.request_id} {account.created_s} {account.num_ids}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    vllm.utils.random_uuid = repeatable_uuid
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and getattr(module, "random_uuid", None) is random_uuid:
            module.random_uuid = repeatable_uuid  # type: ignore[attr-defined]
    for name in _API_MODULES:
        sys.modules[name].time = _RequestTime()  # type: ignore[attr-defined]

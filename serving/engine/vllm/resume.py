"""How does one vLLM engine go on with a request that another has begun?

The API layer makes a response out of what the engine's collector hands it,
step by step. A request with a record is registered as if it were new; then its
collector is given the recorded steps through vLLM's own output processor.
Detokenizer, stop strings, log probabilities, parsers and `n` come into the
state they were in, and the same bytes come out (`serving.stream.call` drops those
that the client has). The engine core gets prompt and recorded tokens as one
prompt, so what was generated is prefilled, not generated again.

Some requests the core cannot take up in the middle, because penalties, seeds and
grammars work on what it has generated itself. Where the same tokens can be expected
again (greedy, or a seed), the core generates them again from the start; they are
compared with the record and kept back. Elsewhere it goes on with what a prompt
tells it: a valid answer, drawn from a slightly different distribution.

`serving.engine.vllm.patches` calls what is here in vLLM's place.
"""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
from vllm.sampling_params import RequestOutputKind, SamplingParams, SamplingType
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import RequestOutputCollector, RequestState
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.outputs import LogprobsLists

from serving.stream.accounting import RequestAccounting, current_accounting
from serving.stream.record import Entry, Group, Recorder, decode_groups


class Collector(RequestOutputCollector):
    """Hands out what was replayed before what is new; each taking ends a group of the record."""

    def __init__(self, output_kind: RequestOutputKind, request_id: str) -> None:
        super().__init__(output_kind, request_id)
        self.recorder: Recorder | None = None
        self.output: Any = None
        self.replayed: deque[Any] = deque()

    async def get(self) -> Any:
        while not self.replayed and self.output is None:
            self.ready.clear()
            await self.ready.wait()
        return self.get_nowait()

    def get_nowait(self) -> Any:
        output = self.replayed.popleft() if self.replayed else super().get_nowait()
        if output is not None and self.recorder is not None:
            self.recorder.end_group()
        return output


class _Regeneration:
    """A request whose recorded tokens the core generates once more."""

    def __init__(
        self,
        recorded: list[Group],
        requests: list[EngineCoreRequest],
        queue: Collector,
        accounting: RequestAccounting,
    ) -> None:
        self.accounting = accounting
        self.queue = queue
        self.is_replayed = False
        self.recorded = recorded
        self.requests = requests  # in the order of their index
        ids = [request.request_id for request in requests]
        # Tokens that are still to come again, by vLLM's request id.
        self.left: dict[str, list[int]] = {request_id: [] for request_id in ids}
        for group in recorded:
            for entry in group:
                self.left[ids[entry.index]].extend(entry.token_ids)


class Resumer:
    """Records what one engine generates, and goes on with what others have recorded."""

    def __init__(self, process: Callable[..., Any], live: Mapping[str, RequestState]) -> None:
        """Take vLLM's own way to process outputs, and its requests by its request ids."""
        self._recorders: dict[str, tuple[Recorder, int, bool]] = {}  # by vLLM's request id
        self._regenerations: dict[str, _Regeneration] = {}  # likewise
        self._children: dict[str, list[EngineCoreRequest]] = {}  # registered so far, by parent
        self._process = process
        self._live = live

    def forget(self, accounting: RequestAccounting) -> None:
        """Drop a request that has ended, in whatever way."""
        for key in [
            key for key, value in self._recorders.items() if value[0] is accounting.recorder
        ]:
            del self._recorders[key]
            self._regenerations.pop(key, None)

    def record_outputs(self, outputs: list[EngineCoreOutput]) -> list[EngineCoreOutput]:
        """Record what the core has generated. Return it without what the record had already."""
        if self._regenerations:
            outputs = [new for output in outputs if (new := self._drop_known_tokens(output))]
        for output in outputs:
            if (known := self._recorders.get(output.request_id)) is None:
                continue
            if output.prefill_stats is not None:
                self._cap_cached_tokens(output)
            recorder, index, is_streamed = known
            recorder.add_entry(_entry_of(index, output), is_streamed=is_streamed)
        return outputs

    def _cap_cached_tokens(self, output: EngineCoreOutput) -> None:
        """Count of a prompt that recorded tokens were added to no more as cached than the prompt.

        A client is told of it as a part of its prompt.
        """
        if (state := self._live.get(output.request_id)) is not None:
            stats = output.prefill_stats
            stats.num_cached_tokens = min(stats.num_cached_tokens, state.prompt_len)

    def register_request(
        self,
        request: EngineCoreRequest,
        parent: ParentRequest | None,
        index: int,
        queue: Collector | None,
    ) -> None:
        """Record a sequence of a request, just registered; resume the request with its last one."""
        accounting = current_accounting.get()
        if accounting is None or queue is None or request.sampling_params is None:
            return
        is_streamed = request.sampling_params.output_kind == RequestOutputKind.DELTA
        self._recorders[request.request_id] = (accounting.recorder, index, is_streamed)
        accounting.recorder.set_prompt_id(request.external_req_id or request.request_id)
        queue.recorder = accounting.recorder
        siblings = [request]
        if parent is not None:
            siblings = self._children.setdefault(parent.request_id, [])
            siblings.append(request)
            if len(siblings) < parent.n:
                return
            del self._children[parent.request_id]
        if accounting.resume is None or not (recorded := decode_groups(accounting.resume.record)):
            return
        accounting.resume = None  # a second prompt would be another one
        if not _must_regenerate(request.sampling_params):
            self._replay(recorded, siblings, queue)
            self._extend_prompts(recorded, siblings, accounting)
        elif is_streamed:
            regeneration = _Regeneration(recorded, siblings, queue, accounting)
            self._regenerations.update(dict.fromkeys(regeneration.left, regeneration))
        else:  # the client has nothing yet, so nothing needs to be the same
            accounting.recorder.skip_entries(sum(map(len, recorded)))

    def _replay(
        self,
        recorded: list[Group],
        requests: list[EngineCoreRequest],
        queue: Collector,
        first: EngineCoreOutput | None = None,
    ) -> None:
        """Bring the output processor, group by group, into the state that the record ends in.

        What the core reports of a prompt comes with its `first` output, and is replayed too.
        """
        for group in recorded:
            for entry in group:
                output = _output_of(requests[entry.index].request_id, entry)
                if first is not None and first.request_id == output.request_id:
                    output.prefill_stats = first.prefill_stats
                    output.new_prompt_logprobs_tensors = first.new_prompt_logprobs_tensors
                    first = None
                self._process([output])
            if queue.output is not None:
                queue.replayed.append(queue.output)
                queue.output = None

    def _extend_prompts(
        self,
        recorded: list[Group],
        requests: list[EngineCoreRequest],
        accounting: RequestAccounting,
    ) -> None:
        """Have the core begin where the record ends: prompt and recorded tokens are its prompt."""
        tokens: list[list[int]] = [[] for _ in requests]
        for group in recorded:
            for entry in group:
                tokens[entry.index].extend(entry.token_ids)
        for request, token_ids in zip(requests, tokens, strict=True):
            state = self._live.get(request.request_id)
            params = request.sampling_params.clone()
            if state is None:
                # It had ended. vLLM gives it to the core all the same, which generates
                # one token for nobody.
                params.max_tokens, params.min_tokens = 1, 0
                accounting.num_output_tokens += len(token_ids)
            else:
                state.is_prefilling = True
                if state.stats is not None:
                    state.stats.num_generation_tokens = len(token_ids)
                if params.max_tokens is not None:
                    params.max_tokens = max(1, params.max_tokens - len(token_ids))
                params.min_tokens = max(0, params.min_tokens - len(token_ids))
            request.sampling_params = params
            request.prompt_token_ids = [*(request.prompt_token_ids or ()), *token_ids]

    def _drop_known_tokens(self, output: EngineCoreOutput) -> EngineCoreOutput | None:
        """Return what of an output is not in the record; None if nothing.

        Where it differs from the record, end the request: the client has what was recorded.
        """
        if (again := self._regenerations.get(output.request_id)) is None:
            return output
        if not again.is_replayed:
            again.is_replayed = True
            self._replay(again.recorded, again.requests, again.queue, output)
            if again.queue.replayed:
                again.queue.ready.set()
        left, token_ids = again.left[output.request_id], output.new_token_ids
        num_known = min(len(left), len(token_ids))
        is_short = output.finish_reason is not None and len(left) > len(token_ids)
        if token_ids[:num_known] != left[:num_known] or is_short:
            again.accounting.has_diverged = True
            again.queue.put(ValueError("other tokens than before"))
            del self._regenerations[output.request_id]
            return None
        del left[:num_known]
        state = self._live.get(output.request_id)
        if state is not None and state.stats is not None:
            state.stats.num_generation_tokens += num_known
        elif state is None:
            again.accounting.num_output_tokens += num_known
        if not left:
            del self._regenerations[output.request_id]
        if num_known == len(token_ids):
            return None
        return _without_first(output, num_known)


def _must_regenerate(params: SamplingParams) -> bool:
    """Whether the core must start from the beginning, and will likely come to the same tokens.

    Seeds, penalties on what was generated, grammars and forbidden words work on a
    request's own output, not on its prompt.
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


def _entry_of(index: int, output: EngineCoreOutput) -> Entry:
    logprobs = None
    if output.new_logprobs is not None:
        ids, values, ranks, _ = output.new_logprobs
        logprobs = (ids.tolist(), values.tolist(), ranks.tolist())
    finish_reason = None if output.finish_reason is None else int(output.finish_reason)
    return Entry(index, tuple(output.new_token_ids), finish_reason, output.stop_reason, logprobs)


def _without_first(output: EngineCoreOutput, num_known: int) -> EngineCoreOutput:
    """Return the output without its first tokens."""
    if not num_known:
        return output
    logprobs = output.new_logprobs
    if logprobs is not None:
        ids, values, ranks, _ = logprobs
        logprobs = LogprobsLists(ids[num_known:], values[num_known:], ranks[num_known:])
    return msgspec.structs.replace(
        output, new_token_ids=output.new_token_ids[num_known:], new_logprobs=logprobs
    )


def _output_of(request_id: str, entry: Entry) -> EngineCoreOutput:
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

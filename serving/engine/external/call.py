r"""What becomes of one request at a server that is not ours?

| the call ends because                            | the gateway receives                       |
|--------------------------------------------------|--------------------------------------------|
| the reply is whole                               | `End` without an error                     |
| it is an error of the client's                   | that, and its status                       |
| the server's key is not accepted                 | `End` with the error                       |
| it breaks off, or is an error under status 200   | `End` with the error, once the server is   |
|                                                  | known to live; else all that it has is     |
|                                                  | lost at once (`server.py`)                 |
| no server can go on with what has begun          | `End`: a retry is no use                   |
| the gateway cancelled it                         | nothing                                    |

A reply that does not come in events is kept back until it is whole, so that until then another
server may answer.
"""

import asyncio
from typing import Any, Protocol

import msgspec

from router import Usage
from serving.config.providers import ExternalConfig
from serving.engine.external.continuation import (
    CHAT,
    COMPLETIONS,
    CannotGoOn,
    Continuation,
    Overlap,
)
from serving.engine.external.events import (
    DONE,
    Event,
    EventCutter,
    UsageFields,
    code_of,
    decode_event,
    is_empty,
    usage_of,
    without_ids,
)
from serving.engine.external.http_client import Call, HttpClient
from serving.engine.external.request_body import light_fields, with_own_fields
from serving.stream.frames import Data, End, Head, Headers, Submit
from serving.stream.record import Entry, Recorder

# Beyond this a reply that does not come in events is passed on as it comes.
_MAX_KEPT_BYTES = 2**20
# Of one connection, or told anew by our own listener.
_NOT_PASSED_ON = frozenset((b"connection", b"keep-alive", b"transfer-encoding", b"date", b"server"))
_NOT_SENT = frozenset((b"x-vllm-priority", b"host", b"content-length", b"authorization"))
_PREAMBLE = (b"event: response.created\n", b"event: response.in_progress\n")
_IN_BACKGROUND = b'"background":true'


class CallHost(Protocol):
    """The server that a call is at."""

    config: ExternalConfig
    client: HttpClient
    is_vllm: bool
    max_model_len: int
    window_bytes: int

    def model_for(self, name: object) -> str | None:
        """Return by which name the server knows a model, if by another one."""
        ...

    def on_tokens(self, stream: int, prompt_ids: list[int]) -> None: ...
    def last_block(self, token_ids: list[int]) -> int: ...
    def on_head(self, frame: Head) -> None: ...
    def on_data(self, frame: Data) -> None: ...
    def on_end(self, call: "ExternalCall", frame: End) -> None: ...
    def on_call_broken(self, call: "ExternalCall", why: str) -> None: ...
    def on_key_refused(self, status: int) -> None: ...


class ExternalCall:
    """One request at one server."""

    def __init__(self, host: CallHost, submit: Submit, continuation: Continuation) -> None:
        self.stream = submit.stream
        # What the server's snapshots are made of.
        self.num_prompt_tokens = submit.num_prompt_tokens
        self.num_new_tokens = max(1, submit.num_prompt_tokens - submit.num_cached_tokens)
        self.num_output_tokens = 0
        self.has_token = False
        self.is_streamed = False
        self.sent_s = asyncio.get_running_loop().time()
        self.num_ahead = 0  # first tokens that come before its own, about
        self.can_go_on = False  # at another server, once it has begun
        self._host = host
        self._submit = submit
        self._continuation = continuation
        self._call: Call | None = None
        self._is_over = False
        self._path = submit.path
        self._body: dict[str, Any] = {}
        self._asks_ids = False  # for us, not for the client
        self._hides_usage = False
        self._overlap: Overlap | None = None
        self._rest_of: int | None = None  # tokens that came before, if it is asked for the rest
        # The reply.
        self._status = 0
        self._headers: Headers = []
        self._is_events = False
        self._has_head = False  # the gateway
        self._cutter = EventCutter()
        self._kept = bytearray()
        self._preamble: list[bytes] = []
        self._is_done = False
        self._told_prompt = False
        self._usage: UsageFields | None = None
        self._recorder = Recorder()
        self._credit_bytes = host.window_bytes

    # --- asking ------------------------------------------------------------------

    def begin(self) -> None:
        """Send the request, or what asks for the rest of its reply."""
        submit, host = self._submit, self._host
        body = submit.body
        if self._path in (CHAT, COMPLETIONS):
            self._body = light_fields(body)
            self.is_streamed = bool(self._body.get("stream"))
            mode = host.config.resume
            self.can_go_on = Continuation.may_go_on(
                self._path, self._body, mode, tells_ids=host.is_vllm
            )
        if submit.resume is not None:
            try:
                rest = self._ask_for_rest()
            except CannotGoOn as error:
                self._later(self._give_up, str(error))
                return
            if rest is None:
                self._later(self._end_by_length)
                return
            body = rest
        if submit.stream >= 0 and submit.resume is None:
            body, self._asks_ids, self._hides_usage = with_own_fields(
                self._path,
                body,
                self._body,
                host.model_for,
                wants_ids=host.is_vllm and host.config.resume != "off",
            )
        path = COMPLETIONS if self._rest_of is not None else submit.path
        headers = [each for each in submit.headers if each[0] not in _NOT_SENT]
        self._call = host.client.send(submit.method, path, headers, body, self)

    def _ask_for_rest(self) -> bytes | None:
        """Return the body that asks for the rest; None if there is none. Raise `CannotGoOn`."""
        continuation, host = self._continuation, self._host
        try:
            body = msgspec.json.decode(self._submit.body, type=dict[str, Any])
        except msgspec.MsgspecError:
            body = {}
        how = continuation.how(self._path, body, host.config.resume)
        if how == "no":
            raise CannotGoOn("what had been sent of its reply cannot go on at another server")
        if (name := host.model_for(body.get("model"))) is not None:
            body["model"] = name
        if body.get("priority"):
            body["priority"] = 0
        if how == "again":
            self._overlap = Overlap(continuation.text)
            continuation.has_ids = False
            return msgspec.json.encode(body)
        self._asks_ids = not body.get("return_token_ids")
        continuation.cut_to_shown()
        self._rest_of = len(continuation.token_ids)
        return continuation.body_for_rest(self._path, body, host.max_model_len)

    def _give_up(self, why: str) -> None:
        self._end(why, can_retry=False)

    def _end_by_length(self) -> None:
        """End a reply of which only the end is missing: all tokens that it may have are there."""
        events = self._continuation.end_of_length(self._path) + b"\n\n" + DONE + b"\n\n"
        self._headers, self._status = [(b"content-type", b"text/event-stream")], 200
        self._post(events)
        self._end(None)

    def _later(self, act: Any, *args: Any) -> None:
        """Do something when the router is not in the middle of a decision."""
        asyncio.get_running_loop().call_soon(lambda: None if self._is_over else act(*args))

    # --- what the gateway says ------------------------------------------------------

    def cancel(self) -> None:
        """Hang up."""
        self._is_over = True
        if self._call is not None:
            self._call.cancel()

    def acknowledge(self, num_bytes: int) -> None:
        """Read on: the client has taken so much."""
        was_out = self._credit_bytes <= 0
        self._credit_bytes += num_bytes
        if was_out and self._credit_bytes > 0 and self._call is not None:
            self._call.go_on()

    # --- what the server says ---------------------------------------------------------

    def on_head(self, status: int, headers: Headers) -> None:
        self._status = status
        self._headers = [each for each in headers if each[0] not in _NOT_PASSED_ON]
        kind = next((value for name, value in headers if name == b"content-type"), b"")
        self._is_events = status == 200 and kind.startswith(b"text/event-stream")

    def on_body(self, data: bytes) -> None:
        if self._is_over:
            return
        if self._is_events:
            self._pass_events(self._cutter.feed(data))
            return
        self._kept += data
        if len(self._kept) > _MAX_KEPT_BYTES and self._status == 200:
            self._post(bytes(self._kept))
            self._kept.clear()

    def on_complete(self) -> None:
        if self._is_over:
            return
        if self._is_events:
            self._pass_events(self._cutter.flush())
            is_chat = self._path in (CHAT, COMPLETIONS)
            if is_chat and not (self._is_done or self._is_over):
                self.on_broken("the reply broke off")
                return
        elif self._status in (401, 403):
            self._host.on_key_refused(self._status)
            self._end(f"it answered {self._status}: its key is not accepted (external)")
            return
        elif 300 <= self._status < 400:
            self._end(f"it answered {self._status}, a redirect: external.url is not its address")
            return
        else:
            body = bytes(self._kept)
            self._usage = usage_of(body) if self._status == 200 and body[:1] == b"{" else None
            self._post(body)
        if not self._is_over:
            self._end(None)

    def on_broken(self, why: str) -> None:
        if self._is_over:
            return
        if self._continuation.is_finished and self._continuation.is_plain and self._has_head:
            self._post(DONE + b"\n\n")  # only that was missing
            self._end(None)
            return
        self._host.on_call_broken(self, why)

    def fail(self, why: str) -> None:
        """End it: the server lives, and this call broke off."""
        if not self._is_over:
            self._end(why)

    # --- passing on -------------------------------------------------------------------

    def _pass_events(self, events: list[bytes]) -> None:
        passed: list[bytes] = []
        num_tokens = 0
        is_read = self._path in (CHAT, COMPLETIONS)
        for raw in events:
            if self._is_done:
                break
            if not is_read:
                passed += self._unread(raw)
                continue
            if raw.startswith(DONE):
                self._is_done = True
                passed.append(raw)
                continue
            event = decode_event(raw)
            if event is None:
                passed.append(raw)
                continue
            if event.error_text:
                self._pass(passed, num_tokens)
                if not self._is_over:
                    self._on_error_event(event.error_text)
                return
            try:
                shown = self._shown(raw, event)
            except CannotGoOn as error:
                self._give_up(str(error))
                return
            if shown:
                num_tokens += self._continuation.note(event)
                passed.append(shown)
        self._pass(passed, num_tokens)
        if not (self._told_prompt or self._is_over) and self._continuation.num_prompt_tokens:
            self._told_prompt = True
            self._later(self._tell_prompt)  # tokens first

    def _tell_prompt(self) -> None:
        prompt_ids = self._continuation.prompt_ids()
        self.num_prompt_tokens = len(prompt_ids)
        self._host.on_tokens(self.stream, prompt_ids)

    def _shown(self, raw: bytes, event: Event) -> bytes:
        """Return the event as the client is to see it, b"" if not at all."""
        if event.usage is not None:
            self._usage = event.usage
            if self._hides_usage and not event.choices:
                return b""
        if self._overlap is not None:
            raw = self._overlap.cut(raw)
            if not raw:
                return b""
            event.choices = getattr(decode_event(raw), "choices", event.choices)
        if self._asks_ids and is_empty(event):
            # Sent only because ids are told. Its tokens count all the same.
            self._continuation.note(event)
            return b""
        if self._rest_of is not None or self._overlap is not None:
            raw = self._continuation.as_rest(
                raw,
                self._path,
                is_completion=self._rest_of is not None,
                num_known=self._rest_of or 0,
            )
        return without_ids(raw) if self._asks_ids else raw

    def _unread(self, raw: bytes) -> list[bytes]:
        """Return what of an event of another endpoint can go on: those before a token wait."""
        if raw.startswith(_PREAMBLE) and _IN_BACKGROUND not in raw:
            self._preamble.append(raw)
            return []
        events, self._preamble = [*self._preamble, raw], []
        return events

    def _pass(self, events: list[bytes], num_tokens: int) -> None:
        if not events:
            return
        if num_tokens:
            self.num_output_tokens += num_tokens
            ids = self._continuation.token_ids[-num_tokens:]
            ids = ids if len(ids) == num_tokens else [0] * num_tokens
            self._recorder.add_entry(Entry(0, tuple(ids)), is_streamed=True)
            self._recorder.end_group()
        self._post(b"".join(event + b"\n\n" for event in events))

    def _on_error_event(self, error: bytes) -> None:
        """Take what vLLM says in a stream: of the request, or because the engine has ended."""
        code = code_of(error)
        if not self._has_head and 400 <= code < 500:
            self._status = code
            self._headers = [(b"content-type", b"application/json")]
            self._post(b'{"error":' + error + b"}")
            if not self._is_over:
                self._end(None)
        else:
            self._host.on_call_broken(self, f"it sent an error ({code}) in the reply")
        if self._call is not None:
            self._call.cancel()

    def _post(self, body: bytes) -> None:
        host = self._host
        if not self._has_head:
            self._has_head = True
            host.on_head(Head(self.stream, self._status, self._headers))
            if self._is_over:
                return  # the router has another one answer
        self.has_token = True
        self._credit_bytes -= len(body)
        host.on_data(Data(self.stream, body, self._recorder.take_groups()))
        if self._credit_bytes <= 0 and self._call is not None and not self._is_over:
            self._call.pause()

    def _end(self, error: str | None, *, can_retry: bool = True) -> None:
        self._is_over = True
        usage = None if error is not None or self._status >= 400 else self._counted()
        self._host.on_end(self, End(self.stream, usage, error, can_retry))

    def _counted(self) -> Usage | None:
        """Return what the reply took, as far as it tells."""
        told, continuation = self._usage, self._continuation
        ids = continuation.prompt_ids() + continuation.token_ids if continuation.has_ids else []
        last_block = self._host.last_block(ids) if ids and self._told_prompt else 0
        if told is not None and self._rest_of is None:
            details = told.prompt_tokens_details
            return Usage(
                num_prompt_tokens=told.prompt_tokens or told.input_tokens,
                num_cached_tokens=(details.cached_tokens or 0) if details is not None else 0,
                num_output_tokens=told.completion_tokens or told.output_tokens,
                last_block=last_block,
            )
        if not continuation.num_prompt_tokens:
            return None
        return Usage(
            num_prompt_tokens=continuation.num_prompt_tokens,
            num_output_tokens=continuation.num_tokens,
            last_block=last_block,
        )

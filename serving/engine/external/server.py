r"""What does the gateway have of a server that is not ours? As much as of a connection to ours.

    away --it describes itself--> up --refuses connections, or is dead--> lost: away again
                                  |                                  ^
                                  \--as above, but its streams run--> leaving: no new work

It is looked at (`metrics`) every `poll_s` while it has work, else every half second, and told of
after each look and each token that comes. An answer is a sign of life; that we have sent something
is none. A server that does not answer is silent, and so stale to the router, which takes what is
there elsewhere. A connection that breaks under a request tells of the request or of the server:
the server is asked before anybody judges.
"""

import asyncio
import contextlib
import logging
from typing import Protocol

from router.types import SNAPSHOT_INTERVAL_S
from serving.config.providers import ExternalConfig
from serving.engine.external.blocks import GuessedBlocks
from serving.engine.external.call import ExternalCall
from serving.engine.external.continuation import Continuation
from serving.engine.external.description import (
    DEAD,
    HEARTBEAT_S,
    Described,
    describe_when_up,
    read_key,
)
from serving.engine.external.http_client import Answer, HttpClient, ask
from serving.engine.external.metrics import PATH, PATH_OF_ALL, read_metrics
from serving.engine.external.snapshot import (
    Poll,
    StepPeriods,
    Steps,
    is_prefilled,
    make_snapshot,
)
from serving.stream.client import Connection, StreamEvents
from serving.stream.frames import Ack, Cancel, Data, End, Head, Prompt, Submit, ToEngine

logger = logging.getLogger(__name__)

_HEALTH_TIMEOUT_S = 1.0  # for a server to show that it lives
_POLL_TIMEOUT_S = 10.0  # by then the router has long found it silent


class ExternalEvents(StreamEvents, Protocol):
    """What a server's events are told to: what those of our own engines are told to, and more."""

    def on_leaving(self, client: Connection, *, is_leaving: bool) -> None: ...


class ExternalServer:
    """One server, from when it has described itself. Once lost it is never used again."""

    def __init__(
        self,
        replica_id: str,
        config: ExternalConfig,
        client: HttpClient,
        described: Described,
        events: ExternalEvents,
        window_bytes: int,
    ) -> None:
        self.replica_id = replica_id
        self.config = config
        self.client = client
        self.window_bytes = window_bytes
        self.is_vllm = described.is_vllm
        self.max_model_len = described.info.max_model_len
        self._their_names = described.their_names
        self._info = described.info
        self._events = events
        self._calls: dict[int, ExternalCall] = {}
        self._broken: list[tuple[ExternalCall, str]] = []
        self._judging: asyncio.Task[None] | None = None
        self._is_lost = False
        self._is_leaving = False
        self._key_was_refused = False
        # Its state.
        self._seq = 0
        self._last_booking = 0
        self._num_steps = 0
        self._poll: Poll | None = None
        self._tells_metrics = True
        self._metrics_path = PATH
        self._idle_s = asyncio.get_running_loop().time()  # when it last had nothing of ours
        self._steps = Steps()
        self._periods = StepPeriods()
        self._push_timer: asyncio.TimerHandle | None = None
        self._last_push_s = 0.0
        self._work = asyncio.Event()
        self._blocks = GuessedBlocks(self._info.num_kv_tokens, self._info.block_size)
        self._got_on = False  # something of a reply has come
        self._polling: asyncio.Task[None] | None = None

    @staticmethod
    def check(config: ExternalConfig) -> None:
        """Raise `ConfigError` for a key or a certificate that cannot be read."""
        HttpClient(config, key=read_key(config))

    @classmethod
    async def connect(
        cls, replica_id: str, config: ExternalConfig, events: ExternalEvents, window_bytes: int
    ) -> "ExternalServer":
        """Return the server once it can be used: try until then, and say why it cannot.

        Nothing is told of it before `start`. Raise `ConfigError` for a key or a certificate that
        cannot be read.
        """
        client = HttpClient(config, key=read_key(config))
        try:
            described = await describe_when_up(client, config)
        except BaseException:
            client.close()
            raise
        return cls(replica_id, config, client, described, events, window_bytes)

    def start(self) -> None:
        """Say that it is there, and look at it from now on."""
        self.client.on_received = lambda: self._events.on_received(self)
        self.client.on_all_told = self._on_all_told
        self._polling = asyncio.get_running_loop().create_task(self._keep_polling())
        self._events.on_welcome(self, self._info)

    # --- what the gateway says -----------------------------------------------------

    def post(self, frame: ToEngine) -> None:
        """Take what one of our own engines would take by its connection."""
        if isinstance(frame, Submit):
            self.submit(frame, Continuation())
        elif isinstance(frame, Cancel):
            self._cancel(frame.stream)
        elif isinstance(frame, Ack) and (call := self._calls.get(frame.stream)) is not None:
            call.acknowledge(frame.num_bytes)

    def submit(self, frame: Submit, continuation: Continuation) -> bool:
        """Ask the server. `continuation`: what there is of the reply, or will be.

        Return whether another server could go on with the reply once it has begun.
        """
        call = ExternalCall(self, frame, continuation)
        if frame.stream >= 0:
            self._last_booking = frame.stream
            num_waiting = sum(not each.has_token for each in self._sent())
            if self._poll is not None:
                metrics = self._poll.metrics
                num_waiting = max(num_waiting, metrics.num_waiting)
                call.num_ahead = metrics.num_first_tokens + num_waiting
        self._calls[frame.stream] = call
        call.begin()
        self._work.set()
        return call.can_go_on

    def close(self) -> None:
        """Ask no more, and hang up, once what happens now is over."""
        asyncio.get_running_loop().call_soon(self._lose, "")

    def _cancel(self, stream: int) -> None:
        if (call := self._calls.pop(stream, None)) is not None:
            call.cancel()
            self._on_change()

    def _sent(self) -> list[ExternalCall]:
        return [call for call in self._calls.values() if call.stream >= 0]

    def model_for(self, name: object) -> str | None:
        """Return the server's own name of a model, if it has another one."""
        if not self._their_names:
            return None
        ours, theirs = next(iter(self._their_names.items()))
        return theirs if name in (None, "", ours) else None

    # --- what calls say --------------------------------------------------------------

    def on_tokens(self, stream: int, prompt_ids: list[int]) -> None:
        """Tell of a prompt that was computed, and of what the prefix cache holds by that."""
        hashes = self._blocks.hashes(prompt_ids)
        self._events.on_prompt(self, Prompt(stream, len(prompt_ids), hashes))
        self._use(hashes)

    def last_block(self, token_ids: list[int]) -> int:
        """Return the last block of a prompt and its answer, which are cached; 0 if none."""
        hashes = self._blocks.hashes(token_ids)
        self._use(hashes)
        return hashes[-1] if hashes else 0

    def _use(self, hashes: list[int]) -> None:
        if (update := self._blocks.use(hashes)) is not None:
            self._events.on_blocks(self, update)

    def on_head(self, frame: Head) -> None:
        self._events.on_head(self, frame)

    def on_data(self, frame: Data) -> None:
        self._got_on = True
        self._events.on_data(self, frame)

    def on_end(self, call: ExternalCall, frame: End) -> None:
        self._got_on = True
        self._calls.pop(call.stream, None)
        self._events.on_end(self, frame)
        if self._is_leaving and not self._calls:
            asyncio.get_running_loop().call_soon(self._lose, "it has left")

    def on_key_refused(self, status: int) -> None:
        if not self._key_was_refused:
            logger.error("%s answers %d: its key is not accepted", self.config.url, status)
        self._key_was_refused = True

    def on_call_broken(self, call: ExternalCall, why: str) -> None:
        """Find out whether the server lives before anybody judges."""
        self._broken.append((call, why))
        if self._judging is None:
            self._judging = asyncio.get_running_loop().create_task(self._judge())

    async def _judge(self) -> None:
        try:
            why = await self._why_dead()
        finally:
            self._judging = None
        if why:
            self._lose(why)
            return
        broken, self._broken = self._broken, []
        for call, reason in broken:
            call.fail(reason)

    async def _why_dead(self) -> str:
        """Return why the server cannot go on; "" if it can."""
        try:
            answer = await ask(self.client, "/health", _HEALTH_TIMEOUT_S)
        except ConnectionError as error:
            return str(error)
        except TimeoutError:
            return f"/health is not answered within {_HEALTH_TIMEOUT_S:g} s"
        return f"/health answers {answer.status}" if answer.status in DEAD else ""

    def _lose(self, why: str) -> None:
        """Give the server up; whoever has the members connects again when it is back."""
        if self._is_lost:
            return
        self._is_lost = True
        if why:
            logger.warning("%s is lost: %s", self.config.url, why)
        if self._polling is not None and self._polling is not asyncio.current_task():
            self._polling.cancel()
        if self._judging is not None and self._judging is not asyncio.current_task():
            self._judging.cancel()
        if self._push_timer is not None:
            self._push_timer.cancel()
        calls, self._calls = self._calls, {}
        self._broken = []
        for call in calls.values():
            call.cancel()
        self.client.close()
        self._events.on_lost(self)

    # --- its state -------------------------------------------------------------------

    def _on_all_told(self) -> None:
        """Take what came for a step: that is how often tokens of streams come."""
        if self._got_on:
            self._got_on = False
            self._num_steps += 1
            self._on_change()
        self._events.on_all_told(self)

    def _on_change(self) -> None:
        """Tell its state, now or soon."""
        if self._is_lost:
            return
        loop = asyncio.get_running_loop()
        if not self._sent():
            self._idle_s = loop.time()
        due_s = self._last_push_s + SNAPSHOT_INTERVAL_S - loop.time()
        if self._push_timer is None:
            self._push_timer = loop.call_later(max(0.0, due_s), self._push_snapshot)

    def _push_snapshot(self) -> None:
        if self._push_timer is not None:
            self._push_timer.cancel()
            self._push_timer = None
        if self._is_lost:
            return
        self._last_push_s = now_s = asyncio.get_running_loop().time()
        self._seq += 1
        steps, self._steps = self._steps, Steps()
        snapshot = make_snapshot(
            self._info,
            self._sent(),
            self._poll,
            seq=self._seq,
            last_booking=self._last_booking,
            num_steps=self._num_steps,
            steps=steps,
            now_s=now_s,
        )
        self._events.on_snapshot(self, snapshot)

    async def _keep_polling(self) -> None:
        try:
            while not self._is_lost:
                await self._look()
                period_s = self.config.poll_s if self._calls else HEARTBEAT_S
                self._work.clear()
                with contextlib.suppress(TimeoutError):
                    if self._calls:
                        await asyncio.sleep(period_s)
                    else:
                        async with asyncio.timeout(period_s):
                            await self._work.wait()  # its state will soon change
                            await asyncio.sleep(self.config.poll_s)
        except Exception:
            logger.exception("%s cannot be looked at", self.config.url)
            self._lose("its state cannot be told")

    async def _look(self) -> None:
        """Look at its metrics, or whether it answers at all where it has none."""
        loop = asyncio.get_running_loop()
        asked_s = loop.time()
        num_before = len(self._sent())
        path = self._metrics_path if self._tells_metrics else "/health"
        try:
            answer = await ask(self.client, path, _POLL_TIMEOUT_S)
        except TimeoutError:
            return  # it is silent
        except ConnectionError as error:
            self._on_refused(str(error))
            return
        if self._is_leaving:
            self._is_leaving = False
            self._events.on_leaving(self, is_leaving=False)
        if not self._tells_metrics:
            if answer.status in DEAD:
                self._lose(f"/health answers {answer.status}")
                return
            self._num_steps += 1  # nothing tells whether it gets on: that it answers has to do
        elif not self._take_in(answer, asked_s, num_before):
            await self._look()
            return
        self._push_snapshot()

    def _take_in(self, answer: Answer, asked_s: float, num_before: int) -> bool:
        """Take in an answer of the metrics. Return False if it was none, and what is next tried."""
        text = answer.body.decode(errors="replace") if answer.status == 200 else ""
        metrics = read_metrics(text)
        if metrics is None:
            if self._metrics_path == PATH:
                self._metrics_path = PATH_OF_ALL
            else:
                self._tells_metrics = False
                logger.warning(
                    "%s tells no metrics of vLLM: its load is what we have sent there",
                    self.config.url,
                )
            return False
        now_s = asyncio.get_running_loop().time()
        sent = self._sent()
        if not sent:
            self._idle_s = now_s
        before = self._poll
        known = sum(each.sent_s <= asked_s for each in sent)
        num_others = max(0, metrics.num_running + metrics.num_waiting - max(known, num_before))
        was_busy = before is not None and self._idle_s < before.asked_s and bool(sent)
        self._poll = Poll(metrics, asked_s, now_s, num_others, was_busy)
        is_prefilling = metrics.num_waiting > 0 or not all(
            is_prefilled(each, self._poll, now_s) for each in sent
        )
        steps = self._periods.add(self._poll, is_prefilling=is_prefilling)
        if steps.step_s:
            self._steps = steps
        if before is not None and metrics.num_steps != before.metrics.num_steps:
            self._num_steps += 1
        return True

    def _on_refused(self, why: str) -> None:
        """Leave a server that takes no connections; what it still sends may end."""
        if not self._calls:
            self._lose(why)
        elif not self._is_leaving:
            self._is_leaving = True
            logger.warning("%s gets no new requests: %s", self.config.url, why)
            self._events.on_leaving(self, is_leaving=True)

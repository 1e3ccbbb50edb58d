"""Which blocks has a step added to an emulated engine's prefix cache, and which removed?

Published over ZMQ as by vLLM 0.32, for routers that track each engine's prefix cache. Wire format
and settings are those of vLLM's `--kv-events-config` (vllm/distributed/kv_events.py): a PUB socket
with one message per step, [topic, number of the batch, batch], and a ROUTER socket that resends
past batches from a number on. Importing vLLM for it would cost each emulated engine seconds and
hundreds of megabytes; pyzmq comes with it.

Blocks are those of prompts; blocks of replies are not published, for no later request finds them.
Without a tokenizer the ids of text tokens are checksums of their text: a router with token ids of
its own finds prompts only where clients send ids.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Literal

import msgspec
import zmq
import zmq.asyncio

from router.fleet.block_log import BlockLog
from serving.engine.emulated.text import Prompt

_END = (-1).to_bytes(8, "big", signed=True)  # the number that ends a replay
_MEDIUM = "GPU"


class KvEventsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's settings by vLLM's names. Batches are sent at once, so none queue here."""

    enable_kv_cache_events: bool = False
    publisher: Literal["null", "zmq"] | None = None  # unset: zmq if enabled
    endpoint: str = "tcp://*:5557"  # bound if it has a wildcard, else connected to
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000  # batches kept for replay
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""

    @property
    def is_on(self) -> bool:
        """Whether events are published at all."""
        return self.enable_kv_cache_events and self.publisher != "null"


class BlockStored(msgspec.Struct, tag=True, omit_defaults=True):
    """Successive blocks of a prompt that can be found from now on."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str
    lora_name: str | None
    extra_keys: None = None
    group_idx: int | None = None


class BlockRemoved(msgspec.Struct, tag=True, omit_defaults=True):
    """Blocks that are no longer cached."""

    block_hashes: list[int]
    medium: str
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    """No block is cached any more."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, array_like=True):
    """The changes of one step, in order."""

    ts: float  # Unix time
    events: list[Event]
    data_parallel_rank: int = 0


class _Block:
    """A block's content, kept while it is cached or a request's prompt has it."""

    __slots__ = ("num_requests", "parent", "token_ids")

    def __init__(self, parent: int | None, token_ids: list[int]) -> None:
        self.parent = parent  # the hash of the block before it
        self.token_ids = token_ids
        self.num_requests = 0


class KvEvents:
    """Collects every step's changes to one engine's prefix cache.

    The caller adds a request before the end of the first step that can store its blocks, removes
    it when it has ended, and collects the events after each step.
    """

    def __init__(self, log: BlockLog, block_size: int) -> None:
        self._log = log
        self._block_size = block_size
        self._position = log.position
        self._blocks: dict[int, _Block] = {}
        self._cached: set[int] = set()
        self._ended: list[Sequence[int]] = []

    def add_request(self, prompt: Prompt, hashes: Sequence[int]) -> None:
        """Keep the content of a request's prompt; `hashes` are those of its whole blocks."""
        size, parent = self._block_size, None
        for index, block_hash in enumerate(hashes):
            block = self._blocks.get(block_hash)
            if block is None:
                token_ids = prompt.token_ids(index * size, (index + 1) * size)
                block = self._blocks[block_hash] = _Block(parent, token_ids)
            block.num_requests += 1
            parent = block_hash

    def remove_request(self, hashes: Sequence[int]) -> None:
        """Drop an ended request's content after the step, whose end may still store blocks."""
        self._ended.append(hashes)

    def collect_events(self) -> list[Event]:
        """Return the changes since the last call."""
        update = self._log.since(self._position)
        events: list[Event] = []
        removed: list[int] = []
        if update is not None:
            self._position = update.until
            if update.since < 0:  # more than the log remembers
                removed = list(self._cached.difference(update.stored))
                self._cached.clear()
                events.append(AllBlocksCleared())
            elif removed := [each for each in update.removed if each in self._cached]:
                self._cached.difference_update(removed)
                events.append(BlockRemoved(removed, _MEDIUM, group_idx=0))
            new = [each for each in update.stored if each not in self._cached]
            self._cached.update(new)
            events += self._stored_events(new)
        self._drop_unused_blocks(removed)
        return events

    def _stored_events(self, hashes: Sequence[int]) -> list[Event]:
        """Return one event for each run of successive blocks, in the log's order."""
        events: list[Event] = []
        run: BlockStored | None = None
        for block_hash in hashes:
            block = self._blocks[block_hash]
            if run is None or block.parent != run.block_hashes[-1]:
                size = self._block_size
                run = BlockStored([], block.parent, [], size, None, _MEDIUM, None, group_idx=0)
                events.append(run)
            run.block_hashes.append(block_hash)
            run.token_ids += block.token_ids
        return events

    def _drop_unused_blocks(self, removed: Sequence[int]) -> None:
        """Drop the content of blocks that are neither cached nor part of a request's prompt."""
        ended, self._ended = self._ended, []
        for hashes in ended:
            for block_hash in hashes:
                self._blocks[block_hash].num_requests -= 1
        for block_hash in {*removed, *(each for hashes in ended for each in hashes)}:
            if not self._blocks[block_hash].num_requests and block_hash not in self._cached:
                del self._blocks[block_hash]


class KvEventPublisher:
    """Publishes the events on sockets. Created, used and closed on a running event loop."""

    def __init__(self, events: KvEvents, config: KvEventsConfig) -> None:
        """Open the sockets. Raises `zmq.ZMQError` where an endpoint is not available."""
        self._events = events
        self._topic = config.topic.encode()
        self._encode = msgspec.msgpack.Encoder().encode
        self._num_batches = 0
        self._past: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._context = zmq.asyncio.Context()
        # Publishing never waits: messages for a subscriber with a full queue are dropped.
        self._publisher = zmq.Socket(self._context, zmq.PUB)
        self._replays: asyncio.Task[None] | None = None
        try:
            self._publisher.set_hwm(config.hwm)
            is_local = config.endpoint.startswith(("ipc://", "inproc://"))
            if is_local or "*" in config.endpoint or "::" in config.endpoint:
                self._publisher.bind(config.endpoint)
            else:
                self._publisher.connect(config.endpoint)
            if config.replay_endpoint is not None:
                router = self._context.socket(zmq.ROUTER)
                router.bind(config.replay_endpoint)
                self._replays = asyncio.get_running_loop().create_task(self._replay(router))
        except BaseException:
            self.close()
            raise

    def on_step(self) -> None:
        """Publish the step's changes, if there are any."""
        if events := self._events.collect_events():
            number = self._num_batches.to_bytes(8, "big")
            batch = self._encode(Batch(time.time(), events))
            self._num_batches += 1
            self._past.append((number, batch))
            self._publisher.send_multipart((self._topic, number, batch))

    def close(self) -> None:
        """Close the sockets; unsent messages are lost."""
        if self._replays is not None:
            self._replays.cancel()
        self._publisher.close(linger=0)
        self._context.destroy(linger=0)

    async def _replay(self, router: zmq.asyncio.Socket) -> None:
        """Answer requests for all kept batches from a number on."""
        while True:
            frames = await router.recv_multipart()
            if len(frames) != 3:
                continue  # not a request
            client, _, first = frames
            for number, batch in list(self._past):
                if number >= first:  # both 8 bytes, big end first
                    await router.send_multipart((client, b"", self._topic, number, batch))
            await router.send_multipart((client, b"", b"", _END, b""))

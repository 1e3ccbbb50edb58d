"""KV events of an emulated engine over ZMQ, as vLLM 0.32 publishes them.

For routers that follow what each engine's prefix cache holds. Wire format and
settings are those of vLLM's `--kv-events-config` (vllm/distributed/kv_events.py):
a PUB socket with one message per step, [topic, number of the batch, batch], and
a ROUTER socket that sends past batches anew from a number on. Importing vLLM
itself for it would cost each emulated engine seconds and hundreds of megabytes;
pyzmq comes with it.

Blocks are those of prompts; what a reply adds is not told, for it is not found
again here. The ids of text tokens are checksums of their text, there being no
tokenizer: a router that knows prompts by ids of its own finds them only where
clients send ids.
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
    """Blocks, one after the other in a prompt, that can be found from now on."""

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
    """Blocks that are not there any more."""

    block_hashes: list[int]
    medium: str
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True):
    """Nothing is cached any more."""


Event = BlockStored | BlockRemoved | AllBlocksCleared


class Batch(msgspec.Struct, array_like=True):
    """The changes of one step, in their order."""

    ts: float  # Unix time
    events: list[Event]
    data_parallel_rank: int = 0


class _Block:
    """What a hash stands for, known while a request that has it is here or it is cached."""

    __slots__ = ("num_requests", "parent", "token_ids")

    def __init__(self, parent: int | None, token_ids: list[int]) -> None:
        self.parent = parent  # the hash of the block before it
        self.token_ids = token_ids
        self.num_requests = 0


class KvEvents:
    """Tells of every step's changes to one engine's prefix cache.

    `enter` every prompt before a step ends that can store its blocks, `leave` when its
    request is over, and `take` after each step.
    """

    def __init__(self, log: BlockLog, block_size: int) -> None:
        self._log = log
        self._block_size = block_size
        self._position = log.position
        self._blocks: dict[int, _Block] = {}
        self._cached: set[int] = set()
        self._left: list[Sequence[int]] = []

    def add_request(self, prompt: Prompt, hashes: Sequence[int]) -> None:
        """A request with this prompt has come; `hashes` are those of its whole blocks."""
        size, parent = self._block_size, None
        for index, block_hash in enumerate(hashes):
            block = self._blocks.get(block_hash)
            if block is None:
                token_ids = prompt.token_ids(index * size, (index + 1) * size)
                block = self._blocks[block_hash] = _Block(parent, token_ids)
            block.num_requests += 1
            parent = block_hash

    def remove_request(self, hashes: Sequence[int]) -> None:
        """A request is over. Its last blocks may be stored as late as the step's end."""
        self._left.append(hashes)

    def collect_events(self) -> list[Event]:
        """Return what has changed since the last call."""
        update = self._log.since(self._position)
        events: list[Event] = []
        gone: list[int] = []
        if update is not None:
            self._position = update.until
            if update.since < 0:  # more than the log remembers
                gone = list(self._cached.difference(update.stored))
                self._cached.clear()
                events.append(AllBlocksCleared())
            elif gone := [each for each in update.removed if each in self._cached]:
                self._cached.difference_update(gone)
                events.append(BlockRemoved(gone, _MEDIUM, group_idx=0))
            new = [each for each in update.stored if each not in self._cached]
            self._cached.update(new)
            events += self._stored(new)
        self._forget(gone)
        return events

    def _stored(self, hashes: Sequence[int]) -> list[Event]:
        """One event for each run of blocks that follow each other, as the log has them."""
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

    def _forget(self, gone: Sequence[int]) -> None:
        """Drop what is neither cached nor any request's."""
        left, self._left = self._left, []
        for hashes in left:
            for block_hash in hashes:
                self._blocks[block_hash].num_requests -= 1
        for block_hash in {*gone, *(each for hashes in left for each in hashes)}:
            if not self._blocks[block_hash].num_requests and block_hash not in self._cached:
                del self._blocks[block_hash]


class KvEventPublisher:
    """The sockets. To be made, used and closed on a running event loop."""

    def __init__(self, events: KvEvents, config: KvEventsConfig) -> None:
        """Raises `zmq.ZMQError` where an endpoint cannot be had."""
        self._events = events
        self._topic = config.topic.encode()
        self._encode = msgspec.msgpack.Encoder().encode
        self._num_batches = 0
        self._past: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._context = zmq.asyncio.Context()
        # Publishing never waits: what a subscriber has no room for is dropped.
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
        """Publish what the step has changed, if anything."""
        if events := self._events.collect_events():
            number = self._num_batches.to_bytes(8, "big")
            batch = self._encode(Batch(time.time(), events))
            self._num_batches += 1
            self._past.append((number, batch))
            self._publisher.send_multipart((self._topic, number, batch))

    def close(self) -> None:
        """Close the sockets; what is not sent yet is lost."""
        if self._replays is not None:
            self._replays.cancel()
        self._publisher.close(linger=0)
        self._context.destroy(linger=0)

    async def _replay(self, router: zmq.asyncio.Socket) -> None:
        """Answer whoever asks for all batches from a number on."""
        while True:
            frames = await router.recv_multipart()
            if len(frames) != 3:
                continue  # not a request
            client, _, first = frames
            for number, batch in list(self._past):
                if number >= first:  # both 8 bytes, big end first
                    await router.send_multipart((client, b"", self._topic, number, batch))
            await router.send_multipart((client, b"", b"", _END, b""))

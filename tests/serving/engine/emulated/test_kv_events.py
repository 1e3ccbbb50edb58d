"""KV events of the emulated server, read with vLLM's own classes."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from benchmarks.peers.emulated_server import serve
from router.simulation.engine.profile import Profile
from serving.capacity.profiles import save_profile
from serving.capacity.service import free_ports
from serving.engine.emulated.engine import EmulatedArgs, EmulatedEngine
from serving.engine.emulated.kv_events import KvEventPublisher, KvEvents, KvEventsConfig
from serving.engine.emulated.text import Prompt
from tests.support.asgi_caller import Caller

kv_events = pytest.importorskip("vllm.distributed.kv_events")

BLOCK = 16
END = (-1).to_bytes(8, "big", signed=True)


def make_engine(folder: Path, num_kv_tokens: int) -> EmulatedEngine:
    path = folder / "small.yaml"
    profile = Profile(
        name="small",
        model="small",
        device="none",
        source="made up",
        max_model_len=1000,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        num_kv_tokens=num_kv_tokens,
        block_size=BLOCK,
        base_s=0.001,
        s_per_token=1e-6,
    )
    save_profile(profile, path)
    return EmulatedEngine(EmulatedArgs(profile=str(path)))


class Follower:
    """Knows what is cached from the events alone, as a router does."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.events: list[Any] = []
        self.chains: dict[int, tuple[int, ...]] = {}  # by hash: all tokens up to the block's end
        self._decode = msgspec.msgpack.Decoder(kv_events.KVEventBatch).decode

    def read(self, frames: Sequence[bytes]) -> None:
        topic, number, payload = frames
        assert topic == b"kv-events"
        self.numbers.append(int.from_bytes(number, "big"))
        batch = self._decode(payload)
        assert batch.ts > 0.0
        assert batch.data_parallel_rank == 0
        for event in batch.events:
            self.events.append(event)
            if isinstance(event, kv_events.BlockStored):
                self._store(event)
            elif isinstance(event, kv_events.BlockRemoved):
                assert event.medium == kv_events.MEDIUM_GPU
                for block_hash in event.block_hashes:
                    del self.chains[block_hash]
            else:
                self.chains.clear()

    def _store(self, event: Any) -> None:
        assert (event.block_size, event.medium) == (BLOCK, kv_events.MEDIUM_GPU)
        assert len(event.token_ids) == BLOCK * len(event.block_hashes)
        parent = event.parent_block_hash
        tokens = () if parent is None else self.chains[parent]
        for index, block_hash in enumerate(event.block_hashes):
            tokens += tuple(event.token_ids[index * BLOCK : (index + 1) * BLOCK])
            assert block_hash not in self.chains
            self.chains[block_hash] = tokens


@asynccontextmanager
async def followed(engine: EmulatedEngine) -> AsyncIterator[tuple[Follower, list[str], Any]]:
    """The engine with a publisher, and a follower who has heard everything so far."""
    endpoints = [f"tcp://127.0.0.1:{port}" for port in free_ports(2)]
    config = KvEventsConfig(
        enable_kv_cache_events=True,
        endpoint=endpoints[0].replace("127.0.0.1", "*"),
        replay_endpoint=endpoints[1],
        topic="kv-events",
    )
    engine.kv_events = KvEvents(engine.blocks, engine.info.block_size)
    publisher = KvEventPublisher(engine.kv_events, config)
    engine.subscribe(publisher.on_step)
    context = zmq.asyncio.Context()
    subscriber = context.socket(zmq.SUB)
    subscriber.subscribe(b"kv-events")
    monitor = subscriber.get_monitor_socket(zmq.Event.HANDSHAKE_SUCCEEDED)
    subscriber.connect(endpoints[0])
    follower = Follower()

    async def hear() -> None:
        while await subscriber.poll(200):
            follower.read(await subscriber.recv_multipart())

    await recv_monitor_message(monitor)
    await asyncio.sleep(0.2)  # the subscription goes after it, and is not acknowledged
    try:
        yield follower, endpoints, hear
    finally:
        context.destroy(linger=0)
        publisher.close()


async def ask(engine: EmulatedEngine, prompt: str | list[int], num_tokens: int = 3) -> None:
    body = {"prompt": prompt, "max_tokens": num_tokens}
    caller = await Caller(engine.app, body, "/v1/completions").run()
    assert caller.status == 200


async def test_tells_of_blocks_by_their_tokens(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, num_kv_tokens=2000)
    async with followed(engine) as (follower, _, hear):
        ids = list(range(100, 150))
        await ask(engine, ids)
        await hear()
        assert max(follower.chains.values(), key=len) == tuple(ids[:48])
        await ask(engine, [*ids[:32], *range(900, 940)])  # shares two blocks
        await hear()
        last = follower.events[-1]
        assert follower.chains[last.parent_block_hash][:32] == tuple(ids[:32])
        await ask(engine, "some words " * 30)
        await hear()
        tokens = Prompt.of_text("some words " * 30).token_ids(0, 48)
        assert tuple(tokens) in follower.chains.values()
        assert set(follower.chains) == set(engine.blocks.since(-1).stored)
        assert follower.numbers == list(range(len(follower.numbers)))


async def test_follows_through_evictions_and_clients_that_leave(tmp_path: Path) -> None:
    """What the events add up to is what the cache holds, and nothing is kept of the rest."""
    engine = make_engine(tmp_path, num_kv_tokens=1008)
    async with followed(engine) as (follower, _, hear):

        async def one(number: int) -> None:
            prompt = [number % 7] * 40 + list(range(number, number + 30 + number % 5 * 40))
            task = asyncio.create_task(ask(engine, prompt, 2 + number % 9))
            if number % 6 == 0:
                await asyncio.sleep(0.004)
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        for start in range(0, 60, 6):
            await asyncio.gather(*(one(number) for number in range(start, start + 6)))
        await ask(engine, [1, 2, 3])  # its step drops the content of the requests that have ended
        await hear()
        assert any(isinstance(event, kv_events.BlockRemoved) for event in follower.events)
        held = set(engine.blocks.since(-1).stored)
        assert set(follower.chains) == held
        assert engine.kv_events is not None
        assert set(engine.kv_events._blocks) == held


async def test_replays_from_a_number(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, num_kv_tokens=2000)
    async with followed(engine) as (follower, endpoints, hear):
        for number in range(4):
            await ask(engine, list(range(number, number + 40)))
        await hear()
        context = zmq.asyncio.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.connect(endpoints[1])
        await dealer.send_multipart((b"", (2).to_bytes(8, "big")))
        late = Follower()
        while (frames := await asyncio.wait_for(dealer.recv_multipart(), 5))[2] != END:
            assert frames[0] == b""
            late.read(frames[1:])
        assert frames == [b"", b"", END, b""]
        assert late.numbers == follower.numbers[2:]
        context.destroy(linger=0)


def test_settings_are_vllms() -> None:
    from vllm.config import KVEventsConfig as Theirs

    theirs, ours = Theirs(), KvEventsConfig()
    for name in ours.__struct_fields__:
        if name != "publisher":
            assert getattr(theirs, name) == getattr(ours, name)
    assert not ours.is_on
    assert KvEventsConfig(enable_kv_cache_events=True).is_on
    assert not KvEventsConfig(enable_kv_cache_events=True, publisher="null").is_on


def test_bad_settings_name_the_option() -> None:
    import typer

    with pytest.raises(typer.BadParameter) as caught:
        serve(port=1, kv_events_config='{"endpint": "tcp://*:1"}')
    assert caught.value.param_hint == "--kv-events-config"
    assert "endpint" in str(caught.value)

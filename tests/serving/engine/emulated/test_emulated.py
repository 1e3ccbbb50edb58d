"""The emulated engine through its ASGI application, and behind the real gateway."""

import asyncio
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from router.simulation.engine.profile import Profile
from serving.capacity.profiles import save_profile
from serving.config import ConfigError, parse
from serving.engine.emulated.engine import EmulatedArgs, EmulatedEngine
from serving.engine.emulated.text import Prompt
from serving.stream.accounting import RequestAccounting, current_accounting
from serving.stream.server import StreamServer
from tests.support.asgi_caller import Caller
from tests.support.running_gateway import CHAT, System, running

COMPLETIONS = "/v1/completions"


@pytest.fixture
def profile(tmp_path: Path) -> str:
    """A fast small engine: a step of 2 ms, chunks of 64 tokens."""
    path = tmp_path / "small.yaml"
    profile = Profile(
        name="small",
        model="small",
        device="none",
        source="made up",
        max_model_len=2000,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        num_kv_tokens=4000,
        base_s=0.002,
        s_per_token=1e-6,
    )
    save_profile(profile, path)
    return str(path)


def make_engine(profile: str, **args: Any) -> EmulatedEngine:
    return EmulatedEngine(EmulatedArgs(profile=profile, **args))


async def ask(engine: EmulatedEngine, **body: Any) -> Any:
    return (await Caller(engine.app, {"max_tokens": 5, **body}, COMPLETIONS).run()).body


async def test_a_chat_streams_as_vllm_writes_it(profile: str) -> None:
    body = {
        "messages": [{"role": "user", "content": "a " * 100}],
        "max_completion_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    caller = await Caller(make_engine(profile).app, body, CHAT).run()
    role, *tokens, usage = caller.events
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    text = "".join(token["choices"][0]["delta"]["content"] for token in tokens)
    assert [word.partition(".")[2] for word in text.split()] == ["1", "2", "3", "4"]
    assert [token["choices"][0]["finish_reason"] for token in tokens][-1] == "length"
    assert usage["usage"]["completion_tokens"] == 4
    assert usage["usage"]["prompt_tokens"] > 100
    assert len({event["id"] for event in caller.events}) == 1


async def test_the_same_prompt_says_the_same_on_every_engine(profile: str) -> None:
    first, second = make_engine(profile), make_engine(profile, seed=9)
    replies = [await ask(engine, prompt="tell me", max_tokens=9) for engine in (first, second)]
    texts = [reply["choices"][0]["text"] for reply in replies]
    assert texts[0] == texts[1]
    other = await ask(first, prompt="tell him", max_tokens=9)
    assert other["choices"][0]["text"] != texts[0]


@pytest.mark.parametrize("chat", [False, True])
async def test_a_reply_that_broke_off_goes_on(profile: str, chat: bool) -> None:
    engine = make_engine(profile)
    path = CHAT if chat else COMPLETIONS

    async def text(num_tokens: int, sent: str = "") -> str:
        body: dict[str, Any] = {"max_tokens": num_tokens}
        if chat:
            body["messages"] = [{"role": "user", "content": "tell me"}]
            if sent:
                body["messages"].append({"role": "assistant", "content": sent})
                body["continue_final_message"] = True
        else:
            body["prompt"] = "tell me" + sent
        choice = (await Caller(engine.app, body, path).run()).body["choices"][0]
        return choice["message"]["content"] if chat else choice["text"]

    whole = await text(12)
    start = await text(5)
    assert whole == start + await text(7, start)


def test_token_ids_go_on_too() -> None:
    prompt = Prompt([1, 2, 3])
    rest = Prompt([1, 2, 3, *map(prompt.reply_id, range(1, 6))])
    assert rest.word(0)(1) == prompt.word(0)(6)
    assert rest.reply_id(1) == prompt.reply_id(6)


def test_hashes_chain() -> None:
    first, second = Prompt.of_text("a b c d e f g h i"), Prompt.of_text("a b c d x f g h i")
    assert len(first.hashes(4)) == 2
    assert first.hashes(4)[0] == second.hashes(4)[0]
    assert first.hashes(4)[1] != second.hashes(4)[1]
    with pytest.raises(ValueError, match="empty"):
        Prompt.of_text("")


async def test_a_shared_prefix_is_cached_and_told(profile: str) -> None:
    engine = make_engine(profile)
    accounting = RequestAccounting(num_prompt_tokens=5)
    start = "word " * 64
    await ask(engine, prompt=start + "one")
    current_accounting.set(accounting)
    reply = await ask(engine, prompt=start + "two")
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 64}
    usage = accounting.usage()
    assert usage is not None
    assert (usage.num_prompt_tokens, usage.num_cached_tokens, usage.num_output_tokens) == (
        65,
        64,
        5,
    )


async def test_tells_which_blocks_are_cached(profile: str) -> None:
    """All that a prompt's hashes name while they are cached, and their end when they are not."""
    engine = make_engine(profile)
    accounting = RequestAccounting(num_prompt_tokens=5)
    reported: list[tuple[int, list[int]]] = []
    accounting.on_prompt = lambda num_tokens, hashes: reported.append((num_tokens, hashes))
    current_accounting.set(accounting)
    await ask(engine, prompt=("one " * 100).strip(), n=2)
    ((num_tokens, hashes),) = reported
    assert (num_tokens, len(hashes)) == (100, 100 // 16)
    update = engine.blocks.since(0)
    assert update is not None
    assert set(update.stored) == set(hashes)
    current_accounting.set(None)
    for number in range(5):
        await ask(engine, prompt=f"{number} " * 1000, max_tokens=1)
    update = engine.blocks.since(update.until)
    assert update is not None
    assert set(hashes) <= set(update.removed)
    held = {key for key in engine.model.scheduler.kv._found if isinstance(key, int)}
    assert set(engine.blocks.since(-1).stored) == held


async def test_several_choices(profile: str) -> None:
    reply = await ask(make_engine(profile), prompt="tell me", n=3)
    texts = [choice["text"] for choice in reply["choices"]]
    assert len(set(texts)) == 3
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert reply["usage"]["completion_tokens"] == 15
    body = {"prompt": "tell me", "n": 3, "max_tokens": 5, "stream": True}
    caller = await Caller(make_engine(profile).app, body, COMPLETIONS).run()
    streamed = ["", "", ""]
    for event in caller.events:
        streamed[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert streamed == texts


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompt": ""}, 400),
        ({}, 400),
        ({"prompt": "a", "max_tokens": 0}, 400),
        ({"prompt": "a", "max_tokens": "many"}, 400),
        ({"prompt": "a " * 2000}, 400),
        ({"prompt": "a", "model": "other"}, 404),
    ],
)
async def test_bad_requests(profile: str, body: dict, status: int) -> None:
    engine = make_engine(profile)
    caller = await Caller(engine.app, body, COMPLETIONS).run()
    assert caller.status == status
    assert caller.body["error"]["message"]
    assert engine.snapshot(1, []).num_inflight_reqs == 0


async def test_a_client_that_leaves_frees_everything(profile: str) -> None:
    engine = make_engine(profile)
    body = {"prompt": "a " * 50, "max_tokens": 1000, "stream": True}
    caller = Caller(engine.app, body, COMPLETIONS)
    task = asyncio.create_task(caller.run())
    while len(caller.parts) < 3:
        await asyncio.sleep(0.002)
    caller.leave()
    await asyncio.wait_for(task, 1)
    await asyncio.sleep(0.01)
    assert engine.model.scheduler.kv.num_used == 0
    assert engine.model.end_s is None


async def test_time_is_the_models(profile: str) -> None:
    """150 prompt tokens are three steps, 50 output tokens 49 more, of 2 ms each."""
    engine = make_engine(profile, itl_target_s=None)
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    await ask(engine, prompt="a " * 150, max_tokens=50)
    elapsed_ms = round((loop.time() - start_s) * 1e3)  # the loop's clock counts whole ones
    assert engine.model.num_steps_total == 150 // 64 + 1 + 49
    assert elapsed_ms >= 52 * 2


async def test_metrics_by_vllms_names(profile: str) -> None:
    engine = make_engine(profile)
    await ask(engine, prompt="a b c", max_tokens=7)
    caller = await Caller(engine.app, {}, "/metrics").run()
    samples = {
        sample.name: (sample.labels, sample.value)
        for family in text_string_to_metric_families(b"".join(caller.parts).decode())
        for sample in family.samples
    }
    labels = {"model_name": "small", "engine": "0"}
    assert samples["vllm:generation_tokens_total"] == (labels, 7)
    assert samples["vllm:prompt_tokens_total"] == (labels, 3)
    assert samples["vllm:num_requests_running"] == (labels, 0)
    assert samples["vllm:kv_cache_usage_perc"] == (labels, 0)


def test_bad_engine_args_name_the_key() -> None:
    for args, key in (({"profil": "x"}, "profil"), ({"profile": "h1000"}, "h1000")):
        config = parse({"engine": {"args": args}})
        with pytest.raises(ConfigError, match=rf"engine\.args.*{key}"):
            asyncio.run(EmulatedEngine.start(config, _Plan(), 0))


async def test_it_answers_to_all_its_names(profile: str) -> None:
    engine = EmulatedEngine(EmulatedArgs(profile=profile), "one", 0, ("two",))
    for name, status in (("one", 200), ("two", 200), ("three", 404)):
        body = {"model": name, "prompt": "hi", "max_tokens": 1}
        assert (await Caller(engine.app, body, COMPLETIONS).run()).status == status
    await engine.shutdown()


def test_one_word_in_a_deploy_file_is_enough() -> None:
    module, _, name = parse({"engine": "emulated"}).engine.factory.partition(":")
    assert getattr(importlib.import_module(module), name) is EmulatedEngine


class _Plan:
    served_model_name = "emulated"
    aliases = ("also",)


async def add(system: System, engine: EmulatedEngine) -> None:
    server = StreamServer(engine, system.gateway.config.gateway.stream_window_bytes)
    host, port = await server.listen("127.0.0.1")
    system.servers.append(server)
    system.members[f"e{port}"] = {"host": host, "port": port, "secret": server.secret}
    system.gateway.driver.engines.set_members(system.members)
    count = len(system.members)
    await system.until(lambda: len(system.gateway.driver.engines.infos) == count)


async def test_behind_the_real_gateway(profile: str) -> None:
    """Many streams over two engines: whole texts, true usage, nothing left."""
    async with running(num_engines=0) as system:
        engines = [EmulatedEngine(EmulatedArgs(profile=profile), rank=rank) for rank in range(2)]
        for engine in engines:
            await add(system, engine)

        async def one(number: int) -> None:
            prompt = f"question {number} " * (number % 7 + 1) * 5
            body = {"prompt": prompt, "max_tokens": 10 + number % 5, "stream": True}
            reply = await system.client.post(COMPLETIONS, json=body)
            events = [json.loads(line[6:]) for line in reply.text.split("\n\n")[:-2]]
            text = "".join(event["choices"][0]["text"] for event in events)
            word = Prompt.of_text(prompt).word(0)
            assert text.encode() == b"".join(map(word, range(1, body["max_tokens"] + 1)))

        await asyncio.gather(*(one(number) for number in range(40)))
        assert all(engine.model.num_output_tokens_total > 50 for engine in engines)
        assert sum(engine.model.num_output_tokens_total for engine in engines) == 40 * 12
        assert system.outcomes["completed"] == 40
        await system.until(lambda: not system.num_engine_streams)
        system.assert_empty()
        state = system.gateway.state().replicas
        assert all(replica.snapshot.num_steps_total for replica in state.values())


@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_lost_under_a_reply_is_not_noticed(profile: str, stream: bool) -> None:
    """The other engine goes on where the first one ended, and computes only the rest."""
    async with running(num_engines=0) as system:
        engines = [EmulatedEngine(EmulatedArgs(profile=profile), rank=rank) for rank in range(2)]
        for engine in engines:
            await add(system, engine)
        body = {"prompt": "tell me", "max_tokens": 300, "stream": stream}
        task = asyncio.create_task(system.client.post(COMPLETIONS, json=body))
        await system.until(
            lambda: any(engine.model.num_output_tokens_total > 100 for engine in engines)
        )
        (first,) = (i for i, server in enumerate(system.servers) if server.num_streams)
        system.servers[first].close()
        reply = await task
        assert reply.status_code == 200
        if stream:
            assert reply.text.endswith("data: [DONE]\n\n")
            events = [json.loads(line[6:]) for line in reply.text.split("\n\n")[:-2]]
            text = "".join(event["choices"][0]["text"] for event in events)
        else:
            text = reply.json()["choices"][0]["text"]
        word = Prompt.of_text("tell me").word(0)
        assert text.encode() == b"".join(map(word, range(1, 301)))
        assert 0 < engines[1 - first].model.num_output_tokens_total < 250
        assert system.outcomes["completed"] == 1

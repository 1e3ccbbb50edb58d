"""Which model is meant, before engines are up and after."""

import asyncio
import time

import msgspec
import pytest

from serving.gateway.http.endpoints.model_cards import make_cards
from serving.gateway.http.errors import ApiError
from serving.gateway.intake.served_models import ModelEntry, ServedModels
from tests.serving.gateway.intake.asking import CHAT, SMALL
from tests.support.running_gateway import running


def may_use_all(names):
    return True


def find(models: ServedModels, name: str | None, elsewhere=(), may_use=may_use_all) -> str:
    return models.find_model(name, "generate", elsewhere, may_use)[0]


class TestBeforeTheFirstEngine:
    def test_configured_names_are_all_there_is(self):
        models = ServedModels(("m", "adapter"), {})
        assert [find(models, name) for name in ("m", "adapter", None, "")] == [
            "m",
            "adapter",
            "m",
            "m",
        ]
        assert find(models, "far", elsewhere=("far",)) == "far"
        with pytest.raises(ApiError) as caught:
            find(models, "other")
        assert caught.value.status == 404

    def test_where_no_name_is_known_any_may_be_right(self):
        models = ServedModels((), {})
        assert find(models, "later") == "later"
        with pytest.raises(ApiError) as caught:  # but none is not the name of a model
            find(models, None)
        assert caught.value.status == 503
        assert find(models, None, elsewhere=("far",)) == "far"
        with pytest.raises(ApiError) as caught:
            find(models, "secret", may_use=lambda names: False)
        assert caught.value.status == 404

    def test_but_not_any_number_of_them(self):
        """Each has a queue, and each event looks into all."""
        models = ServedModels((), {})
        for number in range(99):
            find(models, f"guess-{number}")
        assert find(models, "later") == "later"
        for _ in range(3):
            with pytest.raises(ApiError) as caught:
                find(models, "one-more")
            assert caught.value.status == 503
            assert caught.value.retry_after_s
        assert find(models, "later") == "later"


def test_what_engines_serve_goes_before_what_is_configured():
    engines = {}
    models = ServedModels(("m",), engines)
    engines["r0"] = msgspec.structs.replace(SMALL, model="n", aliases=("adapter",))
    assert find(models, None) == "n"
    assert [find(models, name) for name in ("n", "adapter", "m")] == ["n", "adapter", "m"]
    del engines["r0"]
    # It may come back; one that nobody has heard of will not.
    assert find(models, "adapter") == "adapter"
    with pytest.raises(ApiError):
        find(models, "other")


def test_an_adapter_that_is_unloaded_is_unknown_and_one_whose_engine_is_away_is_not():
    with_adapters = SMALL.with_adapters({"a": "/a", "b": "/b"})
    engines = {"r0": with_adapters, "r1": with_adapters}
    models = ServedModels((), engines)
    assert find(models, "a") == "a"
    engines["r0"] = SMALL.with_adapters({"b": "/b"})
    assert find(models, "a") == "a"  # another one has it
    del engines["r0"]
    engines["r1"] = SMALL.with_adapters({"b": "/b"})
    with pytest.raises(ApiError) as caught:
        find(models, "a")
    assert caught.value.status == 404
    del engines["r1"]
    assert find(models, "b") == "b"


def test_what_engines_of_one_model_can_do_together():
    engines = {
        f"r{number}": msgspec.structs.replace(SMALL, max_model_len=length, tasks=(task,))
        for number, (length, task) in enumerate([(1000, "generate"), (3000, "embed")])
    }
    models = ServedModels((), engines)
    _, capacity = models.find_model("fake-model", "embed", (), may_use_all)
    assert (capacity.shortest_context, capacity.longest_context) == (1000, 3000)
    assert capacity.tasks == {"generate", "embed"}
    with pytest.raises(ApiError, match="does not support"):
        models.find_model("fake-model", "transcription", (), may_use_all)


def entry(*names: str, **targets: float) -> ModelEntry:
    return ModelEntry(deployment=f"Engine-{names[0]}", names=names, **targets)


class TestSeveralModels:
    def test_each_has_its_names_its_engines_and_its_targets(self):
        engines = {"r0": msgspec.structs.replace(SMALL, model="b", aliases=("bee",))}
        models = ServedModels(("a", "b", "bee"), engines)
        models.use_entries([entry("a", tpot_target_s=0.1), entry("b", "bee")])
        assert [find(models, name) for name in ("a", "b", "bee")] == ["a", "b", "bee"]
        assert find(models, None) == "a"  # the first of the configuration, not of the engines
        assert models.entry("a").tpot_target_s == 0.1
        assert models.entry("bee").deployment == "Engine-b"
        assert models.entry("adapter") is None
        assert models.without_engine() == {"a": ""}

    def test_one_that_cannot_start_is_refused_by_name_and_the_others_serve(self):
        engines = {}
        models = ServedModels(("a", "b"), engines)
        models.use_entries([entry("a", "alias"), entry("b")])
        models.use_failures({"Engine-a": "ValueError: no memory"})
        for name in ("a", "alias"):
            with pytest.raises(ApiError, match=f"`{name}` could not be started: .*no mem") as error:
                find(models, name)
            assert error.value.status == 503
        assert find(models, "b") == find(models, None) == "b"
        assert find(models, "a", elsewhere=("a",)) == "a"  # a provider has it
        assert models.without_engine()["a"] == "ValueError: no memory"
        engines["r0"] = msgspec.structs.replace(SMALL, model="a", aliases=("alias",))
        assert find(models, "alias") == "alias"  # it started after all

    def test_one_that_is_removed_is_unknown_while_its_engines_finish(self):
        engines = {
            "r0": msgspec.structs.replace(SMALL, model="a", aliases=("alias", "adapter")),
            "r1": msgspec.structs.replace(SMALL, model="b"),
        }
        models = ServedModels(("a", "alias", "b"), engines)
        models.use_entries([entry("a", "alias"), entry("b")])
        models.use_entries([entry("b"), entry("c")])
        for name in ("a", "alias", "adapter"):
            with pytest.raises(ApiError) as error:
                find(models, name)
            assert error.value.status == 404
        assert models.removed == {"a", "alias", "adapter"}
        assert [find(models, name) for name in (None, "b", "c")] == ["b", "b", "c"]
        models.use_entries([entry("b"), entry("a")])
        assert find(models, "a") == "a"
        assert "a" not in models.removed


class TestEnginesThatComeAndGo:
    def test_those_who_ask_for_a_model_without_one_are_told_when(self):
        engines = {"r0": msgspec.structs.replace(SMALL, model="b", aliases=("bee", "adapter"))}
        models = ServedModels(("a", "b"), engines)
        entries = [entry("a", "alias", scales=True), entry("b", "bee", scales=True), entry("c")]
        models.use_entries(entries)
        assert models.scaled == {"Engine-a": {"a", "alias"}, "Engine-b": {"b", "bee", "adapter"}}
        assert models.waits_for("alias") == "waiting for an engine to start"
        models.expect_engine("Engine-a", time.monotonic() + 20.4)
        assert models.waits_for("a") == "waiting for an engine to start, about 20 s"
        assert models.waits_for("bee") == models.waits_for("c") == models.waits_for("x") == ""
        models.expect_engine("Engine-a", time.monotonic() - 9.0)  # it takes longer than they do
        assert models.waits_for("a").endswith("about 1 s")
        engines["r1"] = msgspec.structs.replace(SMALL, model="a", aliases=("alias",))
        assert models.waits_for("alias") == ""
        assert [models.name_of(each) for each in ("Engine-a", "Engine-b")] == ["a", "b"]

    def test_the_only_model_is_meant_by_any_name_if_only_its_engines_know_theirs(self):
        engines = {}
        models = ServedModels((), engines)
        models.use_entries([ModelEntry(deployment="Engine", names=(), scales=True)])
        assert models.scaled == {"Engine": None}
        assert models.waits_for("any") == "waiting for an engine to start"
        assert models.name_of("Engine") == ""
        engines["r0"] = SMALL
        assert models.waits_for("any") == ""

    def test_a_model_without_an_engine_is_listed_all_the_same(self):
        engines = {"r0": msgspec.structs.replace(SMALL, model="a", aliases=("adapter",), root="x")}
        models = ServedModels(("a", "b", "c"), engines)
        models.use_entries([entry("a", scales=True), entry("b", "bee", scales=True), entry("c")])
        found = {info.model: info for info in models.listed}
        assert found.keys() == {"a", "b", "bee"}  # c is starting
        del engines["r0"]
        assert {info.model for info in models.listed} == {"a", "b", "bee"}
        assert "adapter" in models.scaled["Engine-a"]
        assert models.waits_for("adapter") == "waiting for an engine to start"
        asleep = make_cards(models.listed, (), 0, models.configured)
        assert asleep.keys() == {"a", "adapter", "b", "bee"}
        assert (asleep["a"]["root"], asleep["a"]["max_model_len"]) == ("x", SMALL.max_model_len)
        assert asleep["b"]["max_model_len"] is None

    async def test_a_stream_is_told_what_it_waits_for(self):
        async with running(num_engines=0, gateway={"keepalive_s": 0.05}) as system:
            system.gateway.use_models([entry("other"), entry("fake-model", scales=True)])
            assert (await system.client.get("/health")).status_code == 200
            async with system.client.stream("POST", CHAT, json=system.chat(stream=True)) as reply:
                lines = reply.aiter_lines()
                assert await anext(lines) == ": keep-alive, waiting for an engine to start"
                await system.add_engine()
                rest = [line async for line in lines]
            assert rest[-2] == "data: [DONE]"
            system.assert_empty()


async def test_unknown_models_are_refused_at_once_and_leave_nothing():
    async with running(num_engines=0, served_names=("fake-model",)) as system:
        for number in range(20):
            reply = await system.client.post(CHAT, json=system.chat(model=f"unknown-{number}"))
            assert reply.status_code == 404
            error = reply.json()["error"]
            assert (error["type"], error["param"], error["code"]) == ("NotFoundError", "model", 404)
        state = system.gateway.state()
        assert state.held.num_requests == 0
        system.assert_empty()


@pytest.mark.parametrize("model", [None, ""])
async def test_a_request_without_a_model_waits_for_the_configured_one(model):
    async with running(num_engines=0, served_names=("fake-model",)) as system:
        body = system.chat(model=model)
        if model is None:
            del body["model"]
        asking = asyncio.create_task(system.client.post(CHAT, json=body))
        await system.until(lambda: system.gateway.state().held.num_requests == 1)
        await system.add_engine()
        assert (await asking).status_code == 200
        system.assert_empty()

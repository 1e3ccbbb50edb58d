"""`/v1/models` and the errors around models, as plain vLLM would answer."""

import contextlib
from collections.abc import AsyncIterator

import msgspec
import pytest
from openai import AsyncOpenAI, NotFoundError

from serving.config import ConfigError, parse
from tests.support.fakes import INFO
from tests.support.provider_server import configured, serving
from tests.support.running_gateway import CHAT, System, running

ALIASED = msgspec.structs.replace(
    INFO,
    model="Qwen/Qwen3-8B",
    aliases=("qwen", "acme/french"),
    root="/models/qwen3-8b",
    adapters={"acme/french": "/adapters/french"},
)


async def _card(system: System, path: str) -> dict:
    reply = await system.client.get(f"/v1/models/{path}")
    assert reply.status_code == 200
    return reply.json()


@contextlib.asynccontextmanager
async def aliased(num_engines: int = 1) -> AsyncIterator[System]:
    """A gateway before engines with all kinds of names."""
    async with running(num_engines=0) as system:
        for _ in range(num_engines):
            await system.add_engine(info=ALIASED)
        yield system


async def test_cards_are_vllms():
    """Its benchmark client, for one, loads the tokenizer from `root`."""
    from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList

    async with aliased(num_engines=2) as system:
        content = (await system.client.get("/v1/models")).json()
        listed = ModelList.model_validate(content)
        assert content.keys() == listed.model_dump().keys()
        assert [card.keys() for card in content["data"]] == [
            ModelCard(id="x").model_dump().keys()
        ] * 3
        assert ModelCard(id="x", permission=listed.data[0].permission).model_dump()[
            "permission"
        ] == [content["data"][0]["permission"][0]]
        told = {card.id: (card.root, card.parent, card.max_model_len) for card in listed.data}
        assert list(told) == ["Qwen/Qwen3-8B", "qwen", "acme/french"]
        assert told == {
            "Qwen/Qwen3-8B": ("/models/qwen3-8b", None, INFO.max_model_len),
            "qwen": ("/models/qwen3-8b", None, INFO.max_model_len),
            "acme/french": ("/adapters/french", "Qwen/Qwen3-8B", None),
        }


@pytest.mark.parametrize(
    "path", ["Qwen/Qwen3-8B", "Qwen%2FQwen3-8B", "Qwen%2fQwen3-8B", "Qwen/Qwen3-8B/"]
)
async def test_one_card_is_found_by_an_id_with_slashes(path):
    async with aliased() as system:
        assert (await _card(system, path))["id"] == "Qwen/Qwen3-8B"


async def test_openais_own_client_finds_models_and_ids():
    async with aliased() as system:
        url = f"http://127.0.0.1:{system.gateway.config.gateway.port}/v1"
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            assert (await client.models.retrieve("Qwen/Qwen3-8B")).id == "Qwen/Qwen3-8B"
            assert len((await client.models.list()).data) == 3
            given = {"x-request-id": "mine"}
            with pytest.raises(NotFoundError) as error:
                await client.models.retrieve("none", extra_headers=given)
            assert error.value.request_id == "mine"
            assert error.value.type == "NotFoundError"
            model = await client.models.retrieve("qwen", extra_headers=given)
            assert model._request_id == "mine"


@pytest.mark.parametrize("path", ["none", "Qwen/Qwen3-8B/x", "qwen3", "%00", "a%20b"])
async def test_a_model_that_there_is_not_is_vllms_404(path):
    async with aliased() as system:
        reply = await system.client.get(f"/v1/models/{path}")
        assert reply.status_code == 404
        error = reply.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("NotFoundError", "model", 404)


async def test_a_providers_models_have_cards_with_the_same_fields():
    async with serving() as server, running(num_engines=1, **configured(server)) as system:
        cards = (await system.client.get("/v1/models")).json()["data"]
        assert len({frozenset(card) for card in cards}) == 1
        for card in cards:
            # Those of a card's own making differ at each request, as vLLM's do.
            same = {**await _card(system, card["id"]), "permission": card["permission"]}
            assert same == card


async def test_a_request_by_any_of_the_names_is_answered():
    async with aliased() as system:
        for name in ("Qwen/Qwen3-8B", "qwen", "acme/french"):
            reply = await system.client.post(CHAT, json=system.chat(model=name))
            assert reply.text.endswith("data: [DONE]\n\n")
        reply = await system.client.post(CHAT, json=system.chat(model="fake-model"))
        assert reply.status_code == 404


def test_a_list_of_served_names_has_each_once():
    assert parse({"served_model_name": "m"}).served_names == ("m",)
    assert parse({"served_model_name": ["m", "n"]}).served_names == ("m", "n")
    assert parse({}).served_names == ()
    for names in ([], ["m", "m"], [1], [""], ""):
        with pytest.raises(ConfigError, match="served_model_name"):
            parse({"served_model_name": names})

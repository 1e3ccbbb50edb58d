"""Two wordings get two bookings before either has started: seen from outside, of a new gateway."""

import asyncio

import pytest

from router import Router, RouterSettings
from serving.gateway.intake.length.weights import shipped_lengths
from tests.serving.gateway.intake.asking import ask, chat
from tests.support.fakes import INFO
from tests.support.running_gateway import CHAT, running


@pytest.mark.asyncio
async def test_a_sentence_is_booked_less_than_a_report_before_either_has_started():
    async with running(num_engines=1) as system:
        system.engines[0].gate.clear()  # nothing begins
        texts = ("Write a one-sentence summary of", "Write a comprehensive report on")
        asked = [
            asyncio.create_task(
                system.client.post(
                    CHAT,
                    json=system.chat(
                        messages=[{"role": "user", "content": f"{text} the water cycle"}]
                    ),
                )
            )
            for text in texts
        ]
        await system.until(lambda: system.gateway.state().num_open_requests == 2)
        state = (await system.client.get("/headway/state")).json()
        summary, report = state["lengths"]["recent"]
        if summary["num_expected_tokens"] > report["num_expected_tokens"]:  # they came at once
            summary, report = report, summary
        assert 2 * summary["num_booked_tokens"] < report["num_booked_tokens"]
        assert summary["quantiles"] == sorted(summary["quantiles"])
        assert state["outcomes"]["completed"] == 0
        system.engines[0].gate.set()
        await asyncio.gather(*asked)


def kv_tokens_kept(text):
    """What an engine's ledger has for a request that was just sent there."""
    router = Router(RouterSettings())
    router.use_lengths(shipped_lengths())
    router.on_replica_up("r0", INFO, 0.0)
    messages = [{"role": "user", "content": text}]
    router.on_arrival(ask(CHAT, chat(messages=messages)).request, 0.0)
    return router.state(0.0).replicas["r0"].ledger.num_kv_tokens


def test_that_much_of_the_engines_kv_room_is_kept():
    one = kv_tokens_kept("Write a one-sentence summary of the water cycle")
    other = kv_tokens_kept("Write a comprehensive report on the water cycle")
    assert 0 < one < other - 50


@pytest.mark.asyncio
async def test_without_the_part_length_nothing_is_expected_of_wording():
    async with running(num_engines=1, router={"ablate": ["length"]}) as system:
        messages = [{"role": "user", "content": "Write a comprehensive report"}]
        await system.client.post(CHAT, json=system.chat(messages=messages, max_tokens=2))
        assert (await system.client.get("/headway/state")).json()["lengths"]["recent"] == []

"""Engines of two gateways give requests back as busy: each is answered once for all that."""

import asyncio

from tests.support.running_gateway import CHAT, running_together

NUM_REQUESTS, NUM_BUSY = 24, 10


async def test_what_is_given_back_is_answered_and_is_no_failure():
    async with running_together(2, 2) as systems:
        num_given_back = 0

        def is_busy_for(submit) -> bool:
            nonlocal num_given_back
            is_busy = submit.max_pending_tokens > 0 and num_given_back < NUM_BUSY
            num_given_back += is_busy
            return is_busy

        for server in systems[0].servers:
            server.is_busy_for = is_busy_for
        replies = await asyncio.gather(
            *(
                system.client.post(CHAT, json=system.chat(max_tokens=3, stream=True))
                for _ in range(NUM_REQUESTS // 2)
                for system in systems
            )
        )
        assert [reply.status_code for reply in replies] == [200] * NUM_REQUESTS
        assert all(reply.text.count("data: {}") == 3 for reply in replies)
        assert sum(engine.num_started for engine in systems[0].engines) == NUM_REQUESTS
        states = [system.gateway.state() for system in systems]
        assert sum(state.retries.num_bounced for state in states) == num_given_back == NUM_BUSY
        assert sum(state.outcomes["completed"] for state in states) == NUM_REQUESTS
        for system, state in zip(systems, states, strict=True):
            assert state.retries.num_made == 0
            assert state.breaker_events == []
            system.assert_empty()

"""No request ends a real engine, and what is a request's own fault is answered as that."""

import pytest

from tests.serving.engine.conftest import Served

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def test_a_seed_draws_the_same_however_the_prompt_is_cut(served: Served) -> None:
    """In three steps, and, with all but its end cached, in one; vLLM's own core dies of the first.

    The second seed is there to show that they draw at all.
    """

    def ask(seed: int, salt: str) -> tuple[str, int]:
        before = served.engine._stats.num_steps_total
        reply = served.ask(
            {
                "prompt": [100 + number for number in range(300)],
                "seed": seed,
                "temperature": 1,
                "ignore_eos": True,
                "cache_salt": salt,
            }
        )
        assert reply.status_code == 200
        return reply.json()["choices"][0]["text"], served.engine._stats.num_steps_total - before

    in_parts, num_more_steps = ask(1, "a")
    at_once, num_steps = ask(1, "a")
    assert num_more_steps - num_steps == 2
    assert at_once == in_parts
    assert ask(1, "b") == (in_parts, num_more_steps)
    assert ask(2, "a")[0] != in_parts

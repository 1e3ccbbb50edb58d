"""What of a prompt is hashed, so that a later one is known by it."""

import json
import time

import msgspec
import pytest

from serving.gateway.intake.prompt_prefix import prompt_prefix

ASKED = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello " * 200}]
ANSWERED = [*ASKED, {"role": "assistant", "content": 'say "role"'}]
GOES_ON = [*ANSWERED, {"role": "user", "content": "and then? " * 50}]


def hashes(prompt: bytes, model: str = "m", salt: str = "") -> tuple[int, ...]:
    return prompt_prefix(model, salt, prompt).hashes


class TestBlocks:
    """Of 256 bytes."""

    def test_equal_as_far_as_the_prompts_are(self):
        shared = b"x" * 512
        one, other = hashes(shared + b"a" * 300), hashes(shared + b"b" * 300)
        assert len(one) == len(other) == 3
        assert one[:2] == other[:2]
        assert one[2] != other[2]

    def test_a_block_is_known_by_all_before_it(self):
        repeated = hashes(b"x" * 2560)
        assert len(set(repeated)) == 10
        assert repeated[1] != hashes(b"y" * 256 + b"x" * 256)[1]
        assert repeated[0] != hashes(b"x" * 256, model="n")[0]  # another model's cache
        assert repeated[0] != hashes(b"x" * 256, salt="s")[0]  # another tenant's

    @pytest.mark.parametrize(
        ("num_bytes", "num_blocks"), [(1, 0), (255, 0), (256, 1), (10**6, 3906)]
    )
    def test_whole_blocks_of_all_of_it(self, num_bytes, num_blocks):
        assert len(hashes(b"x" * num_bytes)) == num_blocks

    def test_no_more_than_the_model_may_read(self):
        prefix = prompt_prefix("m", "", b"[" + b"x" * 10**6 + b"]", max_tokens=1000)
        assert len(prefix.hashes) == 31
        assert prefix.end_hash == 0

    def test_they_are_small_numbers_as_python_keeps_them(self):
        assert all(0 <= each < 2**60 for each in hashes(b"x" * 10**5))

    def test_the_next_turn_of_a_conversation_matches_the_last(self):
        first, second = (hashes(msgspec.json.encode(each)) for each in (ASKED, GOES_ON))
        assert second[: len(first)] == first


@pytest.mark.parametrize(
    "encode",
    [
        msgspec.json.encode,
        lambda messages: json.dumps(messages).encode(),
        lambda messages: json.dumps(messages, indent=4).encode(),
    ],
)
class TestAnswers:
    """By the text before it, however a client writes JSON."""

    def test_a_turn_names_the_turn_before(self, encode):
        asked, goes_on = (prompt_prefix("m", "", encode(each)) for each in (ASKED, GOES_ON))
        assert goes_on.answered_hash == asked.end_hash != 0
        share = len(encode(ANSWERED)) / len(encode(GOES_ON))
        assert goes_on.answered_share == pytest.approx(share, abs=0.01)
        assert asked.answered_hash == 0

    def test_of_several_answers_the_last_counts(self, encode):
        again = [*GOES_ON, {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
        goes_on, later = (prompt_prefix("m", "", encode(each)) for each in (GOES_ON, again))
        assert later.answered_hash == goes_on.end_hash

    def test_calls_of_tools_are_answers(self, encode):
        call = {"role": "assistant", "tool_calls": [{"function": {"arguments": '{"role": 1}'}}]}
        result = {"role": "tool", "content": "done"}
        asked, goes_on = (
            prompt_prefix("m", "", encode(each)) for each in (ASKED, [*ASKED, call, result])
        )
        assert goes_on.answered_hash == asked.end_hash
        share = len(encode([*ASKED, call])) / len(encode([*ASKED, call, result]))
        assert goes_on.answered_share == pytest.approx(share, abs=0.01)

    def test_another_text_has_another_name(self, encode):
        other = [ASKED[0], {"role": "user", "content": "hullo " * 200}]
        assert (
            prompt_prefix("m", "", encode(other)).end_hash
            != prompt_prefix("m", "", encode(ASKED)).end_hash
        )
        for model, salt in (("n", ""), ("m", "s")):
            assert (
                prompt_prefix(model, salt, encode(ASKED)).end_hash
                != prompt_prefix("m", "", encode(ASKED)).end_hash
            )


@pytest.mark.parametrize(
    "prompt",
    [
        b'"the role of the \\"assistant\\""',
        b"[]",
        b'["assistant"]',
        b'["role", "assistant"]',
        b'[{"role":"assistant"',
        b'"role":"assistant"',
        b"[1, 2, 3]",
        b"[" + b" " * 10_000 + b'"role":"assistant"}]',
        b"[" * 10_000,
    ],
)
def test_what_is_no_chat_does_no_harm(prompt):
    prompt_prefix("m", "", prompt)


@pytest.mark.parametrize(
    "filler", [b" ", b"{", b'"role"', b'"assistant"', b'{"role":"assistant"},']
)
def test_odd_text_is_looked_through_at_the_same_speed(filler):
    """No search may begin anew for each of many matches."""
    prompt = b"[" + filler * (2 * 10**6 // len(filler)) + b"]"
    began_s = time.process_time()
    prompt_prefix("m", "", prompt)
    assert time.process_time() - began_s < 1.0

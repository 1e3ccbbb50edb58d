"""What is refused before anything is booked."""

import msgspec
import pytest

from serving.gateway.http.errors import ApiError
from tests.serving.gateway.intake.asking import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    RESPONSES,
    SMALL,
    ask,
    chat,
    completion,
    make_parser,
)


def refusal(path: str, body: dict | bytes, parser=None) -> dict:
    """OpenAI's error object."""
    with pytest.raises(ApiError) as caught:
        ask(path, body, parser)
    assert caught.value.status == 400
    return msgspec.json.decode(caught.value.body())["error"]


def with_number(body: dict, field: str, text: str) -> bytes:
    """A body with a number just as it is written."""
    return msgspec.json.encode(body)[:-1] + f',"{field}":{text}}}'.encode()


class TestNumbers:
    @pytest.mark.parametrize("text", ["1" + "0" * 308, "1" * 4000, "1e308", "9223372036854775808"])
    @pytest.mark.parametrize(
        ("path", "field"),
        [
            (CHAT, "n"),
            (CHAT, "max_tokens"),
            (CHAT, "max_completion_tokens"),
            (CHAT, "min_tokens"),
            (CHAT, "top_logprobs"),
            (CHAT, "prompt_logprobs"),
            (CHAT, "top_k"),
            (CHAT, "seed"),
            (CHAT, "priority"),
            (CHAT, "truncate_prompt_tokens"),
            (COMPLETIONS, "n"),
            (COMPLETIONS, "logprobs"),
            (COMPLETIONS, "max_tokens"),
            (RESPONSES, "max_output_tokens"),
            (EMBEDDINGS, "priority"),
        ],
    )
    def test_beyond_64_bits(self, path, field, text):
        """Into sums and onto the wire no such number may go."""
        body = {CHAT: chat(), COMPLETIONS: completion()}.get(path, {"input": "hi"})
        error = refusal(path, with_number(body, field, text))
        assert field in error["param"]
        assert error["code"] == 400

    @pytest.mark.parametrize("text", ["1e400", "-1e400", "NaN", "Infinity"])
    def test_what_is_no_number(self, text):
        assert refusal(CHAT, with_number(chat(), "n", text))["param"] == "body.n"

    def test_a_number_of_too_many_digits(self):
        """Python itself reads at most 4,300."""
        assert refusal(CHAT, with_number(chat(), "n", "1" * 5000))["param"] == "body"

    @pytest.mark.parametrize(
        ("path", "fields", "param"),
        [
            (CHAT, {"max_tokens": -10_000}, "max_tokens"),
            (CHAT, {"max_tokens": 0}, "max_tokens"),
            (CHAT, {"max_completion_tokens": -1, "max_tokens": 5}, "max_completion_tokens"),
            (CHAT, {"max_tokens": 4097}, "max_tokens"),
            (CHAT, {"n": 0}, "n"),
            (CHAT, {"n": -5}, "n"),
            (CHAT, {"n": 16_385}, "n"),
            (CHAT, {"min_tokens": -1}, "min_tokens"),
            (CHAT, {"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
            (CHAT, {"logprobs": True, "top_logprobs": -2}, "top_logprobs"),
            (CHAT, {"prompt_logprobs": -2}, "prompt_logprobs"),
            (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
            (COMPLETIONS, {"logprobs": -2}, "logprobs"),
            (COMPLETIONS, {"prompt": ["a"] * 3, "n": 16_384 // 3 + 1}, "n"),
            (RESPONSES, {"max_output_tokens": -10_000}, "max_output_tokens"),
        ],
    )
    def test_what_no_model_can_do(self, path, fields, param):
        body = {CHAT: chat(), COMPLETIONS: completion()}.get(path, {"input": "hi"})
        assert refusal(path, {**body, **fields})["param"] == param

    @pytest.mark.parametrize(
        ("path", "fields"),
        [
            (CHAT, {"max_tokens": 4096}),
            (CHAT, {"n": 16_384}),
            (CHAT, {"n": None, "max_tokens": None, "max_completion_tokens": None}),
            (CHAT, {"max_completion_tokens": 5, "max_tokens": -5}),  # vLLM does not look at it
            (CHAT, {"top_logprobs": -1, "logprobs": False}),
            (COMPLETIONS, {"max_tokens": 0, "echo": True}),
            (RESPONSES, {"n": 10**30, "max_tokens": -1}),  # fields that it does not have
            (EMBEDDINGS, {"n": 10**30, "max_tokens": -1}),
        ],
    )
    def test_what_one_can(self, path, fields):
        body = {CHAT: chat(), COMPLETIONS: completion()}.get(path, {"input": "hi"})
        assert ask(path, {**body, **fields}).request.num_sequences >= 1

    def test_of_several_engines_the_one_that_takes_most_counts(self):
        long = msgspec.structs.replace(SMALL, max_model_len=10_000)
        parser = make_parser(SMALL, long)
        assert ask(CHAT, chat(max_tokens=10_000), parser).request.max_output_tokens == 10_000
        assert refusal(CHAT, chat(max_tokens=10_001), parser)["param"] == "max_tokens"

    def test_before_any_engine_is_up_only_what_none_could_do_is_refused(self):
        parser = make_parser()
        assert ask(CHAT, chat(max_tokens=10**6), parser).request.max_output_tokens == 10**6
        assert refusal(CHAT, chat(max_tokens=-1), parser)["param"] == "max_tokens"


class TestPrompts:
    @pytest.mark.parametrize(
        "prompt",
        [
            ["a"] * 17,
            [[1]] * 17,
            ['\\"'] * 17,
            ["\\"] * 17,
            ["a, b [c]"] * 17,
        ],
    )
    @pytest.mark.parametrize("path", [COMPLETIONS, EMBEDDINGS])
    def test_more_of_them_than_sequences(self, path, prompt):
        field = "prompt" if path == COMPLETIONS else "input"
        infos = msgspec.structs.replace(SMALL, tasks=("generate", "embed"))
        parser = make_parser(infos, max_sequences=16)
        error = refusal(path, {field: prompt}, parser)
        assert error["param"] == field
        assert "gateway.max_sequences" in error["message"]
        assert ask(path, {field: prompt[:16]}, parser).request.num_prompts == 16

    def test_many_quotes_within_few_texts(self):
        parser = make_parser(SMALL, max_sequences=16)
        asked = ask(COMPLETIONS, completion(['say "a", "b", "c"' * 100] * 2), parser)
        assert asked.request.num_prompts == 2


class TestLogProbabilities:
    """At most 1,000 in one go here, of a model with 1,000 tokens."""

    @pytest.fixture
    def parser(self):
        return make_parser(SMALL, max_logprob_entries=1000)

    @pytest.mark.parametrize(
        ("path", "fields", "param"),
        [
            (CHAT, {"logprobs": True, "top_logprobs": 9, "max_tokens": 101}, "top_logprobs"),
            (CHAT, {"logprobs": "yes", "top_logprobs": 9, "max_tokens": "101"}, "top_logprobs"),
            (CHAT, {"logprobs": True, "max_tokens": 1001}, "top_logprobs"),
            (CHAT, {"logprobs": True, "top_logprobs": 9, "max_tokens": 51, "n": 2}, "top_logprobs"),
            (CHAT, {"logprobs": True, "top_logprobs": -1, "max_tokens": 2}, "top_logprobs"),
            (CHAT, {"logprobs": True, "top_logprobs": 1000}, "top_logprobs"),
            (CHAT, {"logprobs": True, "top_logprobs": 499, "n": 3, "stream": True}, "top_logprobs"),
            (CHAT, {"logprobs": True, "logprob_token_ids": list(range(99)), "max_tokens": 11},
             "top_logprobs"),
            (CHAT, {"prompt_logprobs": 7000}, "prompt_logprobs"),
            (CHAT, {"prompt_logprobs": -1}, "prompt_logprobs"),
            (COMPLETIONS, {"logprobs": 9, "max_tokens": 301}, "logprobs"),
            (COMPLETIONS, {"prompt": list(range(30)), "prompt_logprobs": 100}, "prompt_logprobs"),
            (COMPLETIONS, {"prompt": list(range(30)), "prompt_logprobs": 49, "n": 3},
             "prompt_logprobs"),
            (COMPLETIONS, {"prompt": [[1]] * 10, "logprobs": 9, "max_tokens": 31}, "logprobs"),
            (COMPLETIONS, {"prompt": list(range(30)), "echo": True, "logprobs": 100},
             "prompt_logprobs"),
            (RESPONSES, {"include": ["message.output_text.logprobs"], "top_logprobs": 9,
                         "max_output_tokens": 101}, "top_logprobs"),
        ],
    )  # fmt: skip
    def test_more_than_can_be_written_in_one_go(self, parser, path, fields, param):
        body = {CHAT: chat(), COMPLETIONS: completion()}.get(path, {"input": "hi"})
        error = refusal(path, {**body, **fields}, parser)
        assert error["param"] == param
        assert "gateway.max_logprob_entries" in error["message"]

    @pytest.mark.parametrize(
        ("path", "fields"),
        [
            (CHAT, {"logprobs": True, "top_logprobs": 9, "max_tokens": 100}),
            (CHAT, {"logprobs": False, "top_logprobs": 9, "max_tokens": 4096}),
            (CHAT, {"logprobs": True, "top_logprobs": 9, "max_tokens": 4096, "stream": True}),
            (CHAT, {"logprobs": True, "top_logprobs": 332, "n": 3, "stream": True}),
            (COMPLETIONS, {"logprobs": 9, "max_tokens": 300}),
            (COMPLETIONS, {"prompt": list(range(30)), "prompt_logprobs": 99}),
            (RESPONSES, {"top_logprobs": 9, "max_output_tokens": 4096}),
            (EMBEDDINGS, {"prompt_logprobs": -1}),
        ],
    )
    def test_as_many_as_can(self, path, fields):
        infos = msgspec.structs.replace(SMALL, tasks=("generate", "embed"))
        parser = make_parser(infos, max_logprob_entries=1000)
        body = {CHAT: chat(), COMPLETIONS: completion()}.get(path, {"input": "hi"})
        assert ask(path, {**body, **fields}, parser).added == {}

    def test_a_reply_without_a_limit_gets_the_one_that_the_bound_allows(self, parser):
        """Most who ask for log probabilities set no limit; refused, they would have to."""
        asked = ask(CHAT, chat(logprobs=True, top_logprobs=4, n=2), parser)
        assert asked.added == {"max_tokens": 100}
        assert asked.request.max_output_tokens == 100
        fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 4}
        assert ask(RESPONSES, {"input": "x", **fields}, parser).added == {"max_output_tokens": 200}

    def test_but_none_past_the_context(self):
        """vLLM would refuse that; by itself it stops there."""
        parser = make_parser(SMALL)
        asked = ask(CHAT, chat(logprobs=True, top_logprobs=4), parser)
        assert (asked.added, asked.request.max_output_tokens) == ({}, None)

    def test_an_unknown_vocabulary_is_large(self):
        parser = make_parser(msgspec.structs.replace(SMALL, vocab_size=0))
        body = chat(logprobs=True, top_logprobs=-1, stream=True)
        assert refusal(CHAT, body, parser)["param"] == "top_logprobs"

"""How large is what a model has to read?"""

import json
import time

import msgspec
import pytest

from serving.gateway.intake.length.tokens_per_byte import TokensPerByte
from serving.gateway.intake.prompt_size import measure_prompt
from tests.serving.gateway.intake.asking import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    ask,
    chat,
    completion,
)


def size(prompt, field="prompt", max_tokens=10_000, tokens_per_byte=0.25):
    text = prompt if isinstance(prompt, bytes) else json.dumps(prompt).encode()
    measured = measure_prompt(
        field, text, tokens_per_byte=tokens_per_byte, max_tokens=max_tokens, max_prompts=1000
    )
    return measured.num_tokens, measured.num_prompts, measured.num_text_bytes


class TestTokenIds:
    @pytest.mark.parametrize(
        "text",
        [
            b"[1,2,3,4]",
            b"[ 1, 2, 3, 4 ]",
            b"[\n1,\n2,\n3,\n4\n]",
            b"[" + b" " * 5000 + b"1,2,3,4]",
            b"[\t\r\n" + b"1 , 2 , 3 , 4".replace(b" ", b" " * 1000) + b"]",
            b"[1.0, 2.0, 3.0, 4.0]",
            b"[-1, 2, 3, 4]",
        ],
    )
    def test_are_counted_exactly_however_they_are_written(self, text):
        assert size(text) == (4, 1, 0)  # nothing to learn from: no text
        body = b'{"model": "fake-model", "prompt": ' + text + b"}"
        asked = ask(COMPLETIONS, body)
        assert (asked.request.num_prompt_tokens, asked.num_text_bytes) == (4, 0)

    @pytest.mark.parametrize("indent", [None, 1, 7])
    def test_of_lists_add_up(self, indent):
        """Each is a prompt; of each no more counts than the model reads."""
        lists = [list(range(3000))] * 100
        text = json.dumps(lists, indent=indent).encode()
        assert size(text, max_tokens=4096) == (300_000, 100, 0)
        assert size(text, max_tokens=1000) == (100_000, 100, 0)
        asked = ask(COMPLETIONS, completion(lists, n=2))
        request = asked.request
        assert (request.num_prompts, request.num_sequences) == (100, 200)
        assert (request.num_prompt_tokens, request.max_output_tokens) == (300_000, 16)
        request = ask(EMBEDDINGS, {"input": lists}).request
        assert (request.num_prompts, request.num_sequences) == (100, 100)
        assert (request.num_prompt_tokens, request.max_output_tokens) == (300_000, 0)

    def test_of_unequal_lists(self):
        assert size(b"[[1,2],[],[3, 4 ,5],[ ]]") == (5, 4, 0)
        assert size(b"[[],[],[3]]") == (1, 3, 0)
        assert size([[1] * 50, [1] * 5], max_tokens=10) == (15, 2, 0)


class TestText:
    def test_a_list_of_it_is_as_many_prompts(self):
        texts = ["word " * 400, "word " * 40]
        num_tokens, num_prompts, num_bytes = size(texts)
        assert num_tokens == pytest.approx(550, rel=0.01)
        assert (num_prompts, num_bytes) == (2, len(json.dumps(texts)))
        assert size(texts, max_tokens=100) == (150, 2, 0)  # the longer one is not read whole
        request = ask(COMPLETIONS, completion(texts, n=3)).request
        assert (request.num_prompts, request.num_sequences) == (2, 6)

    @pytest.mark.parametrize(
        "text", ["[1, 2, 3]", '["a", "b"]', "[[1], [2]]", '", "', "\\", '\\"', "[", "{}"]
    )
    def test_what_it_says_does_not_matter(self, text):
        for prompt, num_prompts in ((text, 1), ([text], 1), ([text] * 3, 3)):
            written = json.dumps(prompt).encode()
            assert size(prompt)[1:] == (num_prompts, len(written))

    def test_messages_are_one_prompt(self):
        messages = [{"role": "user", "content": "word " * 400}] * 3
        assert size(messages)[1] == 1
        assert ask(CHAT, chat(messages=messages, n=2)).request.num_sequences == 2

    def test_several_conversations_are_read_whole_each(self):
        chats = [[{"role": "user", "content": "word " * 400}]] * 30
        assert size(chats, max_tokens=1000)[0] > 15_000
        assert size(chats)[1] == 30

    def test_broken_lists_are_vllms_to_refuse(self):
        assert size(b'["a", "\\ud800"]')[1] == 1


class TestMedia:
    def test_are_no_text(self):
        """A megabyte of image is not a quarter of a million tokens, and teaches nothing."""
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10**6}}
        audio = {"type": "input_audio", "input_audio": {"data": "A" * 10**5, "format": "wav"}}
        text = {"type": "text", "text": "word " * 400}
        num_tokens, _, num_bytes = size([{"role": "user", "content": [text, image, audio]}])
        assert num_tokens == pytest.approx(500 + 2 * 1024, rel=0.05)
        assert num_bytes == 0
        there = {"type": "image_url", "image_url": {"url": "http://x/y.png"}}
        assert size([{"role": "user", "content": [text, there]}])[2] == 0

    def test_but_long_words_are(self):
        word = "A" * 8000
        for prompt in (word, [word], [{"role": "user", "content": word}]):
            assert size(prompt)[0] >= 2000
        assert size([{"role": "user", "content": f'"url":"{word}"'}])[0] >= 2000

    def test_embeddings_of_a_prompt(self):
        """16 tokens of 4,096 values of two bytes."""
        base64 = "A" * (16 * 4096 * 2 * 4 // 3 + 3)
        assert size(base64, "prompt_embeds") == (16, 1, 0)
        assert size([base64] * 3, "prompt_embeds") == (48, 3, 0)
        body = {"prompt_embeds": base64}
        assert ask(COMPLETIONS, body).request.num_prompt_tokens == 16
        assert ask(COMPLETIONS, {**body, "prompt": [1, 2]}).request.num_prompt_tokens == 18


@pytest.mark.parametrize(
    "text",
    [
        b"[" + b" " * 2**22 + b"x]",
        b"[" + b"[ ]," * 2**20 + b"x]",
        b"[" + b"[" * 2**22,
        b'"' + b"A" * 2**22 + b'"',
        b'[{"url":"' + b"A" * 2**22 + b" ",
        b'[{"url":"' * 2**19,
        b"[" + b'"a",' * 999 + b'"' + b"a" * 2**22 + b'"]',
    ],
    ids=["spaces", "empty lists", "brackets", "word", "medium", "media", "texts"],
)
def test_no_prompt_takes_long(text):
    """4 MB of anything: far from what going back over it again and again would take."""
    begin_s = time.perf_counter()
    size(text)
    assert time.perf_counter() - begin_s < 0.5


class TestTokensPerByte:
    def test_learns_from_real_counts(self):
        """A language with two tokens per byte is known for one after a few long prompts."""
        ratio = TokensPerByte()
        for _ in range(50):
            ratio.learn(20_000, 40_000)
        assert ratio.ratio == pytest.approx(2.0, rel=0.01)
        for nothing in ((1_000, 0), (0, 1_000)):  # vLLM counted nothing; it was no text
            ratio.learn(*nothing)
        assert ratio.ratio == pytest.approx(2.0, rel=0.01)

    def test_token_ids_with_white_space_teach_nothing(self):
        ids = msgspec.json.encode([1] * 100).replace(b",", b"," + b" " * 100)
        asked = ask(COMPLETIONS, b'{"prompt":' + ids + b"}")
        ratio = TokensPerByte()
        ratio.learn(asked.num_text_bytes, 100)
        assert ratio.ratio == 0.25

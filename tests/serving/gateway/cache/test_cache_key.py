"""Which requests have a cache key, and which have the same one?"""

import msgspec
import pytest

from serving.gateway.cache.cache_key import cache_key
from serving.gateway.intake.json_body import read_json_body
from tests.support.running_gateway import CHAT

SCOPE = ("tenant", "revision")


def key_of_text(
    text: str | bytes,
    path: str = CHAT,
    model: str = "m",
    scope: tuple[str, ...] = SCOPE,
    with_tools: bool = False,
) -> str | None:
    body = read_json_body(path, text.encode() if isinstance(text, str) else text)
    return cache_key(path, body.data, body.fields, model, scope, with_tools=with_tools)


def key_of(path: str = CHAT, with_tools: bool = False, **fields) -> str | None:
    body = msgspec.json.encode({"messages": [{"role": "user", "content": "x"}], **fields})
    return key_of_text(body, path, with_tools=with_tools)


class TestKey:
    def test_only_what_is_deterministic_has_one(self):
        assert key_of(temperature=0)
        assert key_of(temperature=0.0, n=1)
        assert key_of(temperature="0")
        assert key_of(seed=1)
        assert key_of(seed="1")
        assert key_of(seed=1, temperature=0.7)
        assert key_of("/v1/embeddings", input="x")
        for fields in (
            {},
            {"temperature": 0.1},
            {"temperature": "0.1"},
            {"temperature": None},
            {"temperature": 0, "tools": [{}]},
            {"temperature": 0, "store": True},
            {"temperature": 0, "previous_response_id": "x"},
            {"temperature": 0, "messages": [{"content": [{"image_url": {"url": "http://x"}}]}]},
        ):
            assert key_of(**fields) is None, fields
        assert key_of_text('{"temperature": 0, "messages": [], "top_p": NaN}') is None
        assert key_of(temperature=0, tools=[{}], with_tools=True)
        assert key_of(temperature=0, tools=[])

    def test_counts_what_the_body_says_not_how_it_is_written(self):
        same = {
            key_of_text('{"temperature":0,"messages":[{"role":"user","content":"é"}]}'),
            key_of_text(
                '{ "messages": [{"content": "\\u00e9", "role": "user"}], "temperature": 0.0 }'
            ),
            key_of_text('{"messages":[{"role":"user","content":"é"}],"temperature":0,"user":"me"}'),
            key_of_text(
                '{"messages":[{"role":"user","content":"é"}],"temperature":0,'
                '"seed":null,"stream":false,"model":"alias"}'
            ),
            key_of_text(
                '{"messages":[{"role":"user","content":"é"}],"temperature":0}'.encode("utf-16")
            ),
        }
        assert len(same) == 1

    @pytest.mark.parametrize(
        ("spellings", "others"),
        [
            ((True, "true", "yes", "ON", 1, 1.0, "1"), (False, "false", "no", "Off", 0, "0", None)),
            ((False, "false", "n", 0), (True, "t", "y", 1)),
        ],
    )
    def test_a_stream_is_what_vllm_takes_for_one(self, spellings, others):
        """Each form is kept apart from the other, however it was asked for."""
        keys, other_keys = (
            {key_of(temperature=0, stream=value) for value in values}
            for values in (spellings, others)
        )
        assert len(keys) == len(other_keys) == 1
        assert None not in keys
        assert keys != other_keys

    def test_numbers_count_as_vllm_reads_them(self):
        assert key_of(temperature=0, max_tokens="12") == key_of(temperature=0, max_tokens=12)
        assert key_of(temperature=0, n=True) == key_of(temperature=0, n=1)

    def test_every_field_that_matters_matters(self):
        base = key_of(temperature=0)
        others = [
            key_of(temperature=0, stream=True),
            key_of(temperature=0, stream=True, stream_options={"include_usage": True}),
            key_of(temperature=0, max_tokens=5),
            key_of(temperature=0, stop="x"),
            key_of(temperature=0, seed=1),
            key_of(temperature=0, logprobs=True),
            key_of(temperature=0, chat_template_kwargs={"x": 1}),
            key_of(temperature=0, messages=[{"role": "user", "content": "y"}]),
            key_of("/v1/completions", temperature=0),
        ]
        assert len({base, *others}) == 1 + len(others)
        body = '{"temperature":0}'
        keys = {
            key_of_text(body, model=model, scope=scope)
            for model in ("m", "n")
            for scope in (("a", "r"), ("b", "r"), ("a", "s"))
        }
        assert len(keys) == 6

    @pytest.mark.parametrize(
        "name", ["user", "priority", "request_id", "priority_class", "metadata"]
    )
    def test_who_asks_and_how_urgently_does_not_matter(self, name):
        value = 3 if name == "priority" else "batch"
        assert key_of(temperature=0, **{name: value}) == key_of(temperature=0)

"""Which requests have a cache key, and which have the same one?"""

import msgspec

from serving.gateway.cache.cache_key import cache_key
from tests.support.running_gateway import CHAT


def key_of(path: str = CHAT, with_tools: bool = False, **fields) -> str | None:
    body = msgspec.json.encode({"messages": [{"role": "user", "content": "x"}], **fields})
    return cache_key(path, body, "m", ("tenant", "revision"), with_tools=with_tools)


class TestKey:
    def test_only_what_is_deterministic_has_one(self):
        assert key_of(temperature=0)
        assert key_of(temperature=0.0, n=1)
        assert key_of(seed=1)
        assert key_of(seed=1, temperature=0.7)
        assert key_of("/v1/embeddings", input="x")
        for fields in (
            {},
            {"temperature": 0.1},
            {"temperature": None},
            {"temperature": 0, "tools": [{}]},
            {"temperature": 0, "store": True},
            {"temperature": 0, "previous_response_id": "x"},
            {"temperature": 0, "messages": [{"content": [{"image_url": {"url": "http://x"}}]}]},
        ):
            assert key_of(**fields) is None, fields
        assert key_of(temperature=0, tools=[{}], with_tools=True)
        assert key_of(temperature=0, tools=[])

    def test_counts_what_the_body_says_not_how_it_is_written(self):
        def key(text: str) -> str | None:
            return cache_key(CHAT, text.encode(), "m", ("t",), with_tools=False)

        same = {
            key('{"temperature":0,"messages":[{"role":"user","content":"é"}]}'),
            key('{ "messages": [{"content": "\\u00e9", "role": "user"}], "temperature": 0.0 }'),
            key('{"messages":[{"role":"user","content":"é"}],"temperature":0,"user":"me"}'),
            key(
                '{"messages":[{"role":"user","content":"é"}],"temperature":0,'
                '"seed":null,"stream":false,"model":"alias"}'
            ),
        }
        assert len(same) == 1

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
        body = b'{"temperature":0}'
        keys = {
            cache_key(CHAT, body, model, scope, with_tools=False)
            for model in ("m", "n")
            for scope in (("a", "r"), ("b", "r"), ("a", "s"))
        }
        assert len(keys) == 6

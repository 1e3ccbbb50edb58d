"""Requests that no sane client sends, drawn from a seed: the same seed, the same bytes."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


@dataclass(frozen=True)
class Odd:
    """One request as bytes."""

    kind: str  # how it was made, for whoever has to look into it
    sent: bytes
    path: str
    leaves_after: int | None = None  # bytes of the reply; None: reads it all


# Raw JSON, because Python's own values cannot say all of it.
VALUES = (
    *("null", "true", "false", "0", "-0", "1", "-1", "0.5", "1e30", "-1e30", "1e400", "NaN"),
    *("Infinity", "1" + "0" * 30, "9" * 309, "-" + "9" * 309, str(2**31), str(2**63), str(2**64)),
    *(
        '""',
        '"a"',
        '"yes"',
        '"off"',
        '"12"',
        '"1e5"',
        '"\\u0000"',
        '"\\ud800"',
        '"🙂"',
        '"' + "x" * 5000 + '"',
    ),
    *("[]", "[null]", "[1,2,3]", "[[[]]]", '["a","b"]', "[-1]", "[1e400]", "[" * 60 + "]" * 60),
    *("{}", '{"a":1}', '{"type":"json_object"}', '{"1":100}', '{"-5":1}', '{"99999999":1}'),
    *(
        '{"include_usage":"yes"}',
        '{"type":"json_schema"}',
        '{"type":"function","function":{"name":"f"}}',
    ),
)
_PROMPTS = (
    *('"Once upon"', '""', '" "', "[1,2,3]", "[[1,2],[3]]", '["a","b"]', '[["a"]]', "[-1]", "[0]"),
    *("[49151]", "[49152]", "[1e3]", "[1.5]", "[null]", "[[],[1]]", "5", "{}", "null", '"\\u0000"'),
    *('"' + "word " * 900 + '"', '"' + "word " * 5000 + '"', "[" + ",".join(["7"] * 1500) + "]"),
    *("[" + ", \\n ".join(["9"] * 40) + "]", json.dumps(["a"] * 40), json.dumps([[5] * 30] * 20)),
)
_CONTENTS = (
    *('"hi"', '""', "null", "5", "[]", "{}", '[{"type":"text","text":"hi"}]', '[{"type":"text"}]'),
    *('[{"type":"image_url","image_url":{"url":"http://127.0.0.1:1/x.png"}}]', '["hi"]'),
    *('[{"type":"input_audio","input_audio":{"data":"!","format":"wav"}}]', '"' + "é" * 2000 + '"'),
)
_ROLES = ("user", "system", "assistant", "tool", "developer", "function", "", "nobody")
_SCHEMAS = (
    *(
        '{"type":"object"}',
        '{"type":"array","minItems":1000000000}',
        "{}",
        "true",
        "5",
        '"x"',
        "[]",
    ),
    *(
        '{"type":"string","pattern":"("}',
        '{"$ref":"#"}',
        '{"$ref":"#/nowhere"}',
        '{"type":"nonsense"}',
    ),
    *(
        '{"type":"string","pattern":"a{1000000}"}',
        '{"enum":[]}',
        '{"type":"integer","minimum":1e30}',
    ),
)
_TEXTS = ("a{1000000}", "(", "[", "root ::= root", "", "\\", "(?=a)b", 'root ::= "a" | ', "🙂+")

_FIELDS = {
    CHAT: tuple(ChatCompletionRequest.model_fields),
    COMPLETIONS: tuple(CompletionRequest.model_fields),
    RESPONSES: ("model", "input", "max_output_tokens", "temperature", "stream", "tools", "top_p"),
}


class Generator:
    """Draws odd requests."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(f"odd {seed}")
        self._kinds: tuple[Callable[[], Odd], ...] = (
            *([self.fields] * 8),
            *([self.prompts] * 3),
            *([self.messages] * 3),
            *([self.structures] * 2),
            self.torn,
            self.encoded,
            self.deep,
            self.headed,
            self.routed,
            self.framed,
        )

    def draw(self) -> Odd:
        return self._rng.choice(self._kinds)()

    # Bodies

    def fields(self) -> Odd:
        """Fields that vLLM knows, with values that it does not expect."""
        path = self._path()
        body = self._plain(path)
        names = self._rng.sample(_FIELDS[path], k=self._rng.choice((1, 1, 2, 3)))
        for name in names:
            body[name] = self._rng.choice(VALUES)
        return self._post("fields " + " ".join(names), path, _object(body))

    def prompts(self) -> Odd:
        body = self._plain(COMPLETIONS) | {"prompt": self._rng.choice(_PROMPTS)}
        return self._post("prompt", COMPLETIONS, _object(body))

    def messages(self) -> Odd:
        rng = self._rng
        messages = [
            f'{{"role":{json.dumps(rng.choice(_ROLES))},"content":{rng.choice(_CONTENTS)}}}'
            for _ in range(rng.choice((1, 1, 2, 5)))
        ]
        listed = f"[{','.join(messages)}]"
        value = rng.choice((listed, listed, listed, listed, *VALUES))
        return self._post("messages", CHAT, _object(self._plain(CHAT) | {"messages": value}))

    def structures(self) -> Odd:
        """Grammars of all kinds, and tools."""
        rng = self._rng
        path = rng.choice((CHAT, COMPLETIONS))
        schema, text = rng.choice(_SCHEMAS), json.dumps(rng.choice(_TEXTS))
        tool = f'[{{"type":"function","function":{{"name":"f","parameters":{schema}}}}}]'
        added = rng.choice(
            (
                {
                    "response_format": '{"type":"json_schema","json_schema":{"name":"s","schema":'
                    + schema
                    + "}}"
                },
                {"structured_outputs": f'{{"json":{schema}}}'},
                {"structured_outputs": f'{{"regex":{text}}}'},
                {"structured_outputs": f'{{"grammar":{text}}}'},
                {"structured_outputs": f'{{"choice":{rng.choice(VALUES)}}}'},
                {"tools": tool, "tool_choice": rng.choice(('"auto"', '"required"', '"none"'))},
                {"tools": tool, "tool_choice": '{"type":"function","function":{"name":"f"}}'},
            )
        )
        return self._post("structures", path, _object(self._plain(path) | added))

    def torn(self) -> Odd:
        path = self._path()
        body = _object(self._plain(path))
        cut = self._rng.randrange(len(body))
        torn = self._rng.choice(
            (body[:cut], body + body, body[:cut] + b"\xff" + body[cut:], b"", b"[]", b"5", b"null")
        )
        return self._post("torn", path, torn)

    def encoded(self) -> Odd:
        path = self._path()
        text = _object(self._plain(path)).decode()
        encoding = self._rng.choice(("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"))
        return self._post(f"encoded {encoding}", path, text.encode(encoding))

    def deep(self) -> Odd:
        path = self._path()
        depth = self._rng.choice((100, 900, 2000, 50_000))
        opened, closed = self._rng.choice((("[", "]"), ('{"a":', "}")))
        value = opened * depth + ("1" if opened != "[" else "") + closed * depth
        name = self._rng.choice(_FIELDS[path])
        body = self._plain(path) | {name: value}
        return self._post(f"deep {name}", path, _object(body))

    # Requests as such

    def headed(self) -> Odd:
        """Headers that mean something to somebody."""
        path = self._path()
        header = self._rng.choice(
            (
                b"x-request-id: " + b"x" * 9000,
                b"x-request-id: \xe9\xff",
                b"x-request-id:",
                b"x-headway-class: nonsense",
                b"x-headway-class: batch",
                b"content-encoding: gzip",
                b"accept-encoding: gzip",
                b"upgrade: h2c\r\nconnection: upgrade, http2-settings\r\nhttp2-settings: AAMAAABk",
                b"upgrade: websocket\r\nconnection: upgrade",
                b"expect: 100-continue",
                b"authorization: Bearer nonsense",
                b"content-type: text/plain",
                b"content-type: multipart/form-data; boundary=x",
                b"x-data-parallel-rank: 99",
                b"x-data-parallel-rank: nonsense",
                b"x-vllm-priority: nonsense",
                b"endpoint-load-metrics-format: JSON",
                b"traceparent: nonsense",
                b"host: elsewhere.example",
                b"origin: http://elsewhere.example",
                b"x: " + b"y" * 100_000,
            )
        )
        return self._post(f"header {header[:30]!r}", path, _object(self._plain(path)), header)

    def routed(self) -> Odd:
        """Methods and paths."""
        method = self._rng.choice(("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "POST", "X"))
        path = self._rng.choice(
            (
                *("/v1/models", "/v1/models/", "/v1/models/tiny", "/v1/models/a%2Fb", "/v1", "/"),
                *(
                    "/v1/chat/completions/",
                    "//v1/completions",
                    "/v1/completions?x=y",
                    "/v1/embeddings",
                ),
                *("/v1/../health", "/v1/%2e%2e/health", "/health", "/metrics", "/headway%2fstate"),
                *("/v1/nonsense", "/v1/\xff", "*", "/v1/completions#x", "/" + "a" * 3000),
            )
        )
        head = f"{method} {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n"
        body = b"" if method in ("GET", "HEAD", "OPTIONS") else b"{}"
        sent = head.encode("latin-1") + b"content-length: %d\r\n\r\n" % len(body) + body
        return Odd(f"route {method} {path[:30]}", sent, path)

    def framed(self) -> Odd:
        """HTTP that is not quite so."""
        body = _object(self._plain(COMPLETIONS))
        post = b"POST /v1/completions HTTP/1.1\r\nhost: h\r\nconnection: close\r\n"
        length = b"content-length: %d\r\n\r\n" % len(body)
        chunks = (
            b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in (body[:7], body[7:])) + b"0\r\n\r\n"
        )
        sent = self._rng.choice(
            (
                post + b"transfer-encoding: chunked\r\n\r\n" + chunks,
                post + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n" + chunks,
                post + b"transfer-encoding: chunked\r\n\r\nzz\r\n" + body,
                post + b"content-length: -1\r\n\r\n" + body,
                post + b"content-length: 1\r\ncontent-length: 2\r\n\r\n" + body,
                post + b"content-length: 99999999999999\r\n\r\n" + body,
                post + length + body + b"\r\n\r\n",
                post + length + body + b"GET /health HTTP/1.1\r\nhost: h\r\n\r\n",
                post.replace(b"HTTP/1.1", b"HTTP/1.0") + length + body,
                post.replace(b"HTTP/1.1", b"HTTP/9.9") + length + body,
                post.replace(b"host: h\r\n", b"") + length + body,
                b"\r\n\r\n" + post + length + body,
                b"\x16\x03\x01\x02\x00\x01",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"nonsense\r\n\r\n",
                b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
            )
        )
        return Odd("framed", sent, "/v1/completions")

    # What all have

    def _path(self) -> str:
        return self._rng.choice((CHAT, CHAT, COMPLETIONS, COMPLETIONS, RESPONSES))

    def _plain(self, path: str) -> dict[str, str]:
        """Fields of a request that is answered, by name, as JSON."""
        limit = {RESPONSES: "max_output_tokens"}.get(path, "max_tokens")
        prompt = {
            CHAT: ("messages", '[{"role":"user","content":"hi"}]'),
            COMPLETIONS: ("prompt", '"Once upon a time"'),
            RESPONSES: ("input", '"hi"'),
        }[path]
        stream = self._rng.choice(("true", "false"))
        return dict([("model", '"tiny"'), prompt, (limit, "3"), ("stream", stream)])

    def _post(self, kind: str, path: str, body: bytes, header: bytes = b"") -> Odd:
        head = b"POST %s HTTP/1.1\r\nhost: h\r\nconnection: close\r\n" % path.encode()
        if b"content-type" not in header:
            head += b"content-type: application/json\r\n"
        if header:
            head += header + b"\r\n"
        sent = head + b"content-length: %d\r\n\r\n" % len(body) + body
        leaves = self._rng.choice((None,) * 9 + (self._rng.randrange(400),))
        return Odd(kind, sent, path, leaves)


def _object(fields: dict[str, str]) -> bytes:
    """Return a JSON object of values that are JSON already."""
    inner = ",".join(f"{json.dumps(name)}:{value}" for name, value in fields.items())
    return f"{{{inner}}}".encode(errors="surrogatepass")

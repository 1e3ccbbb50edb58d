"""Uploads: what the gateway reads of a form, and what it refuses."""

import json

import msgspec
import pytest

from serving.gateway.http.errors import ApiError
from serving.gateway.intake.json_body import invoked_path, read_body
from serving.gateway.intake.multipart import read_form
from serving.gateway.intake.request_headers import RequestHeaders
from tests.serving.gateway.intake.asking import SMALL, ask, make_parser

SPEECH = "/v1/audio/transcriptions"
TYPE = b"multipart/form-data; boundary=xyz"
SOUND = bytes(range(256)) * 400


def form(*parts: tuple[str, bytes]) -> bytes:
    lines = [
        b'--xyz\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (name.encode(), value)
        for name, value in parts
    ]
    return b"".join(lines) + b"--xyz--\r\n"


def test_fields_and_file_are_found():
    data = form(("model", b"a"), ("model", b"m"), ("other", b"x" * 10**5), ("file", SOUND))
    assert read_form(TYPE, data, frozenset({"model"}), "file") == ({"model": "m"}, SOUND)


def test_numbers_are_read_as_by_vllm():
    data = form(("model", b"m"), ("stream", b"true"), ("temperature", b""), ("file", SOUND))
    body = read_body(SPEECH, data, TYPE)
    assert body.data is data
    assert body.fields.is_stream
    assert body.fields.model == "m"
    with pytest.raises(ApiError, match="stream"):
        read_body(SPEECH, form(("stream", b"perhaps"), ("file", SOUND)), TYPE)


@pytest.mark.parametrize(
    ("content_type", "data", "status"),
    [
        (b"application/json", b"{}", 415),
        (b"multipart/form-data", form(), 415),
        (TYPE, b"no form", 400),
        (TYPE, form(("file", SOUND))[:-9], 400),
        (TYPE, form(("model", b"x" * 10**5)), 400),
        (TYPE, form(*[("a", b"b")] * 101), 400),
        (TYPE, b"", 400),
    ],
)
def test_what_is_none_is_refused(content_type, data, status):
    with pytest.raises(ApiError) as refused:
        read_form(content_type, data, frozenset({"model"}), "file")
    assert refused.value.status == status


def test_a_file_counts_by_its_bytes_and_gets_no_fields_more():
    speech = msgspec.structs.replace(SMALL, tasks=("transcription",), routes=(f"POST {SPEECH}",))
    headers = RequestHeaders([], content_type=TYPE)
    asked = ask(SPEECH, form(("file", SOUND)), make_parser(speech), headers=headers)
    assert asked.request.num_prompt_tokens == len(SOUND) // 320
    assert asked.request.engines_only
    assert asked.added == {}
    with pytest.raises(ApiError, match="'file' is missing or empty"):
        ask(SPEECH, form(("model", b"")), make_parser(speech), headers=headers)


@pytest.mark.parametrize(
    ("said", "path"),
    [
        ({"messages": []}, "/v1/chat/completions"),
        ({"prompt": "a"}, "/v1/completions"),
        ({"input": "a"}, "/pooling"),
        ({"query": "a", "documents": []}, "/rerank"),
        ({"text_1": "a", "text_2": "b"}, "/score"),
    ],
)
def test_what_sagemaker_invokes(said, path):
    has = {f"POST {each}" for each in ("/v1/chat/completions", "/pooling")}
    assert invoked_path(json.dumps(said).encode(), has.__contains__) == path


def test_what_nothing_is_invoked_by():
    with pytest.raises(ApiError, match="suitable handler"):
        invoked_path(b'{"model": "m"}', lambda route: True)

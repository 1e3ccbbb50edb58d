"""What is in a file of lines, and what is wrong with it?"""

import json

import msgspec
import pytest

from serving.gateway.http.endpoints.batch.lines import (
    answer_line,
    check_file,
    error_line,
    numbered_lines,
    read_line,
    usage_of,
)
from tests.serving.gateway.http.endpoints.batch.jobs import CHAT, jsonl, line


def checked(tmp_path, content: bytes, endpoint: str = CHAT, max_lines: int = 10):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    return check_file(path, endpoint, max_lines, 1000)


def test_lines_keep_their_numbers_past_blank_ones(tmp_path):
    path = tmp_path / "in"
    path.write_bytes(b"a\n\n  \nb\r\n" + b"c" * 50 + b"\nlast")
    lines = list(numbered_lines(path, 10))
    assert [number for number, _ in lines] == [1, 4, 5, 6]
    assert lines[2][1] == b"c" * 12  # enough to see that it is too long
    assert lines[3][1] == b"last"


def test_a_right_file_has_no_errors(tmp_path):
    content = jsonl([line(1), line(2, model="b"), line(3)])
    found = checked(tmp_path, content)
    assert found.errors == []
    assert found.total == 3
    assert found.models == {"fake-model": 1, "b": 2}


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"custom_id": ""}, "invalid_request", "custom_id"),
        ({"custom_id": 5}, "invalid_request", "custom_id"),
        ({"method": "GET"}, "invalid_method", "method"),
        ({"url": "/v1/embeddings"}, "invalid_url", "url"),
        ({"body": "text"}, "invalid_request", "body"),
        ({"body": {"stream": True}}, "invalid_request", "body.stream"),
        ({"body": {"stream": "true"}}, "invalid_request", "body.stream"),
        ({"body": {"background": True}}, "invalid_request", "body.background"),
        ({"body": {"model": 1}}, "invalid_request", "body.model"),
    ],
)
def test_what_is_wrong_is_told_by_line(tmp_path, change, code, param):
    [error] = checked(tmp_path, jsonl([line(1), line(2) | change])).errors
    assert (error.code, error.param, error.line) == (code, param, 2)


@pytest.mark.parametrize("name", ["custom_id", "method", "url", "body"])
def test_what_is_missing_is_named(tmp_path, name):
    content = line(1)
    del content[name]
    [error] = checked(tmp_path, jsonl([content])).errors
    assert (error.code, error.param) == ("missing_required_parameter", name)


@pytest.mark.parametrize("text", [b"[]", b"nonsense", b'{"a": NaN}', b"\xff", b"[" * 900])
def test_what_is_no_json_is_told(tmp_path, text):
    [error] = checked(tmp_path, text).errors
    assert (error.code, error.line) == ("invalid_json_line", 1)


def test_a_file_is_neither_empty_nor_too_long(tmp_path):
    assert [error.code for error in checked(tmp_path, b"\n \n").errors] == ["empty_file"]
    [error] = checked(tmp_path, jsonl(line(number) for number in range(11))).errors
    assert error.code == "too_many_tasks"
    assert "batch.max_lines" in error.message
    [error] = checked(tmp_path, jsonl([line(1, user="x" * 1000)])).errors
    assert "gateway.max_body_bytes" in error.message


def test_no_more_than_a_hundred_errors_are_told(tmp_path):
    assert len(checked(tmp_path, b"x\n" * 500, max_lines=1000).errors) == 100


@pytest.mark.parametrize("name", ['"priority_class"', '"priority\\u005fclass"'])
def test_no_line_is_of_another_class(name):
    text = b'{"custom_id": "a", "method": "POST", "url": "/v1/x", "body": {%s: "interactive"}}'
    custom_id, url, body = read_line(text % name.encode())
    assert (custom_id, url) == ("a", "/v1/x")
    assert json.loads(body)["priority_class"] == "batch"


def test_a_body_passes_as_it_is():
    body = b'{"model": "m", "unknown": [1.0, 1e3]}'
    text = b'{"custom_id": "a", "method": "POST", "url": "/v1/x", "body": %s}' % body
    assert read_line(text)[2] == body


def test_an_answer_is_one_line_whatever_it_is():
    pretty = json.dumps({"a": "b\nc", "d": 1.50}, indent=2).encode()
    told = answer_line("batch_1", 3, "id", 200, "r", pretty)
    assert b"\n" not in told
    assert json.loads(told) == {
        "id": "batch_req_1_3",
        "custom_id": "id",
        "response": {"status_code": 200, "request_id": "r", "body": {"a": "b\nc", "d": 1.5}},
        "error": None,
    }
    odd = json.loads(answer_line("batch_1", 3, "id", 200, "r", b"no json\n"))
    assert odd["response"]["body"] == "no json\n"
    told = json.loads(error_line("batch_1", 4, "id", "batch_expired", "late"))
    assert (told["response"], told["error"]["code"]) == (None, "batch_expired")


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 2}, (5, 0, 2, 0)),
        (
            {
                "input_tokens": 5,
                "output_tokens": 2,
                "input_tokens_details": {"cached_tokens": 4},
                "output_tokens_details": {"reasoning_tokens": 1},
            },
            (5, 4, 2, 1),
        ),
        ({"prompt_tokens": 5, "total_tokens": 5, "prompt_tokens_details": None}, (5, 0, 0, 0)),
        (None, (0, 0, 0, 0)),
        ({"prompt_tokens": "many"}, (0, 0, 0, 0)),
    ],
)
def test_usage_is_read_in_the_words_of_each_endpoint(usage, expected):
    found = usage_of(json.dumps({"usage": usage}).encode())
    assert msgspec.structs.astuple(found) == expected

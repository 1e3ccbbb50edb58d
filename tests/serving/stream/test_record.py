import zlib

import msgspec
import pytest

from router.resilience.resume import Resume, ResumeSplice, ResumeSpliceError
from serving.stream.record import Entry, Recorder, count_tokens, decode_groups, num_tokens


def test_what_was_taken_together_is_a_group():
    recorder = Recorder()
    recorder.add_entry(Entry(0, (1,)), is_streamed=True)
    recorder.add_entry(Entry(1, (2, 3), 1, "stop"), is_streamed=True)
    assert recorder.take_groups() == b""  # nothing that was sent was made of these
    recorder.end_group()
    logprobs = ([[4, 5]], [[-0.5, -1.5]], [1])
    recorder.add_entry(Entry(0, (4,), None, None, logprobs), is_streamed=True)
    recorder.end_group()
    recorder.end_group()
    record = recorder.take_groups()
    assert recorder.take_groups() == b""
    assert decode_groups(record) == [
        [Entry(0, (1,)), Entry(1, (2, 3), 1, "stop")],
        [Entry(0, (4,), None, None, logprobs)],
    ]
    assert num_tokens(record) == 4


def test_records_of_two_engines_add_up():
    first, second = Recorder(), Recorder()
    for number, recorder in enumerate((first, second)):
        recorder.add_entry(Entry(0, (number,)), is_streamed=True)
        recorder.end_group()
    assert num_tokens(first.take_groups() + second.take_groups()) == 2


def test_what_is_generated_once_more_is_not_recorded_twice():
    recorder = Recorder()
    recorder.skip_entries(2)
    for number in range(4):
        recorder.add_entry(Entry(0, (number,)), is_streamed=True)
    recorder.end_group()
    assert decode_groups(recorder.take_groups()) == [[Entry(0, (2,)), Entry(0, (3,))]]


def test_of_a_reply_that_comes_at_once_progress_is_reported():
    records = []
    recorder = Recorder(lambda: records.append(recorder.take_groups()))
    for number in range(40):
        recorder.add_entry(Entry(0, (number,)), is_streamed=False)
    assert [num_tokens(record) for record in records] == [16, 16]


def test_a_record_of_several_prompts_is_none():
    recorder = Recorder()
    recorder.set_prompt_id("a")
    recorder.add_entry(Entry(0, (1,)), is_streamed=True)
    recorder.set_prompt_id("a")  # another sequence of the same prompt
    recorder.end_group()
    first = recorder.take_groups()
    assert num_tokens(first) == 1
    recorder.set_prompt_id("b")
    recorder.add_entry(Entry(0, (2,)), is_streamed=True)
    recorder.end_group()
    recorder.add_entry(
        Entry(1, (3, 4), None, None, ([[4, 5]], [[-0.5, -1.5]], [1])), is_streamed=True
    )
    recorder.end_group()
    record = first + recorder.take_groups()
    assert decode_groups(record) == []
    assert num_tokens(record) == 0
    assert count_tokens(record) == 4  # for whoever pays for it


def test_a_token_costs_few_bytes():
    recorder = Recorder()
    for number in range(1000):
        recorder.add_entry(Entry(0, (40_000 + number % 9000,)), is_streamed=True)
        recorder.end_group()
    assert len(recorder.take_groups()) <= 15_000


def test_what_is_no_record_is_refused():
    with pytest.raises(msgspec.MsgspecError):
        decode_groups(b"\x00\x00\x00\x01\xc1")


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_splice_cuts_off_what_the_client_has(size):
    whole = b"0123456789abcdef"
    splice = ResumeSplice(Resume(b"", 10, zlib.crc32(whole[:10])))
    pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
    left = [splice.cut(piece, is_last=piece is pieces[-1]) for piece in pieces]
    assert b"".join(left) == whole[10:]


def test_a_splice_that_does_not_fit_is_an_error():
    with pytest.raises(ResumeSpliceError, match="differs"):
        ResumeSplice(Resume(b"", 4, zlib.crc32(b"0123"))).cut(b"0124567", is_last=False)
    with pytest.raises(ResumeSpliceError, match="shorter"):
        ResumeSplice(Resume(b"", 4, zlib.crc32(b"0123"))).cut(b"012", is_last=True)

"""The multiplexed stream's frames."""

import pytest

from serving.stream.frames import (
    MAX_MESSAGE_BYTES,
    Ack,
    Cancel,
    Data,
    End,
    MessageBuffer,
    Submit,
    decode_to_engine,
    decode_to_gateway,
    encode,
)


def test_frames_survive_any_cut_of_the_byte_stream():
    """Whatever pieces TCP delivers, the same messages come out in order."""
    sent = [
        [Submit(1, "id", 10, 0, 0, "POST", "/v1/completions", [(b"a", b"b")], b"{}"), Ack(1, 100)],
        [Cancel(1)],
        [],
    ]
    stream = b"".join(encode(frames) for frames in sent)
    for size in (1, 3, 7, len(stream)):
        buffer, messages = MessageBuffer(), []
        for start in range(0, len(stream), size):
            buffer.feed(stream[start : start + size], messages.append)
        assert list(map(decode_to_engine, messages)) == sent


def test_all_frames_of_a_step_are_one_message():
    received = []
    frames = [Data(1, b"x"), Data(2, b"y"), End(2, None, "broken")]
    MessageBuffer().feed(encode(frames), lambda m: received.append(decode_to_gateway(m)))
    assert received == [frames]


def test_an_absurd_length_is_refused():
    """A stray HTTP client or a scanner must not make us allocate memory."""
    with pytest.raises(ValueError, match="does not speak our protocol"):
        MessageBuffer().feed((MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"), lambda message: None)

"""Frames of the multiplexed stream between one gateway and one engine.

One TCP connection per (gateway, engine) pair. A message is a 4-byte
big-endian length and a MessagePack array of frames: everything that one turn
of the event loop produced, and so one engine step, travels in one write.
The conversation is ASGI's: a request goes over as method, path, headers and
body; the response comes back as head, data and end.
"""

from collections.abc import Callable

import msgspec

from router.resilience.resume import Resume
from router.types import BlockUpdate, EngineInfo, EngineSnapshot, Usage

MAX_MESSAGE_BYTES = 256 * 2**20  # a length beyond this is garbage, not a message

Headers = list[tuple[bytes, bytes]]


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """First frame from the gateway; proves that it was told the address by Ray."""

    secret: str
    gateway_id: str


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """A request. `stream` is the router's booking number: it only grows."""

    stream: int
    request_id: str
    num_prompt_tokens: int  # the router's estimate, until vLLM has tokenised
    num_cached_tokens: int  # of these, expected in the prefix cache, until vLLM has looked
    priority: int  # vLLM's: lower is first
    method: str
    path: str
    headers: Headers
    body: bytes
    created_s: int = 0  # seconds since the epoch: what the response says of its creation
    resume: Resume | None = None


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The client left: abort the request in the engine."""

    stream: int


class Ack(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The client has taken so many bytes more; reopens the stream's window."""

    stream: int
    num_bytes: int


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """First frame from the engine."""

    info: EngineInfo


class Head(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Status and headers of a response; always followed by Data or End."""

    stream: int
    status: int
    headers: Headers


class Data(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Bytes of a response body, passed through as vLLM made them."""

    stream: int
    body: bytes
    record: bytes = b""  # what these and earlier bytes were made of, see `serving.stream.record`


class End(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """The response is complete, or, with `error` set, will never be."""

    stream: int
    usage: Usage | None
    error: str | None
    can_retry: bool = True  # another engine may do better


class Snapshot(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """The engine's state; last frame of its message."""

    snapshot: EngineSnapshot


class Blocks(msgspec.Struct, frozen=True, array_like=True, tag=20):
    """What the engine's prefix cache has taken in and dropped."""

    update: BlockUpdate


class Prompt(msgspec.Struct, frozen=True, array_like=True, tag=21):
    """vLLM has tokenised a prompt: its size, and the hashes of its whole blocks."""

    stream: int
    num_tokens: int
    block_hashes: list[int]


class Resync(msgspec.Struct, frozen=True, array_like=True, tag=22):
    """An update of the blocks was missed: tell all of them anew."""


ToEngine = Hello | Submit | Cancel | Ack | Resync
ToGateway = Welcome | Head | Data | End | Snapshot | Blocks | Prompt

_encoder = msgspec.msgpack.Encoder()
decode_to_engine = msgspec.msgpack.Decoder(list[ToEngine]).decode
decode_to_gateway = msgspec.msgpack.Decoder(list[ToGateway]).decode


def encode(frames: list[ToEngine] | list[ToGateway]) -> bytes:
    """One message, length prefix included."""
    message = bytearray(4)
    _encoder.encode_into(frames, message, 4)
    message[:4] = (len(message) - 4).to_bytes(4, "big")
    return bytes(message)


class MessageBuffer:
    """Cuts received bytes into messages.

    Raises `ValueError` from `feed` when a length is beyond `MAX_MESSAGE_BYTES`.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes, on_message: Callable[[bytes], None]) -> None:
        """Add received bytes; call `on_message` for every message now complete."""
        buffer = self._buffer
        buffer += data
        start, end = 0, len(buffer)
        while end - start >= 4:
            length = int.from_bytes(buffer[start : start + 4], "big")
            if length > MAX_MESSAGE_BYTES:
                raise ValueError(f"message of {length} bytes: the peer does not speak our protocol")
            if end - start - 4 < length:
                break
            start += 4
            on_message(bytes(buffer[start : start + length]))
            start += length
        del buffer[:start]

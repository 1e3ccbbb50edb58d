"""What do a gateway and an engine say to each other, and how is it encoded?

One TCP connection per pair of gateway and engine, with one stream per request in it. A message
is a 4-byte big-endian length and a MessagePack array of frames: everything that one iteration
of the event loop produced, and so one engine step, is sent in one write. Per stream the frames
are ASGI's: a request goes over as method, path, headers and body; the response comes back
as head, data and end.

| the gateway sends          | the engine answers                                          |
|----------------------------|-------------------------------------------------------------|
| `Hello`, first of all      | `Welcome`; it disconnects if the secret is wrong            |
| `Submit`                   | `Prompt`, `Head`, any number of `Data`, `End`; or `Busy`    |
| `Ack`                      | more `Data`, if the stream's window was used up             |
| `Cancel`                   | `End`, if it had not sent that yet                          |
| `Resync`                   | `Blocks` with all cached blocks                             |
| (nothing)                  | `Snapshot` after steps and as a heartbeat, `Blocks` before  |
|                            | it if the prefix cache has changed; `Hardware`              |

A `Welcome` may come with a second port and a token. On a connection to that port, which begins
with a `Hello` of the token, whatever computes says for itself that it lives, however busy the
replica is: `Alive` as a heartbeat, and nothing else (`serving.stream.life`).
"""

from collections.abc import Callable, Sequence

import msgspec

from router import BlockUpdate, EngineInfo, EngineSnapshot, Usage
from router.resilience.resume import Resume
from serving.engine.hardware_watch import HardwareState

MAX_MESSAGE_BYTES = 256 * 2**20  # a length beyond this is not from a peer of ours

Headers = list[tuple[bytes, bytes]]


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """First frame from the gateway. The secret proves that Ray told it the address.

    On the second connection it is the token that the first one was welcomed with.
    """

    secret: str


class Submit(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """A request. `stream` is the router's booking number, which only grows.

    Below 0: a question that is booked nowhere (`serving.gateway.questions`), as it computes
    nothing. `path` may have a query.
    """

    stream: int
    request_id: str
    num_prompt_tokens: int  # the router's estimate, used until vLLM has tokenised
    num_cached_tokens: int  # of these, expected in the prefix cache; used until vLLM has looked
    priority: int  # vLLM's: lower is first
    method: str
    path: str
    headers: Headers
    body: bytes
    created_s: int = 0  # seconds since the epoch: what the response says of its creation
    resume: Resume | None = None
    max_pending_tokens: int = 0  # given back as `Busy` if more is to be prefilled; 0: never


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Abort the request in the engine: the client left, or another engine has it."""

    stream: int


class Ack(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The client has read so many bytes more: the stream's window grows by them."""

    stream: int
    num_bytes: int


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """First frame from the engine: its model, its sizes and its process."""

    info: EngineInfo
    life_port: int = 0  # 0 where what computes cannot speak for itself
    token: str = ""  # for that port


class Head(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Status and headers of a response; `Data` or `End` always follows."""

    stream: int
    status: int
    headers: Headers


class Data(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Bytes of a response body, passed through as vLLM made them."""

    stream: int
    body: bytes
    record: bytes = b""  # what was generated for them, see `serving.stream.record`


class End(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """The response is complete or, with `error` set, will never be."""

    stream: int
    usage: Usage | None
    error: str | None
    can_retry: bool = True  # whether another engine may succeed


class Snapshot(msgspec.Struct, frozen=True, array_like=True, tag=9):
    """The engine's state; after it in its message come only `Busy` frames."""

    snapshot: EngineSnapshot


class Blocks(msgspec.Struct, frozen=True, array_like=True, tag=20):
    """Which blocks the engine's prefix cache has stored and removed."""

    update: BlockUpdate


class Prompt(msgspec.Struct, frozen=True, array_like=True, tag=21):
    """The size of a prompt as vLLM tokenised it, and the hashes of its whole blocks."""

    stream: int
    num_tokens: int
    block_hashes: list[int]


class Resync(msgspec.Struct, frozen=True, array_like=True, tag=22):
    """Send all cached blocks: the gateway has missed an update."""


class Busy(msgspec.Struct, frozen=True, array_like=True, tag=25):
    """The stream was not begun: other gateways have sent the engine more than this one knew of.

    Comes right after the `Snapshot` that says what the engine has.
    """

    stream: int


class Alive(msgspec.Struct, frozen=True, array_like=True, tag=23):
    """What computes lives: its steps since its start, and the requests that it has."""

    num_steps_total: int
    num_requests: int


class Hardware(msgspec.Struct, frozen=True, array_like=True, tag=24):
    """How the engine's hardware is; once a second, from when it is known."""

    state: HardwareState


ToEngine = Hello | Submit | Cancel | Ack | Resync
ToGateway = Welcome | Head | Data | End | Snapshot | Blocks | Prompt | Alive | Hardware | Busy

_encoder = msgspec.msgpack.Encoder()
decode_to_engine = msgspec.msgpack.Decoder(list[ToEngine]).decode
decode_to_gateway = msgspec.msgpack.Decoder(list[ToGateway]).decode


def encode(frames: Sequence[msgspec.Struct]) -> bytes:
    """Return one message, with its length prefix."""
    message = bytearray(4)
    _encoder.encode_into(frames, message, 4)
    message[:4] = (len(message) - 4).to_bytes(4, "big")
    return bytes(message)


def framed(message: bytes) -> bytes:
    """Return a message with its length prefix, as `MessageBuffer` takes it."""
    return len(message).to_bytes(4, "big") + message


class MessageBuffer:
    """Cut received bytes into messages."""

    def __init__(self, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.max_bytes = max_bytes  # of one message
        self._buffer = bytearray()

    def feed(self, data: bytes, on_message: Callable[[bytes], None]) -> None:
        """Add received bytes; call `on_message` for every message that is now complete.

        Raise `ValueError` for a length beyond `max_bytes`.
        """
        rest = self._buffer
        # Most messages come whole, in one piece: then nothing is copied twice.
        received: bytes | bytearray = data
        if rest:
            rest += data
            received = rest
        start, end = 0, len(received)
        while end - start >= 4:
            length = int.from_bytes(received[start : start + 4], "big")
            if length > self.max_bytes:
                raise ValueError(f"message of {length} bytes: the peer does not speak our protocol")
            if end - start - 4 < length:
                break
            start += 4
            on_message(bytes(received[start : start + length]))
            start += length
        if received is rest:
            del rest[:start]
        elif start < end:
            rest += data[start:]

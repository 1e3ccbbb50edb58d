"""What do two gateways say to each other, and how is it encoded?

Each gateway listens for the others, and asks each on a connection of its own: two connections for a
pair. Messages are those of the stream between gateway and engine (`serving.stream.frames`).

| who asks sends       | who is asked answers                              |
|----------------------|---------------------------------------------------|
| `Hello`, first of all | nothing; it disconnects if the secret is wrong    |
| `Ask`                | `Answer`, in any order                            |
"""

import msgspec

from serving.stream.frames import Hello


class Ask(msgspec.Struct, frozen=True, array_like=True, tag=30):
    """A question. `what` is one of those that a gateway has an answer for."""

    number: int  # grows by one for each on this connection
    what: str
    body: bytes = b""


class Answer(msgspec.Struct, frozen=True, array_like=True, tag=31):
    """The answer to one question or, with `error` set, why there is none."""

    number: int
    body: bytes = b""
    error: str = ""


ToPeer = Hello | Ask

decode_to_peer = msgspec.msgpack.Decoder(list[ToPeer]).decode
decode_answers = msgspec.msgpack.Decoder(list[Answer]).decode

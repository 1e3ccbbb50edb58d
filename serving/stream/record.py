"""What an engine has generated for one request, kept by the gateway until the reply is complete.

With it another engine can go on where this one broke off. A record is a row of
*groups*, each of them what the API layer took from the engine at one time:
given the same groups again, it writes the same bytes again, whatever became of
them on the way (parsers, stop strings, merged chunks). Opaque to the gateway,
which only keeps the bytes and adds to them: about 12 per token.

On the wire: groups as a 4-byte big-endian length and MessagePack.
"""

from collections.abc import Callable

import msgspec

from serving.stream.frames import MessageBuffer

# Of a reply that is not streamed nothing is due before its end; so many entries
# later the gateway hears of them all the same. Little enough to compute again.
_PROGRESS_ENTRIES = 16

# Per position: ids, log probabilities and ranks, as vLLM's sampler gave them.
Logprobs = tuple[list[list[int]], list[list[float]], list[int]]


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """What one step brought to one sequence of a request."""

    index: int  # of the sequence, OpenAI's `choices[].index`
    token_ids: tuple[int, ...]
    finish_reason: int | None = None  # vLLM's `FinishReason`
    stop_reason: int | str | None = None
    logprobs: Logprobs | None = None


Group = list[Entry]

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Group)


class Recorder:
    """Writes the record of one request, in its engine."""

    __slots__ = ("_entries", "_groups", "_is_spoiled", "_num_known", "_owner", "on_progress")

    def __init__(self) -> None:
        self._owner: str | None = None
        self._is_spoiled = False
        self._num_known = 0
        self.on_progress: Callable[[], None] = lambda: None
        self._entries: Group = []
        self._groups = bytearray()

    def own(self, owner: str) -> None:
        """Whose tokens these are. A record of several prompts tells too little: it is spoiled."""
        if self._owner not in (None, owner) and not self._is_spoiled:
            self._is_spoiled = True
            self._write([])
        self._owner = owner

    def skip(self, num_entries: int) -> None:
        """The gateway has so many already: they are generated once more."""
        self._num_known = num_entries

    def add(self, entry: Entry, *, is_streamed: bool) -> None:
        """A step has brought this."""
        if self._is_spoiled:
            return
        if self._num_known:
            self._num_known -= 1
            return
        self._entries.append(entry)
        if not is_streamed and len(self._entries) >= _PROGRESS_ENTRIES:
            self.cut()
            self.on_progress()

    def cut(self) -> None:
        """The API layer has taken all there is: that was one group."""
        if self._entries:
            self._write(self._entries)
            self._entries.clear()

    def _write(self, group: Group) -> None:
        encoded = _encoder.encode(group)
        self._groups += len(encoded).to_bytes(4, "big")
        self._groups += encoded

    def take(self) -> bytes:
        """The groups that were cut and not taken yet; what was sent so far is made of these."""
        if not self._groups:
            return b""
        groups = bytes(self._groups)
        self._groups.clear()
        return groups


def groups(record: bytes) -> list[Group]:
    """The groups of a record, none if it is spoiled.

    Raises `msgspec.MsgspecError` for what is no record.
    """
    found: list[Group] = []
    MessageBuffer().feed(record, lambda message: found.append(_decoder.decode(message)))
    return found if all(found) else []


def num_tokens(record: bytes) -> int:
    """Tokens in a record, over all sequences."""
    return sum(len(entry.token_ids) for group in groups(record) for entry in group)

"""What has an engine generated for one request, so that another engine can go on from there?

The gateway keeps the record until the reply is complete. A record is a sequence of
*groups*. One group is what the API layer fetched from the engine at one time:
given the same groups again, it writes the same bytes again, whatever parsers,
stop strings and merged chunks do to them. The gateway does not look into a record;
it only stores and appends the bytes, about 12 per token.

Encoding: each group is a 4-byte big-endian length and MessagePack.
"""

from collections.abc import Callable

import msgspec

from serving.stream.frames import MessageBuffer

# Of a reply that is not streamed no bytes are due before its end. After so many
# entries its record is sent all the same: few enough tokens to compute again.
_PROGRESS_ENTRIES = 16

# Per position: ids, log probabilities and ranks, as vLLM's sampler gave them.
Logprobs = tuple[list[list[int]], list[list[float]], list[int]]


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """What one step added to one sequence of a request."""

    index: int  # of the sequence, OpenAI's `choices[].index`
    token_ids: tuple[int, ...]
    finish_reason: int | None = None  # vLLM's `FinishReason`
    stop_reason: int | str | None = None
    logprobs: Logprobs | None = None


Group = list[Entry]

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Group)


class Recorder:
    """Write the record of one request, inside its engine.

    A request with several prompts cannot be recorded: entries do not name their prompt.
    Its record becomes invalid at the second prompt and stays so.
    """

    __slots__ = (
        "_entries",
        "_groups",
        "_is_invalid",
        "_num_known_entries",
        "_on_progress",
        "_prompt_id",
    )

    def __init__(self, on_progress: Callable[[], None] = lambda: None) -> None:
        """`on_progress` is called when groups should be sent though no body is due."""
        self._prompt_id: str | None = None
        self._is_invalid = False
        self._num_known_entries = 0
        self._on_progress = on_progress
        self._entries: Group = []
        self._groups = bytearray()

    def set_prompt_id(self, prompt_id: str) -> None:
        """Note whose tokens come next. A second prompt makes the record invalid."""
        if self._prompt_id not in (None, prompt_id) and not self._is_invalid:
            self._is_invalid = True
            self._write_group([])
        self._prompt_id = prompt_id

    def skip_entries(self, num_entries: int) -> None:
        """Do not record the next entries: they are generated again, and the gateway has them."""
        self._num_known_entries = num_entries

    def add_entry(self, entry: Entry, *, is_streamed: bool) -> None:
        """Record what a step has generated."""
        if self._is_invalid:
            return
        if self._num_known_entries:
            self._num_known_entries -= 1
            return
        self._entries.append(entry)
        if not is_streamed and len(self._entries) >= _PROGRESS_ENTRIES:
            self.end_group()
            self._on_progress()

    def end_group(self) -> None:
        """Close the current group: the API layer has fetched all there is."""
        if self._entries:
            self._write_group(self._entries)
            self._entries.clear()

    def _write_group(self, group: Group) -> None:
        encoded = _encoder.encode(group)
        self._groups += len(encoded).to_bytes(4, "big")
        self._groups += encoded

    def take_groups(self) -> bytes:
        """Return the closed groups not returned before; bytes sent so far are made of them."""
        if not self._groups:
            return b""
        groups = bytes(self._groups)
        self._groups.clear()
        return groups


def decode_groups(record: bytes) -> list[Group]:
    """Return the groups of a record, none if it is invalid.

    Raise `msgspec.MsgspecError` for bytes that are no record.
    """
    groups: list[Group] = []
    MessageBuffer().feed(record, lambda message: groups.append(_decoder.decode(message)))
    return groups if all(groups) else []


def num_tokens(record: bytes) -> int:
    """Return the number of tokens in a record, over all sequences."""
    return sum(len(entry.token_ids) for group in decode_groups(record) for entry in group)

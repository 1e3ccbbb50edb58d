"""From a body to numbers for what its instruction says.

The instruction is the last message of the user. Of a long one its beginning and its end are read:
what is to be done stands there, and what lies between is what it is to be done with.
"""

import re
import zlib

import msgspec

from serving.gateway.intake.length.cues import (
    FIRST_ASKED,
    FIRST_LINES,
    FIRST_OPTION,
    FIRST_SIZE,
    FIRST_WORD,
    LEXICON,
    NUMBERS,
    OPTIONS,
    UNITS,
)

NUM_FEATURES = 1 << 17
# Of an instruction, in characters; and words of both parts together.
_HEAD, _TAIL = 480, 240
_MAX_WORDS = 96
# A conversation of more is not taken apart, only its end is read: 64 KB take 60 µs.
_MAX_BYTES = 1 << 16
_OPTION = {name: FIRST_OPTION + number for number, name in enumerate(OPTIONS)}
_WORDS = re.compile(r"[a-z]+|\d+|[_?]+|[^\x00-\x7f]").findall
_SPAN = NUM_FEATURES - FIRST_WORD
_CUE_OF = {zlib.crc32(phrase.encode()): number for phrase, number in LEXICON.items()}
# Words whose checksums are kept: those of a language, and no more of what clients make up.
_MAX_KEPT_WORDS, _MAX_KEPT_CHARS = 1 << 15, 24


class _Checksums(dict[str, int]):
    """CRC-32 of words, most of which come again and again."""

    def __missing__(self, word: str) -> int:
        checksum = zlib.crc32(word.encode())
        if len(word) <= _MAX_KEPT_CHARS:
            if len(self) >= _MAX_KEPT_WORDS:
                self.clear()
            self[word] = checksum
        return checksum


_checksum_of = _Checksums().__getitem__


class Wording(msgspec.Struct, frozen=True):
    """What the router is told of a request's text."""

    features: tuple[int, ...]  # ascending, each once
    system_prompt: int = 0  # the same number for the same one; 0: none


class _Message(msgspec.Struct):
    role: str = ""
    content: msgspec.Raw = msgspec.Raw(b"")


class _Part(msgspec.Struct):
    text: str = ""


_decode_messages = msgspec.json.Decoder(list[_Message]).decode
_decode_parts = msgspec.json.Decoder(list[_Part]).decode
_decode_text = msgspec.json.Decoder(str).decode
NO_WORDING = Wording(())


def read_wording(data: bytes, prompt: bytes) -> Wording:
    """Return how a request is worded; `prompt` is the JSON of its messages or its text, in `data`.

    Never fails: what cannot be read says nothing.
    """
    try:
        turns, system, text = _parts(prompt)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return NO_WORDING
    features = instruction_features(text)
    _add_options(features, data, prompt)
    if system:
        features.add(_OPTION["system prompt"])
    if turns > 1:
        features.add(_OPTION["second turn" if turns == 2 else "later turn"])
    return Wording(tuple(sorted(features)), zlib.crc32(system) + 1 if system else 0)


def instruction_features(text: str) -> set[int]:
    """Return the numbers of all that is looked at in an instruction."""
    num_chars = len(text)
    if num_chars > _HEAD + _TAIL:
        text = f"{text[:_HEAD]}\n{text[-_TAIL:]}"
    words = _WORDS(text.lower())
    if len(words) > _MAX_WORDS:
        words = words[: 2 * _MAX_WORDS // 3] + words[-_MAX_WORDS // 3 :]
    features = {
        FIRST_SIZE + min(num_chars.bit_length(), 15),
        FIRST_LINES + min(text.count("\n"), 7),
    }
    crc32 = zlib.crc32
    singles = list(map(_checksum_of, words))
    # Of "one other" it is that of " other", begun with that of "one".
    checksums = [*singles, *map(crc32, [f" {word}".encode() for word in words[1:]], singles)]
    features.update([_CUE_OF[found] for found in _CUE_OF.keys() & checksums])
    if words:
        first = f"^{words[0]}"
        for place in (first, " ".join([first, *words[1:2]]), f"${words[-1]}"):
            checksums.append(crc32(place.encode()))
    features.update([FIRST_WORD + checksum % _SPAN for checksum in checksums])
    if "?" in words:
        features.add(_OPTION["question"])
    if "```" in text:
        features.add(_OPTION["code block"])
    if not text.isascii() and sum(word > "\x7f" for word in words) > len(words) // 3:
        features.add(_OPTION["not Latin"])
    if (num_asked := _num_asked_tokens(words)) is not None:
        features.add(FIRST_ASKED + min(int(num_asked).bit_length(), 13))
    return features


def _num_asked_tokens(words: list[str]) -> float | None:
    """Return the tokens of what is asked for by number; None if nothing is."""
    if UNITS.keys().isdisjoint(words):
        return None
    for index, word in enumerate(words):
        unit = UNITS.get(word)
        if unit is None or not index:
            continue
        for before in (words[index - 1], words[index - 2] if index > 1 else ""):
            number = int(before) if before.isdecimal() and len(before) < 6 else NUMBERS.get(before)
            if number:
                return number * unit
    return None


def _parts(prompt: bytes) -> tuple[int, bytes, str]:
    """Return the user's turns, the system prompt's JSON, and the last turn's text."""
    if len(prompt) > _MAX_BYTES:
        return 3, b"", prompt[-_HEAD - _TAIL :].decode(errors="ignore")
    if not prompt.startswith(b"[") or prompt[1:].lstrip()[:1] != b"{":
        return 1, b"", _text(prompt)
    messages = _decode_messages(prompt)
    asked = [each for each in messages if each.role == "user"]
    system = b""
    if messages and messages[0].role in ("system", "developer"):
        system = bytes(messages[0].content)
    return len(asked), system, _text(bytes(asked[-1].content)) if asked else ""


def _text(content: bytes) -> str:
    """Return a text, or all texts of a list of parts; of token ids none."""
    if content[:1] == b'"':
        return _decode_text(content)
    if content[:1] == b"[" and content[1:].lstrip()[:1] == b"{":
        return "\n".join([part.text for part in _decode_parts(content)])
    return ""


def _add_options(features: set[int], data: bytes, prompt: bytes) -> None:
    """Add what is asked for beside the prompt: formats, tools, effort."""
    start = data.find(prompt)
    rest = data[:start] + data[start + len(prompt) :] if start >= 0 else b""
    if len(rest) < 40:  # a model and little else
        return
    rest = rest[:4096]
    if b'"tools"' in rest:
        features.add(_OPTION["tools"])
    if b"json_schema" in rest or b"json_object" in rest:
        features.add(_OPTION["json"])
    if b'"stop"' in rest:
        features.add(_OPTION["stop"])
    if b'effort"' in rest:
        if b'"low"' in rest or b'"none"' in rest or b'"minimal"' in rest:
            features.add(_OPTION["low effort"])
        elif b'"high"' in rest:
            features.add(_OPTION["high effort"])

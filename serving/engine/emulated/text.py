"""How does an emulated engine cut text into tokens, and what are the tokens of its replies?

A reply's token is a word such as " 3fa9.17": a seed from the prompt, and the token's number. It
depends on the prompt and its position alone, whichever engine sends it. A prompt that ends with
such a word (a reply that broke off, sent again for its rest) continues that reply: " 3fa9.18". So
does a resumed reply by the ids in its record, and by nothing else: a wrong record is seen.
"""

import re
import zlib
from collections.abc import Callable, Sequence
from hashlib import blake2b

# About as a byte-pair vocabulary cuts English: a word of up to 12 letters with the space before
# it is one token.
_TOKEN = re.compile(r"\s?\S{1,12}|\s")
_REPLY_END = re.compile(r"(?:^|\s)([0-9a-f]{4})\.(\d{1,9})$")
# A prompt given as token ids continues a reply where its last id is one of a reply's: they
# start here, beyond every vocabulary, and hold seed and number.
_FIRST_REPLY_ID = 1 << 40
_IDS_PER_SEED = 1 << 24


class Prompt:
    """The tokens of one prompt, as text or as ids."""

    def __init__(self, tokens: Sequence[str | int]) -> None:
        """`tokens` must not be empty."""
        self._tokens = tokens
        self.num_tokens = len(tokens)
        self.seed, self.num_reply_tokens = self._continues() or (self._own_seed(), 0)

    @classmethod
    def of_text(cls, text: str) -> "Prompt":
        """Return the prompt of a text. Raises `ValueError` if it is empty."""
        if not text:
            raise ValueError("the prompt is empty")
        return cls(_TOKEN.findall(text))

    def followed_by(self, token_ids: Sequence[int]) -> "Prompt":
        """Return the prompt with these tokens at its end."""
        return Prompt([*self._tokens, *token_ids]) if token_ids else self

    def hashes(self, num_tokens: int, salt: str = "") -> tuple[int, ...]:
        """Return the chained hashes of the whole blocks of `num_tokens` each.

        Prompts of different salts have none in common.
        """
        hashes = []
        chain = blake2b(salt.encode(), digest_size=8).digest() if salt else b""
        for end in range(num_tokens, self.num_tokens + 1, num_tokens):
            block = "\0".join(map(str, self._tokens[end - num_tokens : end])).encode()
            chain = blake2b(block, key=chain, digest_size=8).digest()
            hashes.append(int.from_bytes(chain, "big"))
        return tuple(hashes)

    def token_ids(self, start: int, end: int) -> list[int]:
        """Return the ids of the tokens from `start` up to `end`; for text, its checksums."""
        return [
            token if isinstance(token, int) else zlib.crc32(token.encode())
            for token in self._tokens[start:end]
        ]

    def word(self, index: int) -> Callable[[int], bytes]:
        """Return a function from a reply token's number, from 1, to its text.

        `index` counts the choices of a request that asks for several.
        """
        start = f" {(self.seed + index) & 0xFFFF:04x}.".encode()
        before = self.num_reply_tokens
        return lambda number: b"%b%d" % (start, before + number)

    def reply_id(self, number: int) -> int:
        """Return the id of a reply's token by its number, from 1."""
        return _FIRST_REPLY_ID + self.seed * _IDS_PER_SEED + self.num_reply_tokens + number

    def _continues(self) -> tuple[int, int] | None:
        last = self._tokens[-1]
        if isinstance(last, int):
            return _of_reply(last)
        match = _REPLY_END.search(last)
        return (int(match[1], 16), int(match[2])) if match else None

    def _own_seed(self) -> int:
        return zlib.crc32("\0".join(map(str, self._tokens)).encode()) & 0xFFFF


def reply_word(token_id: int) -> bytes:
    """Return the text of a reply's token by its id; of any other, the id itself."""
    seed_and_number = _of_reply(token_id)
    return b" %04x.%d" % seed_and_number if seed_and_number else b" %d" % token_id


def _of_reply(token_id: int) -> tuple[int, int] | None:
    """Return seed and number of a reply's token; None for any other."""
    seed, number = divmod(token_id - _FIRST_REPLY_ID, _IDS_PER_SEED)
    return (seed, number) if 0 <= seed <= 0xFFFF else None

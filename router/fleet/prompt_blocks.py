"""Which KV blocks does a prompt consist of, as far as it begins like one seen before?"""

from collections import OrderedDict

import msgspec

from router.types import Request

# Text blocks remembered, some 250 bytes each: 25 MB. At 64 tokens a block that is
# 6 million tokens of prompt text, more than most fleets can cache.
_MAX_TEXT_BLOCKS = 100_000


class _Piece(msgspec.Struct, frozen=True, gc=False):
    """KV blocks that end within one text block: those of the prompt from index `first` on."""

    first: int
    blocks: tuple[int, ...]


class PromptBlocks:
    """Learns from the engines which text prefix becomes which KV blocks.

    A gateway sees text and engines cache tokens. Instead of tokenising every
    prompt a second time, the gateway learns from the engine that has tokenised it: its
    size and the hashes of its blocks. A later prompt that begins with the same
    text begins with the same blocks, up to where the two differ; text that nobody
    has sent yet is cached nowhere. (Except as an answer, which an engine caches
    as well: a follow-up in a conversation is found up to the former prompt.)

    Where in the text a KV block ends is estimated in proportion, so the last block
    before two prompts differ may be counted or missed wrongly.
    """

    __slots__ = ("_pieces",)

    def __init__(self) -> None:
        self._pieces: OrderedDict[int, _Piece] = OrderedDict()  # by chained hash of the text

    def __len__(self) -> int:
        return len(self._pieces)

    def learn(
        self, request: Request, num_prompt_tokens: int, block_hashes: list[int], block_size: int
    ) -> None:
        """Take in an engine's blocks of a prompt; forget the least recently seen ones."""
        num_tokens_each = request.prefix_block_share * num_prompt_tokens
        pieces = []
        first = 0
        for number, text in enumerate(request.prefix_hashes, start=1):
            end = round(number * num_tokens_each) // block_size
            pieces.append((text, _Piece(first, tuple(block_hashes[first:end]))))
            first = end
        # The beginning of a prompt last, so that it is forgotten after what follows it.
        for text, piece in reversed(pieces):
            self._pieces[text] = piece
            self._pieces.move_to_end(text)
        for _ in range(len(self._pieces) - _MAX_TEXT_BLOCKS):
            self._pieces.popitem(last=False)

    def find(self, request: Request) -> tuple[int, ...]:
        """Return the leading KV blocks of the prompt that are known, () if none."""
        blocks: list[int] = []
        for text in request.prefix_hashes:
            piece = self._pieces.get(text)
            # Prompts with other tokens per text are cut elsewhere: drop overlaps, end at a gap.
            if piece is None or piece.first > len(blocks):
                break
            blocks[piece.first :] = piece.blocks
        return tuple(blocks)

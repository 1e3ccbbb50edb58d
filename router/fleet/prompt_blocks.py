"""Which KV blocks does a prompt consist of, as far as it begins like one seen before?"""

import msgspec

from router.types import PREFIX_BLOCK_TOKENS, Request

# What is known of one text block, as measured: its key and what it maps to (48 bytes each), and
# its place in a dictionary (24 to 100, by how full that is).
ENTRY_BYTES = 180
# In all. At two generations of 64 tokens a block that is 50 million tokens of KV cache: a hundred
# H100s with a model of 8 billion parameters. Larger fleets remember less than they cache.
MAX_BYTES = 256 * 2**20
_MAX_BLOCKS = MAX_BYTES // (2 * ENTRY_BYTES)
# However small the caches are: what a few of the longest prompts consist of.
_MIN_PROMPTS = 4

# Of what is known of a long prompt, its first and last text blocks are told one by one, for there
# prompts part and caches end. Of those between, every so manieth: an engine that has evicted the
# end of a prompt is then taken to hold 1,000 tokens less than it does, at most.
_DENSE = 64
_STRIDE = 16

# A piece is one number, the smallest thing that holds it: the hash of the last KV block that ends
# in its text block, plus one (0: none ends there), tokens of the text behind that, and tokens of
# all the text.
_TOKEN_BITS, _REST_BITS = 24, 12
_REST_SHIFT, _HASH_SHIFT = _TOKEN_BITS, _TOKEN_BITS + _REST_BITS
_MAX_TOKENS, _MAX_REST = (1 << _TOKEN_BITS) - 1, (1 << _REST_BITS) - 1


class PrefixMemoryState(msgspec.Struct, frozen=True, kw_only=True):
    """How much is remembered of which text became which KV blocks."""

    num_blocks: int  # text blocks of about 64 tokens
    max_blocks: int  # by the KV capacity of the engines, within `max_bytes`
    num_bytes: int  # estimated
    max_bytes: int


class PromptBlocks:
    """Learns from the engines which text prefix becomes which KV blocks.

    A gateway sees text and engines cache tokens. Instead of tokenising every
    prompt a second time, the gateway learns from the engine that has tokenised it: its
    size and the hashes of its blocks. A later prompt that begins with the same
    text begins with the same blocks, up to where the two differ; text that nobody
    has sent yet is cached nowhere. Except as an answer, which an engine caches as well: by
    the text before it a follow-up in a conversation is known to its end (`learn_answer`).

    Where in the text a KV block ends is estimated in proportion, from the end of what was known
    before on, so the last block before two prompts differ may be counted or missed wrongly.

    What is remembered is as much as the engines can cache, and what was seen since then: two
    generations, of which the older one is forgotten when the younger one is full. A prompt takes
    all that it begins with to the younger one. So what is known of a text is always a prefix of
    it, found by bisection; and of a conversation's next turn only what is new costs anything.
    """

    __slots__ = ("_max_young", "_old", "_young")

    def __init__(self) -> None:
        self._young: dict[int, int] = {}  # pieces by chained hash of the text
        self._old: dict[int, int] = {}
        self._max_young = _MAX_BLOCKS

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def fit(self, num_kv_tokens: int, max_model_len: int) -> None:
        """Remember as much as engines of so many KV tokens cache, at least a few long prompts."""
        num_tokens = max(num_kv_tokens, _MIN_PROMPTS * max_model_len)
        self._max_young = max(1, min(_MAX_BLOCKS, num_tokens // PREFIX_BLOCK_TOKENS))

    def learn(
        self, request: Request, num_prompt_tokens: int, block_hashes: list[int], block_size: int
    ) -> None:
        """Take in an engine's blocks of a prompt; forget what was not seen for longest."""
        texts = request.prefix_hashes
        if not texts:
            return
        self._make_room()
        num_known = self._num_known(texts)
        num_before = 0  # tokens of the text that is known
        if num_known:
            last = self._piece(texts[num_known - 1])
            num_before = last & _MAX_TOKENS
            end = num_before // block_size
            # Chained hashes: where one is the same, all before it are.
            if end > len(block_hashes) or last >> _HASH_SHIFT != _marked(block_hashes, end):
                num_known = num_before = 0
        young, old = self._young, self._old
        for index in range(num_known - 1, -1, -1):
            text = texts[index]
            if text in young:
                break  # and so is all before it
            young[text] = old[text]
        num_blocks = 1.0 / request.prefix_block_share if request.prefix_block_share else 1.0
        num_each = max(0, num_prompt_tokens - num_before) / max(1.0, num_blocks - num_known)
        num_hashes = len(block_hashes)
        exact = num_before + 0.5
        for index in range(num_known, len(texts)):  # a long prompt's thousands: no call in here
            exact += num_each
            num_tokens = int(exact)
            end = num_tokens // block_size
            if end > num_hashes:
                end = num_hashes
            num_rest = num_tokens - end * block_size
            if num_rest > _MAX_REST or num_tokens > _MAX_TOKENS:
                break  # more than a prompt can have of what no block holds
            marked = block_hashes[end - 1] + 1 if end else 0
            young[texts[index]] = marked << _HASH_SHIFT | (num_rest << _REST_SHIFT | num_tokens)

    def learn_answer(
        self, request: Request, num_tokens: int, last_block: int, block_size: int
    ) -> None:
        """Take in the last whole KV block of a prompt and its answer, and the tokens of both."""
        if request.end_hash:
            # The last token was generated and never computed.
            num_rest = num_tokens - (num_tokens - 1) // block_size * block_size
            self._young[request.end_hash] = (
                last_block + 1 << _HASH_SHIFT
                | min(num_rest, _MAX_REST) << _REST_SHIFT
                | min(num_tokens, _MAX_TOKENS)
            )

    def find(self, request: Request) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return KV blocks of the prompt that are known, and its tokens up to the end of each.

        In order, and not all of a long prompt's: an engine that holds one holds all before it.
        The tokens are in proportion to what the prompt is taken to have.
        """
        texts = request.prefix_hashes
        hashes: list[int] = []
        ends: list[int] = []
        num_known = self._num_known(texts)
        if num_known:
            num_each = request.prefix_block_share * request.num_prompt_tokens
            num_before = end_before = 0  # tokens as they were learned, and of this prompt
            index = 0
            while index < num_known:
                piece = self._piece(texts[index])
                index += 1
                num_rest = piece >> _REST_SHIFT & _MAX_REST
                num_tokens = (piece & _MAX_TOKENS) - num_rest
                end = int(index * num_each + 0.5) - num_rest
                # Of prompts that were learned by other sizes some pieces may overlap.
                if num_tokens > num_before and end > end_before:
                    num_before, end_before = num_tokens, end
                    hashes.append((piece >> _HASH_SHIFT) - 1)
                    ends.append(end)
                if _DENSE <= index < num_known - _DENSE - _STRIDE:
                    index += _STRIDE - 1
        answer = self._piece(request.answered_hash) if request.answered_hash else 0
        if answer:
            num_rest = answer >> _REST_SHIFT & _MAX_REST
            end = round(request.answered_share * request.num_prompt_tokens) - num_rest
            if end > (ends[-1] if ends else 0):
                hashes.append((answer >> _HASH_SHIFT) - 1)
                ends.append(end)
        return tuple(hashes), tuple(ends)

    def state(self) -> PrefixMemoryState:
        """Return how much is remembered, and how much may be."""
        return PrefixMemoryState(
            num_blocks=len(self),
            max_blocks=2 * self._max_young,
            num_bytes=len(self) * ENTRY_BYTES,
            max_bytes=MAX_BYTES,
        )

    def _num_known(self, texts: tuple[int, ...]) -> int:
        """Return how many of a prompt's text blocks are known; these come first."""
        young, old = self._young, self._old
        low, high = 0, len(texts)
        if not high or not (texts[0] in young or texts[0] in old):
            return 0
        while low < high:
            middle = (low + high) >> 1
            text = texts[middle]
            if text in young or text in old:
                low = middle + 1
            else:
                high = middle
        return low

    def _piece(self, text: int) -> int:
        """Return what is known of a text; 0 if nothing is."""
        piece = self._young.get(text)
        if piece is None:
            piece = self._old.get(text, 0)
        return piece

    def _make_room(self) -> None:
        """Forget the older generation if the younger one is full, for it is the older one now."""
        if len(self._young) >= self._max_young:
            self._old = self._young
            self._young = {}


def _marked(block_hashes: list[int], end: int) -> int:
    """Return the hash of the last of the first `end` blocks as a piece holds it."""
    return block_hashes[end - 1] + 1 if end else 0

"""How much of a prompt does an engine's prefix cache hold, as far as this gateway knows?"""

from collections.abc import Container

from router.types import BlockUpdate, Request

# No update continues from here, so only a whole one is accepted.
_LOST = -2
# Of a long prompt's text blocks every sixteenth counts as in use: about 1,000 tokens.
_USED_STEP = 16
_FIRST_USED = _USED_STEP - 1


class PrefixCache:
    """The KV blocks that an engine has reported, and the prompts on their way there.

    A prompt that is sent there counts as held from `expect_prompt` until `confirm_prompt`:
    a second one with the same prefix will find it. From then on only the engine's own
    reports count.
    """

    __slots__ = ("_blocks", "_position", "_used", "coming")

    def __init__(self) -> None:
        self._blocks: set[int] = set()  # by hash
        self._position = 0  # changes to them that we know of
        # Text blocks of prompts sent there that the engine has not reported yet, counted.
        self.coming: dict[int, int] = {}
        # Every so manieth text block of long prompts that run there, or are sent there, counted.
        self._used: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: object) -> bool:
        return block in self._blocks

    def num_tokens(self, request: Request) -> int:
        """Return the prompt tokens that it holds or will hold, as far as is known.

        Whole blocks. vLLM frees the last blocks of a prompt first, so those held
        come before those that are not, and their number is found by bisection.
        """
        return self.num_tokens_of(
            request.block_hashes,
            request.block_ends,
            request.prefix_hashes,
            request.prefix_block_share,
            request.num_prompt_tokens,
        )

    def num_tokens_of(
        self,
        block_hashes: tuple[int, ...],
        block_ends: tuple[int, ...],
        prefix_hashes: tuple[int, ...],
        prefix_block_share: float,
        num_prompt_tokens: int,
    ) -> int:
        """Return the same, given what it depends on: for who asks many caches at once."""
        num_held = _num_leading(block_hashes, self._blocks)
        num_tokens = block_ends[num_held - 1] if num_held else 0
        if self.coming and prefix_hashes:
            share = _num_leading(prefix_hashes, self.coming) * prefix_block_share
            num_tokens = max(num_tokens, round(share * num_prompt_tokens))
        # The prompt's own size may be an estimate still, and its last token is always computed.
        return min(num_tokens, max(0, num_prompt_tokens - 1))

    def num_used_tokens(self, request: Request) -> int:
        """Return the prompt tokens that it shares with long prompts that run there, about.

        Their blocks are in use, so they are no part of the free room, and need none.
        """
        if not self._used:
            return 0
        num_used = _num_leading(request.prefix_hashes[_FIRST_USED::_USED_STEP], self._used)
        share = num_used * _USED_STEP * request.prefix_block_share
        return int(share * request.num_prompt_tokens)

    def use_prompt(self, request: Request) -> None:
        """Count a long prompt until `release_prompt` as one that holds its blocks there."""
        used = self._used
        for text in request.prefix_hashes[_FIRST_USED::_USED_STEP]:
            used[text] = used.get(text, 0) + 1

    def release_prompt(self, request: Request) -> None:
        """Stop counting a long prompt."""
        used = self._used
        for text in request.prefix_hashes[_FIRST_USED::_USED_STEP]:
            if used[text] > 1:
                used[text] -= 1
            else:
                del used[text]

    def expect_prompt(self, request: Request) -> None:
        """Count a prompt that is on its way there."""
        coming = self.coming
        for text in request.prefix_hashes:
            coming[text] = coming.get(text, 0) + 1

    def confirm_prompt(self, request: Request) -> None:
        """Stop counting a prompt that the engine has reported, or never will."""
        coming = self.coming
        for text in request.prefix_hashes:
            if coming[text] > 1:
                coming[text] -= 1
            else:
                del coming[text]

    def receive(self, update: BlockUpdate) -> bool:
        """Install an update. Return False if one was missed: then nothing counts as cached."""
        if update.since < 0:
            self._blocks = set(update.stored)
        elif update.since == self._position:
            self._blocks.update(update.stored)
            self._blocks.difference_update(update.removed)
        else:
            self._blocks, self._position = set(), _LOST
            return False
        self._position = update.until
        return True


def _num_leading(hashes: tuple[object, ...], held: Container[object]) -> int:
    """Return how many of the first hashes are held; those held come first."""
    if not hashes or hashes[0] not in held:
        return 0
    # Bisection by hand: asked for every engine at every decision, hence no call per hash.
    low, high = 0, len(hashes)
    while low < high:
        middle = (low + high) >> 1
        if hashes[middle] in held:
            low = middle + 1
        else:
            high = middle
    return low

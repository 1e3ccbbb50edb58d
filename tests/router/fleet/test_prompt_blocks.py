from hypothesis import given
from hypothesis import strategies as st

from router.fleet import prompt_blocks
from router.fleet.prompt_blocks import PromptBlocks
from router.types import Request
from tests.support.builders import req

BLOCK = 16  # tokens per KV block


def prompt(*texts: int, tokens_each: int = 64) -> Request:
    """A prompt of these text blocks, and of nothing else; a number stands for all up to it."""
    return req(
        "a", tokens_each * len(texts), prefix_hashes=texts, prefix_block_share=1 / len(texts)
    )


def learn(prompts: PromptBlocks, request: Request, first: int = 0) -> list[int]:
    """Have an engine tokenise a prompt; return its KV blocks, numbered from `first`."""
    blocks = list(range(first, first + request.num_prompt_tokens // BLOCK))
    prompts.learn(request, request.num_prompt_tokens, blocks, BLOCK)
    return blocks


def test_a_prompt_seen_before_is_known_whole():
    prompts = PromptBlocks()
    blocks = learn(prompts, prompt(1, 2, 3))
    assert prompts.find(prompt(1, 2, 3)) == tuple(blocks)
    assert len(blocks) == 12


def test_a_longer_prompt_is_known_as_far_as_it_is_the_same():
    prompts = PromptBlocks()
    blocks = learn(prompts, prompt(1, 2))
    assert prompts.find(prompt(1, 2, 3, 4)) == tuple(blocks)
    assert prompts.find(prompt(1, 5)) == tuple(blocks[:4])


def test_what_begins_otherwise_is_not_known():
    prompts = PromptBlocks()
    learn(prompts, prompt(1, 2))
    assert prompts.find(prompt(7, 8)) == ()
    assert prompts.find(req("a", 500)) == ()


def test_text_blocks_may_be_smaller_than_kv_blocks():
    prompts = PromptBlocks()
    blocks = learn(prompts, prompt(1, 2, 3, 4, 5, tokens_each=8))
    assert prompts.find(prompt(1, 2, 3, 4, 5)) == tuple(blocks) == (0, 1)
    assert prompts.find(prompt(1)) == ()
    assert prompts.find(prompt(1, 2)) == (0,)


def test_the_part_of_the_prompt_after_its_last_text_block_is_not_claimed():
    """Its text is not hashed, so nobody can tell whether another prompt has it, too."""
    prompts = PromptBlocks()
    request = req("a", 160, prefix_hashes=(1, 2), prefix_block_share=0.4)  # 0.2 remain
    learn(prompts, request)
    assert prompts.find(request) == tuple(range(8))


def test_the_tail_of_a_prompt_is_forgotten_first(monkeypatch):
    monkeypatch.setattr(prompt_blocks, "_MAX_TEXT_BLOCKS", 4)
    prompts = PromptBlocks()
    old = learn(prompts, prompt(1, 2, 3))
    learn(prompts, prompt(7, 8), first=100)
    assert len(prompts) == 4
    assert prompts.find(prompt(1, 2, 3)) == tuple(old[:8])


def test_what_is_seen_again_is_not_forgotten(monkeypatch):
    monkeypatch.setattr(prompt_blocks, "_MAX_TEXT_BLOCKS", 2)
    prompts = PromptBlocks()
    learn(prompts, prompt(1))
    learn(prompts, prompt(2), first=100)
    blocks = learn(prompts, prompt(1))
    learn(prompts, prompt(3), first=200)
    assert prompts.find(prompt(1)) == tuple(blocks)
    assert prompts.find(prompt(2)) == ()


@given(
    num_shared=st.integers(0, 8),
    num_own=st.integers(0, 8),
    num_others=st.integers(0, 8),
    tokens_each=st.integers(1, 100),
)
def test_two_prompts_share_the_blocks_of_their_common_text(
    num_shared, num_own, num_others, tokens_each
):
    """Of the same density: neither more than the other's leading blocks, nor much less."""
    shared = range(num_shared)
    first = prompt(*shared, *range(100, 100 + num_own), 98, tokens_each=tokens_each)
    second = prompt(*shared, *range(200, 200 + num_others), 99, tokens_each=tokens_each)
    prompts = PromptBlocks()
    blocks = learn(prompts, first)
    found = prompts.find(second)
    assert list(found) == blocks[: len(found)]
    # In proportion, by a fraction: at most the block before the parting is missed.
    exact = num_shared * tokens_each // BLOCK
    assert exact - 1 <= len(found) <= exact
    assert prompts.find(prompt(*shared, tokens_each=tokens_each) if shared else second) == found


@given(
    prompts_learned=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 100), st.integers(0, 3)), max_size=6
    ),
    num_texts=st.integers(1, 6),
)
def test_prompts_of_any_density_give_blocks_without_gaps(prompts_learned, num_texts):
    """One conversation, tokenised differently each time: every block comes in its own place."""
    prompts = PromptBlocks()
    for length, tokens_each, num_lost in prompts_learned:
        request = prompt(*range(length), tokens_each=tokens_each)
        # A block is numbered by its place; the engine may tell fewer than we reckon with.
        blocks = list(range(max(0, request.num_prompt_tokens // BLOCK - num_lost)))
        prompts.learn(request, request.num_prompt_tokens, blocks, BLOCK)
    found = prompts.find(prompt(*range(num_texts)))
    assert list(found) == list(range(len(found)))

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.fleet.prompt_blocks import ENTRY_BYTES, MAX_BYTES, PromptBlocks
from router.types import Request
from tests.support.builders import req

BLOCK = 16  # tokens per KV block


def prompt(*texts: int, tokens_each: int = 64, **fields) -> Request:
    """A prompt of these text blocks, and of nothing else; a number stands for all up to it."""
    return req(
        "a",
        tokens_each * len(texts),
        prefix_hashes=texts,
        prefix_block_share=1 / len(texts),
        **fields,
    )


def learn(prompts: PromptBlocks, request: Request, first: int = 0) -> list[int]:
    """Have an engine tokenise a prompt; return its KV blocks, numbered from `first`."""
    blocks = list(range(first, first + request.num_prompt_tokens // BLOCK))
    prompts.learn(request, request.num_prompt_tokens, blocks, BLOCK)
    return blocks


def test_a_prompt_seen_before_is_known_whole():
    """By the last KV block in each of its text blocks: who holds that holds those before it."""
    prompts = PromptBlocks()
    blocks = learn(prompts, prompt(1, 2, 3))
    assert prompts.find(prompt(1, 2, 3)) == (tuple(blocks[3::4]), (64, 128, 192))
    assert len(blocks) == 12


def test_a_longer_prompt_is_known_as_far_as_it_is_the_same():
    prompts = PromptBlocks()
    learn(prompts, prompt(1, 2))
    assert prompts.find(prompt(1, 2, 3, 4)) == ((3, 7), (64, 128))
    assert prompts.find(prompt(1, 5)) == ((3,), (64,))


def test_what_begins_otherwise_is_not_known():
    prompts = PromptBlocks()
    learn(prompts, prompt(1, 2))
    assert prompts.find(prompt(7, 8)) == ((), ())
    assert prompts.find(req("a", 500)) == ((), ())


def test_text_blocks_may_be_smaller_than_kv_blocks():
    prompts = PromptBlocks()
    learn(prompts, prompt(1, 2, 3, 4, 5, tokens_each=8))
    assert prompts.find(prompt(1, 2, 3, 4, 5, tokens_each=8)) == ((0, 1), (16, 32))
    assert prompts.find(prompt(1, tokens_each=8)) == ((), ())
    assert prompts.find(prompt(1, 2, 3, tokens_each=8)) == ((0,), (16,))


def test_the_part_of_the_prompt_after_its_last_text_block_is_not_claimed():
    """Its text is not hashed, so nobody can tell whether another prompt has it, too."""
    prompts = PromptBlocks()
    request = req("a", 160, prefix_hashes=(1, 2), prefix_block_share=0.4)  # 0.2 remain
    learn(prompts, request)
    assert prompts.find(request) == ((3, 7), (64, 128))


def test_tokens_are_in_proportion_to_what_the_prompt_is_taken_to_have():
    """What is new of a prompt is then as wrong as its size, and not as that of all of it."""
    prompts = PromptBlocks()
    learn(prompts, prompt(1, 2))
    [_, last], [_, end] = prompts.find(prompt(1, 2, 3, 4, tokens_each=80))
    assert (last, end) == (7, 160)


def test_a_long_prompt_is_told_by_its_ends_and_by_steps():
    """So many engines are asked for it, and each for few of its blocks."""
    prompts = PromptBlocks()
    blocks = learn(prompts, prompt(*range(1, 2001)))
    hashes, ends = prompts.find(prompt(*range(1, 2001)))
    assert len(hashes) == len(ends) < 300
    assert (hashes[-1], ends[-1]) == (blocks[-1], 128_000)
    assert all(block == end // BLOCK - 1 for block, end in zip(hashes, ends, strict=True))
    steps = [after - before for before, after in zip((0, *ends), ends, strict=False)]
    assert max(steps) == 16 * 64
    assert set(steps[:60]) == set(steps[-60:]) == {64}


def test_the_next_turn_of_a_long_prompt_costs_what_is_new_of_it():
    class Counted(dict):
        num_written = 0

        def __setitem__(self, key, value):
            Counted.num_written += 1
            super().__setitem__(key, value)

    prompts = PromptBlocks()
    if type(prompts).__module__ and not hasattr(PromptBlocks.learn, "__code__"):
        pytest.skip("compiled, it takes no dictionary but Python's own")
    learn(prompts, prompt(*range(1, 2001)))
    prompts._young = Counted(prompts._young)
    Counted.num_written = 0
    learn(prompts, prompt(*range(1, 2011)))
    assert Counted.num_written == 10


def test_the_tail_of_a_prompt_is_forgotten_first():
    prompts = PromptBlocks()
    prompts.fit(4 * 64, 0)
    learn(prompts, prompt(1, 2, 3))
    learn(prompts, prompt(11, 12), first=100)
    learn(prompts, prompt(1, 2), first=0)  # the younger generation was full
    learn(prompts, prompt(13, 14), first=200)
    learn(prompts, prompt(15), first=300)
    assert prompts.find(prompt(1, 2, 3))[0] == (3, 7)
    assert prompts.find(prompt(11, 12))[0] == ()


@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 30)), max_size=30),
    capacity=st.integers(1, 40),
)
def test_what_is_known_is_a_prefix_whatever_is_forgotten(lengths, capacity):
    prompts = PromptBlocks()
    prompts.fit(64 * capacity, 0)
    for talk, length in lengths:
        texts = [100 * talk + number for number in range(1, length + 1)]
        learn(prompts, prompt(*texts), first=1000 * talk)
        assert len(prompts) <= 2 * (capacity + 30)
    for talk in range(6):
        texts = tuple(100 * talk + number for number in range(1, 31))
        known = [text in prompts._young or text in prompts._old for text in texts]
        assert known == sorted(known, reverse=True)
    if lengths:  # the last one is known in full
        talk, length = lengths[-1]
        texts = [100 * talk + number for number in range(1, length + 1)]
        assert len(prompts.find(prompt(*texts))[0]) == length


def test_an_engine_that_hashes_otherwise_is_learned_anew():
    """As one that was restarted with another seed, or serves another adapter under this name."""
    prompts = PromptBlocks()
    learn(prompts, prompt(1, 2, 3))
    learn(prompts, prompt(1, 2, 3, 4), first=1000)
    assert prompts.find(prompt(1, 2, 3, 4))[0] == (1003, 1007, 1011, 1015)


def test_as_much_is_remembered_as_the_engines_can_cache_within_bounds():
    prompts = PromptBlocks()
    prompts.fit(8 * 456_908, 131_072)
    assert prompts.state().max_blocks == 2 * (8 * 456_908 // 64)
    prompts.fit(1000, 131_072)  # an engine that caches nothing: a few of the longest prompts
    assert prompts.state().max_blocks == 2 * 4 * 131_072 // 64
    prompts.fit(10**10, 131_072)
    assert prompts.state().max_blocks * ENTRY_BYTES <= prompts.state().max_bytes == MAX_BYTES


def test_an_answer_is_known_as_part_of_the_next_prompt():
    prompts = PromptBlocks()
    first = prompt(1, 2, end_hash=77)
    learn(prompts, first)
    prompts.learn_answer(first, 128 + 40, last_block=9, block_size=BLOCK)
    # The same, its answer of 40 tokens and 88 more.
    following = prompt(1, 2, 3, 4, answered_hash=77, answered_share=168 / 256)
    assert prompts.find(following) == ((3, 7, 9), (64, 128, 160))
    # Another answer than that to another prompt is not.
    assert prompts.find(prompt(1, 2, 3, 4, answered_hash=78, answered_share=0.7))[0] == (3, 7)


def test_the_answer_to_a_prompt_shorter_than_a_text_block_is_known():
    prompts = PromptBlocks()
    first = req("a", 30, end_hash=77)
    prompts.learn_answer(first, 30 + 35, last_block=3, block_size=BLOCK)
    following = req("b", 100, answered_hash=77, answered_share=0.65)
    assert prompts.find(following) == ((3,), (64,))


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
    learn(prompts, first)
    hashes, ends = prompts.find(second)
    exact = num_shared * tokens_each // BLOCK
    assert (hashes[-1] + 1 if hashes else 0) == exact
    assert [BLOCK * (block + 1) for block in hashes] == list(ends)


@given(
    prompts_learned=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 100), st.integers(0, 3)), max_size=6
    ),
    num_texts=st.integers(1, 6),
    tokens_each=st.integers(1, 100),
)
def test_prompts_of_any_density_give_blocks_in_order(prompts_learned, num_texts, tokens_each):
    """One conversation, tokenised differently each time."""
    prompts = PromptBlocks()
    for length, density, num_lost in prompts_learned:
        request = prompt(*range(length), tokens_each=density)
        # A block is numbered by its place; the engine may tell fewer than we reckon with.
        blocks = list(range(max(0, request.num_prompt_tokens // BLOCK - num_lost)))
        prompts.learn(request, request.num_prompt_tokens, blocks, BLOCK)
    hashes, ends = prompts.find(prompt(*range(num_texts), tokens_each=tokens_each))
    assert list(hashes) == sorted(set(hashes))
    assert list(ends) == sorted(ends)
    assert not ends or 0 <= ends[0] <= ends[-1] <= num_texts * tokens_each

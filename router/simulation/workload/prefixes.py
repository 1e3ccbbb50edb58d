"""Which hashes have the successive blocks of a prompt?"""


def chained_hashes(
    ids: tuple[int, ...], id_tokens: int, num_tokens: int, block_tokens: int
) -> tuple[int, ...]:
    """Return the hashes of successive whole blocks of so many tokens.

    `ids[i]` names the first `(i + 1) * id_tokens` tokens. A hash is made from the id of the block
    in which it ends, and its end: equal for equal prefixes.
    """
    num_tokens = min(num_tokens, len(ids) * id_tokens)
    hashes: list[int] = []
    end = block_tokens
    while end <= num_tokens:
        hashes.append(chained_hash(ids[(end - 1) // id_tokens], end))
        end += block_tokens
    return tuple(hashes)


def chained_hash(block_id: int, end: int) -> int:
    """Return the hash of the first `end` tokens, which end in the block of this id."""
    return (block_id << 24) | end
